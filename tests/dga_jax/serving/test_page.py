"""The page in headless Chromium: a conversation, its figures, and a file to ask about."""

from collections.abc import Iterator

import pytest

from tests.dga_jax.evaluation.tiny import STORY
from tests.dga_jax.serving import chromium
from tests.dga_jax.serving.chromium import Page
from tests.dga_jax.serving.tiny_server import Server

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
  with chromium.open_page(tmp_path_factory.mktemp("chromium") / "profile") as page:
    yield page


def open_chat(page: Page, server: Server) -> None:
  page.call("Page.navigate", url=server.url)
  page.wait_for("document.readyState == 'complete' && $('model').value == 'tiny'")


def say(page: Page, text: str, answers: int) -> None:
  """Types a message, sends it, and waits until the page has so many answers."""
  page.run(f"$('text').value = {text!r}; $('form').requestSubmit()")
  page.wait_for(f"document.body.dataset.answers == {answers} && $('send').textContent == 'Send'")


def test_a_conversation(page, server, tmp_path):
  open_chat(page, server)
  assert "512 tokens" in page.run("$('status').textContent")
  say(page, "Who came?", answers=1)
  user, assistant = page.run("[...document.querySelectorAll('.message')].map(m => m.textContent)")
  assert user == "Who came?"
  assert assistant not in ("", "…")
  assert page.run("document.querySelectorAll('.error').length") == 0
  figures = page.run("$('status').textContent")
  assert "tokens/s" in figures
  assert " 0 of them cached" in figures
  assert page.run("parseFloat($('live').style.width) < parseFloat($('dense').style.width)")

  page.run("$('new').click()")
  page.wait_for("document.querySelectorAll('.message').length == 0")
  story = tmp_path / "story.txt"
  story.write_text(STORY[:100])
  page.choose_file("#file", story)
  page.wait_for("$('attach').textContent == 'story.txt'")
  say(page, "Was no one at home?", answers=1)
  assert "story.txt" in page.run("document.querySelector('.user').textContent")
  prompt = page.run("parseInt($('status').textContent.match(/(\\d+) tokens of prompt/)[1])")
  assert prompt > 100
  # An answer of random bytes has up to 384 tokens as a prompt; two turns must fit into 512.
  page.run("messages.at(-1).content = 'Rain.'")
  say(page, "And then?", answers=2)
  cached = page.run("parseInt($('status').textContent.match(/(\\d+) of them cached/)[1])")
  assert cached > 100
  page.screenshot(tmp_path / "page.png")
  assert (tmp_path / "page.png").stat().st_size > 5000


def test_an_answer_gets_what_is_left_of_the_context(page, server):
  open_chat(page, server)
  say(page, "a" * 430, answers=1)  # With a quarter of the context it would exceed the context.
  assert page.run("document.querySelectorAll('.error').length") == 0
  assert page.run("document.querySelector('.assistant').textContent") not in ("", "…")


def test_an_error_is_shown(page, server):
  open_chat(page, server)
  page.run("$('text').value = 'a'.repeat(600); $('form').requestSubmit()")
  page.wait_for("document.querySelectorAll('.error').length == 1")
  assert "at most 512 tokens" in page.run("document.querySelector('.error').textContent")


def begin_answer(page: Page, *, ends_with: str) -> None:
  """Asks a question whose answer is "Rain"; then a JavaScript statement about `stream` follows."""
  page.run(
    """
    window.fetch = async (_, { signal }) => new Response(new ReadableStream({ start(stream) {
      const chunk = { choices: [{ delta: { content: "Rain" } }], usage: { prompt_tokens: 1,
        completion_tokens: 1, prompt_tokens_details: { cached_tokens: 0 },
        cache_bytes: { live: 1, dense: 1 } } };
      stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(chunk)}\\n\\n`));
      signal.addEventListener("abort", () => stream.error(signal.reason));
    """
    + ends_with
    + "} })); $('text').value = 'Who came?'; $('form').requestSubmit()"
  )


def test_a_new_chat_during_an_answer_is_empty(page, server):
  open_chat(page, server)
  begin_answer(page, ends_with="")
  page.wait_for("document.querySelector('.assistant')?.textContent == 'Rain'")
  page.run(
    "$('text').value = 'And'; $('text').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}))"
  )
  assert page.run("stopper.signal.aborted") is False  # Enter does not stop an answer.
  page.run("$('new').click()")
  page.wait_for("stopper === null")
  assert page.run("messages.length") == 0


@pytest.mark.parametrize(
  ("ends_with", "message"),
  [
    ("stream.close();", "The server ended before the answer did."),
    ("setTimeout(() => stream.error(new TypeError('network error')));", "connection to the server"),
  ],
)
def test_an_answer_that_breaks_off_keeps_its_text_and_gives_the_message_back(
  page, server, ends_with, message
):
  open_chat(page, server)
  begin_answer(page, ends_with=ends_with)
  page.wait_for("stopper === null && document.querySelector('.error') !== null")
  assert page.run("document.querySelector('.assistant').textContent") == "Rain"
  assert message in page.run("document.querySelector('.error').textContent")
  assert page.run("[messages.length, $('text').value]") == [0, "Who came?"]


@pytest.mark.parametrize("end", ["", "\n```\nThat is it."])
def test_code_is_shown_as_code(page, server, end):
  open_chat(page, server)
  answer = f"An ``` inside.\n```python\nif x:\n  y = 1{end}"
  page.run(f"write(show('assistant', ''), {answer!r})")
  nodes = "[...document.querySelector('.assistant').childNodes]"
  shown = [["#text", "An ``` inside."], ["PRE", "if x:\n  y = 1"], ["#text", "That is it."]]
  assert page.run(f"{nodes}.map(n => [n.nodeName, n.textContent])") == shown[: 3 if end else 2]


def test_a_long_message_and_long_names_fit_into_a_narrow_window(page, server):
  page.call(
    "Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True
  )
  open_chat(page, server)
  page.run("$('model').options[0].textContent = 'name-'.repeat(40)")
  page.run("attach({name: 'report-'.repeat(40), bytes: 1, text: ''})")
  height = page.run("$('text').clientHeight")
  page.run("$('text').value = 'a line\\n'.repeat(4) + 'a'.repeat(200)")
  assert page.run("$('text').clientHeight") > 2 * height
  assert page.run("document.documentElement.scrollWidth") == 360
  page.call("Emulation.clearDeviceMetricsOverride")

"""The page in headless Chromium: a conversation, its figures, and a file to ask about."""

from collections.abc import Iterator

import pytest

from tests.dga_jax.evaluation.tiny import STORY
from tests.dga_jax.serving import chromium
from tests.dga_jax.serving.chromium import Page

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
  with chromium.open_page(tmp_path_factory.mktemp("chromium") / "profile") as page:
    yield page


def say(page: Page, text: str, answers: int) -> None:
  """Types a message, sends it, and waits until the page has so many answers."""
  page.run(f"$('text').value = {text!r}; $('form').requestSubmit()")
  page.wait_for(f"document.body.dataset.answers == {answers} && $('send').textContent == 'Send'")


def test_a_conversation(page, server, tmp_path):
  page.call("Page.navigate", url=server.url)
  page.wait_for("document.readyState == 'complete' && $('model').value == 'tiny'")
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


def test_an_error_is_shown(page, server):
  page.call("Page.navigate", url=server.url)
  page.wait_for("document.readyState == 'complete' && $('model').value == 'tiny'")
  page.run("$('text').value = 'a'.repeat(600); $('form').requestSubmit()")
  page.wait_for("document.querySelectorAll('.error').length == 1")
  assert "at most 512 tokens" in page.run("document.querySelector('.error').textContent")

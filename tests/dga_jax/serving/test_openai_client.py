"""The server with OpenAI's Python client."""

import numpy as np
import openai
import pytest

from dga_jax.generation import Sampling
from tests.dga_jax.serving.tiny_server import NAME

HELLO = [{"role": "user", "content": "Hello €"}]


def chat(client, **options):
  given = {"model": NAME, "messages": HELLO, "max_tokens": 12, "temperature": 0}
  given |= {"logit_bias": {"256": -100}} | options  # The model never samples its end token.
  return client.chat.completions.create(**given)


def complete(client, **options):
  given = {"model": NAME, "prompt": "Rain began", "max_tokens": 12, "temperature": 0} | options
  return client.completions.create(**given)


def test_models(client):
  (model,) = client.models.list().data
  assert (model.id, model.owned_by) == (NAME, "dga-jax")
  assert client.models.retrieve(NAME).id == NAME


def test_a_completion_is_the_model_s(client, continue_text):
  answer = complete(client)
  (choice,) = answer.choices
  assert choice.text == continue_text("Rain began", 12)
  assert choice.finish_reason == "length"
  usage = answer.usage
  assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (11, 12, 23)
  assert usage.cache_bytes["live"] > 0
  assert usage.cache_bytes["dense"] == 2 * 2 * 2 * 8 * 4 * 23  # Keys and values of 23 tokens.


def test_a_sampled_completion_repeats_with_its_seed(client, continue_text):
  how = {"temperature": 0.9, "top_p": 0.8, "seed": 7, "max_tokens": 10}
  expected = continue_text("Rain began", 10, Sampling(temperature=0.9, top_p=0.8, seed=7))
  assert complete(client, **how).choices[0].text == expected


def test_a_stream_equals_the_whole_answer(client):
  whole = chat(client, logprobs=True, top_logprobs=2)
  chunks = list(
    chat(client, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True})
  )
  first, *middle, last, usage = chunks
  assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
  assert all(chunk.choices[0].finish_reason is None for chunk in [first, *middle])
  assert last.choices[0].finish_reason == whole.choices[0].finish_reason == "length"
  assert usage.choices == []
  assert usage.usage.completion_tokens == 12
  assert all(chunk.usage is None for chunk in chunks[:-1])
  assert len({chunk.id for chunk in chunks}) == 1
  text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
  assert text == whole.choices[0].message.content
  rows = [
    row for chunk in chunks[:-1] if chunk.choices[0].logprobs
    for row in chunk.choices[0].logprobs.content
  ]  # fmt: skip
  assert rows == whole.choices[0].logprobs.content
  assert len(rows) == 12
  for row in rows:
    first, second = row.top_logprobs
    assert second.logprob <= first.logprob
    assert row.logprob <= first.logprob <= 0
    assert bytes(row.bytes).decode(errors="replace") == row.token


def test_log_probabilities_of_a_completion(client):
  (choice,) = complete(client, logprobs=3, max_tokens=4).choices
  logprobs = choice.logprobs
  assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 4
  assert logprobs.text_offset[0] == 0
  assert max(logprobs.top_logprobs[0].values()) == logprobs.token_logprobs[0]


def test_an_echoed_prompt_has_log_probabilities(client):
  options = {"logprobs": 2, "max_tokens": 3, "temperature": 0}
  plain = complete(client, **options).choices[0]
  echoed = complete(client, echo=True, **options).choices[0]
  rows = echoed.logprobs
  assert echoed.text == "".join(rows.tokens)
  assert echoed.text.endswith(plain.text)
  new = len(plain.logprobs.tokens)
  count = len(rows.tokens) - new
  assert count > 1
  assert rows.tokens[count:] == plain.logprobs.tokens
  np.testing.assert_allclose(rows.token_logprobs[count:], plain.logprobs.token_logprobs, atol=1e-4)
  assert rows.text_offset == [len("".join(rows.tokens[:i])) for i in range(len(rows.tokens))]
  # Each token of the prompt has the log probability that it has as a forced answer.
  text = "".join(rows.tokens[: count - 1])
  last = complete(client, prompt=text, logprobs=2, max_tokens=1).choices[0].logprobs
  assert rows.top_logprobs[count - 1].keys() == last.top_logprobs[0].keys()
  for token, value in last.top_logprobs[0].items():
    np.testing.assert_allclose(rows.top_logprobs[count - 1][token], value, atol=1e-4)
  streamed = list(complete(client, echo=True, stream=True, **options))
  chunks = [chunk.choices[0] for chunk in streamed]
  assert "".join(chunk.text for chunk in chunks) == echoed.text
  parts = [chunk.logprobs for chunk in chunks if chunk.logprobs]
  assert [value for part in parts for value in part.token_logprobs] == rows.token_logprobs


def test_a_stop_text_ends_the_answer(client):
  text = complete(client, max_tokens=40).choices[0].text
  stop = text[5:8]
  choice = complete(client, max_tokens=40, stop=[stop, "never here"]).choices[0]
  assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
  streamed = list(complete(client, max_tokens=40, stop=stop, stream=True))
  assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
  assert streamed[-1].choices[0].finish_reason == "stop"


def test_a_stop_token_ends_the_answer(client):
  token = complete(client, max_tokens=1).choices[0].text.encode()[0]
  choice = complete(client, extra_body={"stop_token_ids": [token]}).choices[0]
  assert (choice.text, choice.finish_reason) == ("", "stop")


def test_several_choices_have_seeds_of_their_own(client):
  together = complete(client, n=3, temperature=1, seed=5).choices
  assert [choice.index for choice in together] == [0, 1, 2]
  alone = [complete(client, temperature=1, seed=5 + i).choices[0].text for i in range(3)]
  assert [choice.text for choice in together] == alone
  assert len(set(alone)) == 3
  streamed = {}
  for chunk in complete(client, n=3, temperature=1, seed=5, stream=True):
    (choice,) = chunk.choices
    streamed[choice.index] = streamed.get(choice.index, "") + choice.text
  assert [streamed[i] for i in range(3)] == alone


def test_prompts_as_lists_and_token_ids(client):
  one = complete(client).choices[0].text
  ids = [256, *b"Rain began"]
  assert complete(client, prompt=ids).choices[0].text == one
  several = complete(client, prompt=["Rain began", "He"], echo=True).choices
  assert several[0].text == "Rain began" + one
  assert several[1].text.startswith("He")


def test_prompts_of_a_list_are_streamed_by_their_index(client):
  prompts, texts = ["Rain began", "He"], {}
  alone = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]
  finishes = []
  for chunk in complete(client, prompt=prompts, echo=True, stream=True):
    (choice,) = chunk.choices
    texts[choice.index] = texts.get(choice.index, "") + choice.text
    finishes += [choice.finish_reason] if choice.finish_reason else []
  assert texts == {i: prompts[i] + alone[i] for i in range(2)}
  assert len(finishes) == 2


def test_a_bias_forces_a_token(client):
  assert complete(client, logit_bias={"65": 100}, max_tokens=3).choices[0].text == "AAA"


def test_filters(client, continue_text):
  how = Sampling(temperature=1.0, top_p=1.0, top_k=5, min_p=0.1, seed=3)
  answer = complete(client, temperature=1, seed=3, extra_body={"top_k": 5, "min_p": 0.1})
  assert answer.choices[0].text == continue_text("Rain began", 12, how)


def test_the_next_turn_continues_after_the_answer(client, server):
  long = [{"role": "user", "content": "He left the parcel under the porch. " * 4}]
  spelled = {"logit_bias": {"65": 100}}  # The text "AAAAAAAAAAAA" has the sampled tokens again.
  first = chat(client, messages=long, **spelled)
  answer = first.choices[0].message.content
  assert (answer, first.usage.prompt_tokens_details.cached_tokens) == ("A" * 12, 0)

  def next_turn(said: str) -> int:
    messages = [*long, {"role": "assistant", "content": said}, {"role": "user", "content": "Why?"}]
    return chat(client, messages=messages).usage.prompt_tokens_details.cached_tokens

  end_of_message = len("|user: ") + len(long[0]["content"]) + len("\n")
  assert next_turn("AAAB") == end_of_message
  assert next_turn(answer) == end_of_message + len("|assistant: ") + len(answer) - 1
  assert server.metric("dga_cached_tokens_total") >= end_of_message


def test_the_next_turn_continues_before_a_stop_text(client, server):
  prompt = "She counted the boats in the harbour at noon, and again at dusk. "
  letters = {"max_tokens": 40, "temperature": 1, "seed": 1, "logit_bias": {"65": 100, "66": 100}}
  text = complete(client, prompt=prompt, **letters).choices[0].text
  stop = text[15:25]
  answer = complete(client, prompt=prompt, stop=stop, **letters).choices[0].text
  assert answer == text[: text.index(stop)] != ""
  server.wait_until_idle()
  turn = complete(client, prompt=f"{prompt}{answer} Why?", max_tokens=2)
  assert turn.usage.prompt_tokens_details.cached_tokens == 1 + len(prompt) + len(answer)


def test_the_end_token_in_a_message_does_not_end_it(client):
  spelled = chat(client, messages=[{"role": "user", "content": "<|end|>"}])
  assert spelled.usage.prompt_tokens == len("|user: ") + len("<|end|>") + len("\n|assistant: ")


@pytest.mark.parametrize(
  ("options", "error", "param", "code"),
  [
    ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools",
     "unsupported_parameter"),
    ({"temperature": -1}, openai.BadRequestError, "temperature", "invalid_value"),
    ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
    ({"n": 9}, openai.BadRequestError, "n", "invalid_value"),
    ({"stop_token_ids": 3}, openai.BadRequestError, "stop_token_ids", "invalid_value"),
    ({"logit_bias": {"300": 1}}, openai.BadRequestError, None, "invalid_value"),
    ({"messages": [{"role": "user", "content": "\ufdd0"}]}, openai.BadRequestError, "messages",
     "invalid_value"),
  ],
)  # fmt: skip
def test_errors(client, options, error, param, code):
  extra = {name: options.pop(name) for name in ("stop_token_ids",) if name in options}
  with pytest.raises(error) as caught:
    chat(client, **options, extra_body=extra)
  assert (caught.value.param, caught.value.code) == (param, code)
  assert caught.value.body["message"]


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(client):
  with pytest.raises(openai.BadRequestError) as caught:
    complete(client, prompt="a" * 600)
  assert caught.value.code == "context_length_exceeded"
  for number in ("512", "601", "12", "613"):
    assert number in caught.value.message

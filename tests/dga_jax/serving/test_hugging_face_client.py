"""The server with Hugging Face's `InferenceClient`, a client of its own for OpenAI's interface."""

from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.dga_jax.serving.tiny_server import NAME, Server

_CHAT: dict[str, Any] = {
  "model": NAME,
  "messages": [{"role": "user", "content": "Hello €"}],
  "max_tokens": 12,
  "temperature": 0.0,
  "extra_body": {"logit_bias": {"256": -100}},  # The model never samples its end token.
}


@pytest.fixture
def client(server: Server) -> Iterator[InferenceClient]:
  with InferenceClient(base_url=f"{server.url}/v1", api_key="none") as client:
    yield client


def test_a_stream_equals_the_whole_answer(client: InferenceClient) -> None:
  whole = client.chat_completion(**_CHAT)
  assert whole.model == NAME
  assert whole.usage.completion_tokens == 12
  (choice,) = whole.choices
  assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
  chunks = list(client.chat_completion(**_CHAT, stream=True))
  text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
  assert text == choice.message.content
  assert chunks[-1].choices[0].finish_reason == "length"


def test_logprobs_are_of_the_answer(client: InferenceClient) -> None:
  answer = client.chat_completion(**_CHAT, logprobs=True, top_logprobs=2)
  tokens = answer.choices[0].logprobs.content
  assert len(tokens) == 12
  for token in tokens:  # The bias of the end token changes the choice, not the log probabilities.
    first, second = (one.logprob for one in token.top_logprobs)
    assert second <= first <= 0
    assert token.logprob <= first


def test_an_unsupported_field_is_an_error_with_its_name(client: InferenceClient) -> None:
  with pytest.raises(HfHubHTTPError, match="presence_penalty"):
    client.chat_completion(**_CHAT, presence_penalty=1.0)

"""Fields of requests: defaults, bounds, and what is refused by name."""

import pytest

from dga_jax.serving.errors import APIError
from dga_jax.serving.parameters import parse_chat, parse_completion

CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
COMPLETION = {"model": "m", "prompt": "a"}


def test_defaults():
  chat, completion = parse_chat(CHAT), parse_completion(COMPLETION)
  assert chat.max_tokens is None
  assert completion.max_tokens == 16
  for parsed in (chat, completion):
    sampling = parsed.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)
    assert sampling.top_logprobs is None
    assert (parsed.choices, parsed.stop, parsed.stop_ids, parsed.stream) == (1, (), set(), False)
  assert parse_chat(CHAT).sampling.seed != chat.sampling.seed  # Drawn anew.


def test_every_field_arrives():
  given = {
    "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "n": 2,
    "seed": -1, "stop": ["x", "yz"], "stop_token_ids": [5], "logit_bias": {"7": -3},
    "stream": True, "stream_options": {"include_usage": True},
  }  # fmt: skip
  chat = parse_chat({**CHAT, **given, "logprobs": True, "top_logprobs": 3})
  assert chat.max_tokens == 3
  assert chat.choices == 2
  assert (chat.stop, chat.stop_ids) == (("x", "yz"), {5})
  assert (chat.stream, chat.include_usage, chat.continuous_usage) == (True, True, False)
  sampling = chat.sampling
  assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 4)
  assert (sampling.min_p, sampling.seed, sampling.top_logprobs) == (0.1, 2**32 - 1, 3)
  assert sampling.logit_bias == ((7, -3.0),)
  assert parse_chat({**CHAT, "max_tokens": 3, "max_completion_tokens": 4}).max_tokens == 4
  assert parse_chat({**CHAT, "logprobs": True}).sampling.top_logprobs == 0
  assert parse_completion({**COMPLETION, "logprobs": 2}).sampling.top_logprobs == 2
  assert parse_completion({**COMPLETION, "echo": True}).echo


@pytest.mark.parametrize(
  ("prompt", "parsed"),
  [
    ("a", ("a",)),
    (["a", "b"], ("a", "b")),
    ([1, 2], ((1, 2),)),
    ([[1], [2, 3]], ((1,), (2, 3))),
  ],
)
def test_prompts(prompt, parsed):
  assert parse_completion({**COMPLETION, "prompt": prompt}).prompts == parsed


def test_the_parts_of_a_content_are_joined():
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
  chat = parse_chat({**CHAT, "messages": [{"role": "user", "content": parts}]})
  assert chat.messages == ({"role": "user", "content": "a\nb"},)


def test_a_message_keeps_its_name_and_drops_fields_that_request_nothing():
  message = {"role": "user", "content": "a", "name": "b"}
  nothing = {"refusal": None, "annotations": [], "tool_calls": None, "audio": None}
  assert parse_chat({**CHAT, "messages": [message | nothing]}).messages == (message,)


def test_values_that_ask_for_nothing_are_accepted():
  nothing = {
    "frequency_penalty": 0, "presence_penalty": 0.0, "tools": [], "tool_choice": "none",
    "response_format": {"type": "text"}, "logit_bias": {}, "stop": None, "user": "me",
    "metadata": {}, "parallel_tool_calls": True,
  }  # fmt: skip
  parse_chat({**CHAT, **nothing})
  parse_completion({**COMPLETION, "best_of": 1, "suffix": "", "frequency_penalty": 0})


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("tools", [{"type": "function"}]),
    ("response_format", {"type": "json_object"}),
    ("frequency_penalty", 0.5),
    ("presence_penalty", -1),
    ("functions", [{}]),
    ("modalities", ["audio"]),
    ("no_such_field", 1),
  ],
)
def test_what_is_not_supported_is_named(field, value):
  with pytest.raises(APIError) as caught:
    parse_chat({**CHAT, field: value})
  assert (caught.value.status, caught.value.param) == (400, field)
  assert caught.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("model", None),
    ("model", 3),
    ("messages", []),
    ("messages", "a"),
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", 10**400),
    ("temperature", float("nan")),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", 1.5),
    ("min_p", 2),
    ("n", 0),
    ("n", 129),
    ("seed", 1.0),
    ("max_tokens", 0),
    ("max_completion_tokens", -1),
    ("stop", [""]),
    ("stop", ["a"] * 17),
    ("stop_token_ids", [-1]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "x"}),
    ("logit_bias", {str(i): 1 for i in range(301)}),
    ("logprobs", 1),
    ("top_logprobs", 21),
    ("top_logprobs", 2),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("stream_options", {"include": 1}),
  ],
)
def test_wrong_values_are_named(field, value):
  with pytest.raises(APIError) as caught:
    parse_chat({**CHAT, field: value})
  assert caught.value.status == 400
  assert field.partition("_")[0] in caught.value.message or caught.value.param == "include"


@pytest.mark.parametrize(
  "message",
  [
    "text",
    {"content": "a"},
    {"role": "user"},
    {"role": "user", "content": 3},
    {"role": "user", "content": [{"type": "image_url"}]},
    {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [{"type": "text", "text": 5}]},
    {"role": "user", "content": "a", "name": 5},
    {"role": "assistant", "content": "", "tool_calls": [{}]},
    {"role": "tool", "content": "a", "tool_call_id": "b"},
    {"role": "assistant", "content": "a", "prefix": True},
  ],
)
def test_wrong_messages_are_located(message):
  with pytest.raises(APIError) as caught:
    parse_chat({**CHAT, "messages": [*CHAT["messages"], message]})
  assert caught.value.param.startswith("messages[1]")


@pytest.mark.parametrize("prompt", [None, "", [], [[]], [1, "a"], [1.5], {}])
def test_wrong_prompts(prompt):
  if prompt == "":
    assert parse_completion({**COMPLETION, "prompt": ""}).prompts == ("",)
    return
  with pytest.raises(APIError, match="prompt must be"):
    parse_completion({**COMPLETION, "prompt": prompt})


@pytest.mark.parametrize("body", [None, 3, "a", []])
def test_a_body_is_an_object(body):
  with pytest.raises(APIError, match="JSON object"):
    parse_chat(body)

"""The parameters of /v1/completions and /v1/chat/completions."""

import dataclasses
import secrets
from typing import Any

from dga_jax.generation import Sampling
from dga_jax.generation.sampling import MAX_BIASED_TOKENS, MAX_TOP_LOGPROBS
from dga_jax.serving.errors import invalid, unsupported
from dga_jax.serving.fields import Fields

MAX_CHOICES = 128
_MAX_STOPS = 16
_MAX_TOKENS = 2**31 - 1
# Fields that do not change the answer.
_IGNORED = frozenset(
  ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"]
)
# Fields of OpenAI's interface that are not supported, with the values that have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "frequency_penalty": (0, 0.0),
  "presence_penalty": (0, 0.0),
}
_NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = _NEUTRAL | {
  "tools": ([],),
  "functions": ([],),
  "tool_choice": ("none", "auto"),
  "function_call": ("none", "auto"),
  "parallel_tool_calls": (True, False),
  "response_format": ({"type": "text"},),
  "modalities": (["text"],),
  "audio": (),
  "prediction": (),
  "reasoning_effort": (),
  "verbosity": (),
  "web_search_options": (),
}
_NEUTRAL_COMPLETION: dict[str, tuple[Any, ...]] = _NEUTRAL | {"best_of": (1,), "suffix": ("",)}


@dataclasses.dataclass(frozen=True)
class Parameters:
  """What both endpoints share.

  Attributes:
    model: the name of the model.
    max_tokens: bound on the tokens of an answer; None for what the context leaves.
    sampling: of the first choice; choice i has seed + i.
    choices: answers to each prompt.
    stop: texts before which an answer ends.
    stop_ids: tokens that end an answer, in addition to those of the model.
    stream: whether the answer is streamed.
    include_usage: whether a stream ends with a chunk with the usage.
    continuous_usage: whether every chunk of a stream has the usage so far.
  """

  model: str
  max_tokens: int | None
  sampling: Sampling
  choices: int
  stop: tuple[str, ...]
  stop_ids: frozenset[int]
  stream: bool
  include_usage: bool
  continuous_usage: bool


@dataclasses.dataclass(frozen=True)
class CompletionParameters(Parameters):
  """Of /v1/completions.

  Attributes:
    prompts: texts or lists of token ids.
    echo: whether an answer begins with its prompt.
  """

  prompts: tuple[str | tuple[int, ...], ...]
  echo: bool


@dataclasses.dataclass(frozen=True)
class ChatParameters(Parameters):
  """Of /v1/chat/completions.

  Attributes:
    messages: the conversation, each with a role and a content.
  """

  messages: tuple[dict[str, Any], ...]


def parse_completion(body: Any) -> CompletionParameters:
  """The parameters of a completion.

  Raises:
    APIError: names the field that is wrong or not supported.
  """
  fields = Fields(body)
  prompts, echo = _prompts(fields.take("prompt")), fields.flag("echo")
  logprobs = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
  shared = _shared(fields, fields.integer("max_tokens", 16, 1, _MAX_TOKENS), logprobs)
  fields.finish(_NEUTRAL_COMPLETION, _IGNORED)
  return CompletionParameters(**shared, prompts=prompts, echo=echo)


def parse_chat(body: Any) -> ChatParameters:
  """The parameters of a chat completion.

  Raises:
    APIError: names the field that is wrong or not supported.
  """
  fields = Fields(body)
  messages = _messages(fields.take("messages"))
  old = fields.integer("max_tokens", None, 1, _MAX_TOKENS)
  most = fields.integer("max_completion_tokens", old, 1, _MAX_TOKENS)
  wants_logprobs = fields.flag("logprobs")
  top = fields.integer("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
  if top is not None and not wants_logprobs:
    raise invalid("top_logprobs", "top_logprobs needs logprobs to be true.")
  shared = _shared(fields, most, (top or 0) if wants_logprobs else None)
  fields.finish(_NEUTRAL_CHAT, _IGNORED)
  return ChatParameters(**shared, messages=messages)


def _shared(fields: Fields, max_tokens: int | None, top_logprobs: int | None) -> dict[str, Any]:
  stream, options = fields.flag("stream"), Fields(fields.mapping("stream_options"))
  include_usage = options.flag("include_usage")
  continuous_usage = options.flag("continuous_usage_stats")
  options.finish({"include_obfuscation": (False,)}, frozenset())
  if not stream and (include_usage or continuous_usage):
    raise invalid("stream_options", "stream_options needs stream to be true.")
  return {
    "model": fields.text("model"),
    "max_tokens": max_tokens,
    "sampling": _sampling(fields, top_logprobs),
    "choices": fields.integer("n", 1, 1, MAX_CHOICES),
    "stop": tuple(fields.strings("stop", _MAX_STOPS)),
    "stop_ids": frozenset(fields.integers("stop_token_ids", 64)),
    "stream": stream,
    "include_usage": include_usage,
    "continuous_usage": continuous_usage,
  }


def _sampling(fields: Fields, top_logprobs: int | None) -> Sampling:
  temperature = fields.number("temperature", 1.0, 0, 100)
  seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
  return Sampling(
    temperature=temperature if temperature >= 1e-4 else 0.0,
    top_p=fields.number("top_p", 1.0, 1e-9, 1),
    top_k=max(0, fields.integer("top_k", 0, -1, 2**31 - 1)),
    min_p=fields.number("min_p", 0.0, 0, 1),
    seed=secrets.randbits(32) if seed is None else seed % 2**32,
    logit_bias=_logit_bias(fields.mapping("logit_bias")),
    top_logprobs=top_logprobs,
  )


def _logit_bias(given: dict[str, Any]) -> tuple[tuple[int, float], ...]:
  wanted = f"at most {MAX_BIASED_TOKENS} token ids, each with a number from -100 to 100"
  pairs = []
  for token, bias in given.items():
    is_id = token.isascii() and token.isdigit() and len(token) < 10
    if not is_id or type(bias) not in (int, float) or not -100 <= bias <= 100:
      raise invalid("logit_bias", f"logit_bias has {token!r:.40}: {bias!r:.40}; it takes {wanted}.")
    pairs.append((int(token), float(bias)))
  if len(pairs) > MAX_BIASED_TOKENS:
    raise invalid("logit_bias", f"logit_bias has {len(pairs)} entries; it takes {wanted}.")
  return tuple(pairs)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
  if isinstance(value, str) or _is_ids(value):
    value = [value]
  if not isinstance(value, list) or not 0 < len(value) <= MAX_CHOICES:
    raise invalid("prompt", _PROMPT)
  if not all(isinstance(one, str) or _is_ids(one) for one in value):
    raise invalid("prompt", _PROMPT)
  return tuple(one if isinstance(one, str) else tuple(one) for one in value)


_PROMPT = (
  f"prompt must be a string, a list of token ids, or a list of at most {MAX_CHOICES} of these."
)


def _is_ids(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
  if not isinstance(value, list) or not value:
    raise invalid("messages", "messages must be a list of at least one message.")
  return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(value))


def _message(message: Any, where: str) -> dict[str, Any]:
  """A message with a string as content, and a name if it has one; parts of text are joined."""
  if not isinstance(message, dict) or not isinstance(message.get("role"), str):
    raise invalid(where, f"{where} must be an object with the strings 'role' and 'content'.")
  content = message.get("content")
  if isinstance(content, list):
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
      raise unsupported(f"{where}.content", f"{where}.content has a part that is not a text.")
    if not all(isinstance(part.get("text"), str) for part in content):
      raise invalid(f"{where}.content", f"{where}.content has a part whose text is not a string.")
    content = "\n".join(part["text"] for part in content)
  if not isinstance(content, str):
    raise invalid(f"{where}.content", f"{where}.content must be a string or a list of texts.")
  name = message.get("name")
  if not isinstance(name, str | None):
    raise invalid(f"{where}.name", f"{where}.name must be a string.")
  # Clients send answers back with fields that request nothing, such as tool_calls: [].
  used = [field for field in message if field not in ("role", "content", "name") and message[field]]
  if used:
    raise unsupported(
      f"{where}.{used[0]}", f"{where}.{used[0]} is not supported by this server; leave it out."
    )
  named = {} if name is None else {"name": name}
  return {"role": message["role"], "content": content, **named}

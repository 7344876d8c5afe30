"""Requests to the engine, the tokens that it emits, and its errors."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dga_jax.generation.sampling import Sampling

MAX_STOP_IDS = 128
"""The largest number of entries of `Request.stop_ids`."""
FinishReason = Literal["stop", "length", "cancelled", "not_finite", "failed"]


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to continue.

  Attributes:
    prompt: token ids, at least one.
    max_new_tokens: bound on the tokens of the continuation.
    sampling: how its tokens are sampled.
    stop_ids: at most `MAX_STOP_IDS` tokens that end the continuation and are not part of it.
    keep_at: numbers of tokens of the prompt after which the engine keeps the cache for later
      requests, such as the ends of a system prompt and of the last message; None for the end of
      the prompt.
    prompt_logprobs: whether the log probabilities of the prompt's tokens are wanted, too. The whole
      prompt is then read, also where a kept cache has its beginning. It needs
      `sampling.top_logprobs`.
  """

  prompt: Sequence[int]
  max_new_tokens: int
  sampling: Sampling = dataclasses.field(default_factory=Sampling)
  stop_ids: Collection[int] = ()
  keep_at: Sequence[int] | None = None
  prompt_logprobs: bool = False

  @property
  def last_kept(self) -> int:
    """The largest number of tokens of the prompt after which the engine keeps the cache."""
    return len(self.prompt) if self.keep_at is None else max(self.keep_at, default=0)

  def check(self, name: str, vocab_size: int, max_length: int | None) -> None:
    """Checks the request against a model and a cache.

    Args:
      name: of the prompt, for the message.
      vocab_size: token ids of the model.
      max_length: tokens that the cache holds, prompt and continuation; None for no bound.

    Raises:
      ValueError: an empty prompt, an id that is not a token, a prompt that is too long, or too
        many stop ids.
    """
    new = self.max_new_tokens
    if new < 1:
      raise ValueError(f"max_new_tokens of {name} is {new}; it must be at least 1.")
    if not len(self.prompt):
      raise ValueError(f"{_capital(name)} has no tokens; give at least one.")
    if not (min(self.prompt) >= 0 and max(self.prompt) < vocab_size):
      raise ValueError(f"{_capital(name)} has token ids outside 0..{vocab_size - 1}.")
    if self.prompt_logprobs and self.sampling.top_logprobs is None:
      raise ValueError(
        f"prompt_logprobs of {name} is True, but top_logprobs is None; set it to 0 or more."
      )
    if len(self.stop_ids) > MAX_STOP_IDS:
      raise ValueError(
        f"stop_ids of {name} has {len(self.stop_ids)} entries; it may have at most {MAX_STOP_IDS}."
      )
    if any(token >= vocab_size for token, _ in self.sampling.logit_bias):
      raise ValueError(f"logit_bias of {name} has token ids outside 0..{vocab_size - 1}.")
    if max_length is not None and len(self.prompt) + new > max_length:
      raise ValueError(
        f"{_capital(name)} has {len(self.prompt)} tokens; with max_new_tokens={new} it exceeds"
        f" max_length={max_length}. Shorten it, or raise max_length."
      )


class TokenLogprobs(NamedTuple):
  """Log probabilities at one token.

  Attributes:
    logprob: of the token.
    top: pairs (token id, log probability) of the most likely tokens, most likely first.
  """

  logprob: float
  top: list[tuple[int, float]]


class Emitted(NamedTuple):
  """New tokens of a request.

  Attributes:
    request: the number of the request.
    tokens: the new tokens, without a stop token.
    finish: why the request has ended: "stop" at a stop token, "length" at `max_new_tokens`,
      "not_finite" at logits that are NaN or infinite, "cancelled", "failed" with the
      engine; None if it continues.
    logprobs: one entry a token if the request has `top_logprobs`.
    cached_tokens: tokens of the prompt whose cache was kept from an earlier request.
    prompt_logprobs: with the first tokens of a request that wants them, one entry for each token
      of the prompt but the first; else None.
  """

  request: int
  tokens: list[int]
  finish: FinishReason | None
  logprobs: list[TokenLogprobs]
  cached_tokens: int
  prompt_logprobs: list[TokenLogprobs] | None = None

  @property
  def done(self) -> bool:
    """Whether the request has ended."""
    return self.finish is not None


@dataclasses.dataclass(frozen=True)
class EngineStatus:
  """The engine's load.

  Attributes:
    running: requests in slots.
    waiting: requests that wait for a slot, or whose prompt is being read.
    kept: caches kept for later requests.
    slot_bytes: bytes of the caches of all slots.
    kept_device_bytes: bytes of the kept caches on the device.
    kept_host_bytes: bytes of the kept caches on the host.
  """

  running: int
  waiting: int
  kept: int
  slot_bytes: int
  kept_device_bytes: int
  kept_host_bytes: int


class QueueFullError(RuntimeError):
  """As many requests wait as the engine admits."""


class EngineStoppedError(RuntimeError):
  """The engine is closed, or has failed."""


def pad_prompt(prompt: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
  """int32 [1, length], the prompt padded with zeros."""
  padded = np.zeros((1, length), np.int32)
  padded[0, : len(prompt)] = prompt
  return padded


def _capital(text: str) -> str:
  return text[:1].upper() + text[1:]

"""The settings that a KV head may follow: their attention kinds, names and costs."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dga_jax.attention.segments import find_documents
from dga_jax.cache import cache_size
from dga_jax.cache.layout import score_bytes
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, HeadSetting
from dga_jax.model import ModelConfig
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.model.attention_kinds.dense import DenseAttention
from dga_jax.model.attention_kinds.dga import DynamicGroupAttention
from dga_jax.model.attention_kinds.sink_window import SinkWindowAttention
from dga_jax.model.flops import mean_keys

Objective = Literal["bytes", "flops", "latency"]
_TIMED_CALLS = 5


@dataclasses.dataclass(frozen=True)
class SinksAndWindow:
  """Sinks and a window of raw tokens: the rule of DuoAttention's streaming heads, a baseline.

  Keys keep their true positions (Xiao et al., arXiv 2410.10819).

  Attributes:
    sinks: first tokens that every query sees.
    window: last tokens that a query sees, its own token included.
  """

  sinks: int
  window: int


type Candidate = HeadSetting | SinksAndWindow


def make_grid(
  blocks: Sequence[tuple[int, int]],
  windows: Sequence[int],
  sinks: int,
  length: int,
  *,
  has_selector: bool = False,
) -> tuple[HeadSetting, ...]:
  """The candidates: "full", and streaming selection for each pair of a block and a window.

  Args:
    blocks: pairs (m, f): tokens that are merged and tokens that stay focal in each block.
    windows: raw tokens before a query's own block; each is rounded to whole blocks.
    sinks: first tokens that stay focal.
    length: L, tokens of the calibrated context.
    has_selector: whether the model has a fitted selector, which then chooses in every config.

  Returns:
    "full" first, then distinct configs from the largest cache to the smallest.

  Raises:
    ValueError: a config's cache does not have fewer entries than a full head's.
  """
  configs = {
    DGAConfig(
      group_size=m,
      focal_per_block=f,
      selection="streaming",
      selector="fitted" if has_selector else "last_query",
      sink_tokens=sinks,
      local_window=round(window / (m + f)),
    )
    for m, f in blocks
    for window in windows
  }
  ordered = sorted(configs, key=lambda config: (-entries(config, length), repr(config)))
  for config in ordered:
    if entries(config, length) >= length:
      raise ValueError(
        f"the candidate {label(config)!r} keeps {entries(config, length)} cache entries of"
        f" {length} tokens, no fewer than a full head: lower --windows or raise --length."
      )
  return (FULL, *ordered)


def entries(candidate: Candidate, length: int) -> int:
  """Keys in the cache of one KV head after `length` tokens."""
  if isinstance(candidate, DGAConfig):
    return cache_size(config=candidate, max_length=length).total
  if isinstance(candidate, SinksAndWindow):
    return min(candidate.sinks + candidate.window, length)
  return length


def label(candidate: Candidate) -> str:
  """A short name, such as "30+2, 4 sinks, 16 raw blocks"."""
  if isinstance(candidate, DGAConfig):
    return (
      f"{candidate.group_size}+{candidate.focal_in_block}, {candidate.sink_tokens} sinks,"
      f" {candidate.local_window} raw blocks"
      + (", fitted selector" if candidate.selector == "fitted" else "")
    )
  if isinstance(candidate, SinksAndWindow):
    return f"{candidate.sinks} sinks, window of {candidate.window}"
  return candidate


def attention_kind(candidate: Candidate) -> AttentionKind:
  """The attention kind of a KV head that follows a candidate."""
  if isinstance(candidate, DGAConfig):
    return DynamicGroupAttention(candidate)
  if isinstance(candidate, SinksAndWindow):
    return SinkWindowAttention("sinks_and_window", candidate.window, candidate.sinks)
  return DenseAttention()


def head_costs(
  objective: Objective, candidates: Sequence[HeadSetting], config: ModelConfig, length: int
) -> Float[np.ndarray, "C"]:
  """What one KV head that follows each candidate costs, float64.

  Args:
    objective: "bytes" of the cache of one sequence; "flops", operations of the forward pass of
      attention over one sequence, 4·D per query head and key, without selection and merging; or
      "latency", seconds of the forward pass of attention over one sequence, measured on the default
      device with all heads of a layer under the candidate, divided by the KV heads.
    candidates: C settings.
    config: of the model.
    length: L, tokens of a sequence.
  """
  costs: list[float]
  if objective == "bytes":
    entry = 2 * config.head_dim * jnp.dtype(config.dtype).itemsize
    costs = [
      entry * entries(one, length) + (score_bytes(one) if isinstance(one, DGAConfig) else 0)
      for one in candidates
    ]
  elif objective == "flops":
    queries = length * config.num_heads // config.num_kv_heads
    costs = [
      4 * config.head_dim * queries * _mean_keys(candidate, config, length)
      for candidate in candidates
    ]
  else:
    costs = [_seconds(candidate, config, length) / config.num_kv_heads for candidate in candidates]
  return np.array(costs, np.float64)


def _mean_keys(candidate: HeadSetting, config: ModelConfig, length: int) -> float:
  if isinstance(candidate, DGAConfig):
    return mean_keys(dataclasses.replace(config, attention="dga", dga=candidate), length)
  return mean_keys(dataclasses.replace(config, attention="dense"), length)


def _seconds(candidate: HeadSetting, config: ModelConfig, length: int) -> float:
  """The median time of attention of one layer over one sequence of random vectors."""
  kind = attention_kind(candidate)

  @jax.jit
  def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return kind.attend(q, k, v, kind.prepare(find_documents(1, length, None, None)))

  heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
  qkv = [
    jax.random.normal(key, (1, length, count, config.head_dim), jnp.dtype(config.dtype))
    for key, count in zip(jax.random.split(jax.random.key(0), 3), heads, strict=True)
  ]
  attend(*qkv).block_until_ready()
  times = []
  for _ in range(_TIMED_CALLS):
    begin = time.perf_counter()
    attend(*qkv).block_until_ready()
    times.append(time.perf_counter() - begin)
  return float(np.median(times))

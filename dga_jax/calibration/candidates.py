"""The settings that a KV head may follow: their names and costs."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dga_jax.attention.segments import find_documents
from dga_jax.cache.layout import score_bytes
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, HeadBudgets, HeadSetting, SinkWindow
from dga_jax.model import ModelConfig
from dga_jax.model.attention_kinds.head_budgets import kind_of_setting
from dga_jax.model.flops import mean_keys, setting_keys

Objective = Literal["bytes", "flops", "latency"]
_TIMED_LAYERS, _TIMED_CALLS = 8, 20


def make_grid(
  blocks: Sequence[tuple[int, int]],
  windows: Sequence[int],
  sinks: int,
  length: int,
  *,
  sliding_windows: Sequence[int] = (),
  has_selector: bool = False,
) -> tuple[HeadSetting, ...]:
  """The candidates: "full", streaming selection, and sinks with a sliding window.

  Args:
    blocks: pairs (m, f): tokens that are merged and tokens that stay focal in each block.
    windows: raw tokens before a query's own block; each is rounded to whole blocks.
    sinks: first tokens that stay focal.
    length: L, tokens of the calibrated context.
    sliding_windows: tokens of further sliding windows, each less than L − sinks.
    has_selector: whether the model has a fitted selector, which then chooses in every config.

  Returns:
    "full" first. Then, from the largest cache to the smallest, a `DGAConfig` for each pair of a
    block and a window, and before those of a size the `SinkWindow` of this size; and a
    `SinkWindow` of each further size.

  Raises:
    ValueError: a candidate's cache does not have fewer entries than a full head's.
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
  windows_alone = {SinkWindow(setting_keys(config, length) - sinks, sinks) for config in configs}
  windows_alone |= {SinkWindow(window, sinks) for window in sliding_windows}
  added: list[DGAConfig | SinkWindow] = [*configs, *windows_alone]
  for one in added:
    if setting_keys(one, length) >= length:
      raise ValueError(
        f"the candidate {label(one)!r} keeps {setting_keys(one, length)} cache entries of {length}"
        " tokens, no fewer than a full head: lower --windows and --sliding_windows, or raise"
        " --length."
      )
  ordered = sorted(
    configs | windows_alone,
    key=lambda one: (-setting_keys(one, length), isinstance(one, DGAConfig), repr(one)),
  )
  return (FULL, *ordered)


def label(setting: HeadSetting) -> str:
  """A short name, such as "30+2, 4 sinks, 16 raw blocks" or "4 sinks, window of 124"."""
  if isinstance(setting, DGAConfig):
    return (
      f"{setting.group_size}+{setting.focal_in_block}, {setting.sink_tokens} sinks,"
      f" {setting.local_window} raw blocks"
      + (", fitted selector" if setting.selector == "fitted" else "")
    )
  if isinstance(setting, SinkWindow):
    return f"{setting.sinks} sinks, window of {setting.window}"
  return FULL


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
      entry * setting_keys(one, length) + (score_bytes(one) if isinstance(one, DGAConfig) else 0)
      for one in candidates
    ]
  elif objective == "flops":
    queries = length * config.num_heads // config.num_kv_heads
    costs = [
      4 * config.head_dim * queries * _mean_keys(candidate, config, length)
      for candidate in candidates
    ]
  else:
    costs = [seconds / config.num_kv_heads for seconds in _seconds(candidates, config, length)]
  return np.array(costs, np.float64)


def _mean_keys(setting: HeadSetting, config: ModelConfig, length: int) -> float:
  budgets = HeadBudgets((setting,), ((0,) * config.num_kv_heads,) * config.num_layers)
  config = dataclasses.replace(config, attention="head_budgets", head_budgets=budgets)
  return mean_keys(config, length)


def _seconds(candidates: Sequence[HeadSetting], config: ModelConfig, length: int) -> list[float]:
  """The time of attention of one layer over one sequence of random vectors, for each candidate.

  One program runs several layers, as in a model, so that its launch hardly counts. The time is that
  of the fastest call: other work on the device only adds to it.
  """
  heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
  *vector_keys, score_key = jax.random.split(jax.random.key(0), 4)
  qkv = [
    jax.random.normal(key, (_TIMED_LAYERS, 1, length, count, config.head_dim), config.dtype)
    for key, count in zip(vector_keys, heads, strict=True)
  ]
  scores = jax.random.normal(score_key, (_TIMED_LAYERS, 1, length, config.num_kv_heads))

  def compile_one(candidate: HeadSetting) -> Any:
    kind = kind_of_setting(candidate)

    @jax.jit
    def attend(qkv: list[jax.Array], scores: jax.Array) -> jax.Array:
      metadata = kind.prepare(find_documents(1, length, None, None))

      def attend_layer(layer: tuple[list[jax.Array], jax.Array]) -> jax.Array:
        (q, k, v), focal_scores = layer
        return kind.attend(q, k, v, metadata, **kind.focal_options(focal_scores))

      return jax.lax.map(attend_layer, (qkv, scores))

    return attend.lower(qkv, scores).compile()

  with concurrent.futures.ThreadPoolExecutor() as pool:
    programs = list(pool.map(compile_one, candidates))
  fastest = []
  for program in programs:
    times = []
    for _ in range(_TIMED_CALLS):
      begin = time.perf_counter()
      program(qkv, scores).block_until_ready()
      times.append(time.perf_counter() - begin)
    fastest.append(min(times) / _TIMED_LAYERS)
  return fastest

"""The variants that benchmarks/quality.py compares; names up to the first comma are methods."""

from collections.abc import Iterator
from typing import Any

from dga_jax.cache import cache_size
from dga_jax.config import DGAConfig
from dga_jax.evaluation.variants import Variant

SHARES = (0.125, 0.25, 0.5)
SINKS = 4
RAW_TOKENS = 288  # of the local window, 16 blocks of m = 16
_DENSE_PROMPT = {"dense_prompt": True}
_BASELINES: dict[str, dict[str, Any]] = {
  "sliding window": {"attention": "sliding_window"},
  "StreamingLLM": {"attention": "streaming_llm"},
  "LM-Infinite": {"attention": "lm_infinite"},
  "top-k eviction": {"attention": "top_k_eviction"},
  "KV merging": {"attention": "kv_merger"},
  # As published: the prompt costs what dense attention costs, and all of it votes.
  "top-k eviction after a dense prompt": {
    "attention": "top_k_eviction", "top_k_eviction": _DENSE_PROMPT,
  },
  "KV merging after a dense prompt": {"attention": "kv_merger", "kv_merger": _DENSE_PROMPT},
}  # fmt: skip


def core(length: int) -> Iterator[Variant]:
  """Dense attention, and every method at a quarter of the keys."""
  yield Variant("dense", {"attention": "dense"})
  yield from _baselines(0.25)
  yield Variant("MInference, 25 % attended", {"attention": "minference"}, 0.25)
  yield from _streaming(length, 0.25)
  yield dga_global(16, 0.1)


def shares(length: int) -> Iterator[Variant]:
  """The other points of the lines against the share of keys."""
  for share in SHARES:
    if share != 0.25:
      yield from _baselines(share)
      yield from _streaming(length, share)


def papers(length: int) -> Iterator[Variant]:
  """Every baseline at its paper's setting."""
  del length
  for name, overrides in (_BASELINES | {"MInference": {"attention": "minference"}}).items():
    yield Variant(f"{name}, paper", overrides)


def grid(length: int) -> Iterator[Variant]:
  """DGA at m = 4, 8, 16 and γ = 0.1, 0.2, streaming and global."""
  del length
  for m in (4, 8, 16):
    for rate in (0.1, 0.2):
      # At m = 4 both rates keep one focal token of a block.
      if (m, rate) != (4, 0.2):
        yield dga_streaming(m, rate)
      if (m, rate) != (16, 0.1):
        yield dga_global(m, rate)


def switches(length: int) -> Iterator[Variant]:
  """m = 16, γ = 0.1 with one switch turned."""
  del length
  yield dga_streaming(16, 0.1, raw=0)
  yield dga_streaming(16, 0.1, raw=72)
  yield dga_streaming(16, 0.1, sinks=0)
  yield dga_streaming(16, 0.1, raw=0, sinks=0)
  yield dga_streaming(16, 0.1, bias="log_size")
  yield dga_streaming(16, 0.1, raw=0, bias="log_size")
  yield dga_streaming(16, 0.1, scale="none")
  yield dga_global(16, 0.1, bias="log_size")
  yield dga_global(16, 0.1, sinks=0)


def long(length: int) -> Iterator[Variant]:
  """A few methods beyond the model's context."""
  yield Variant("dense", {"attention": "dense"})
  yield from (one for one in _baselines(0.25) if "sliding" not in one.name)
  yield from _streaming(length, 0.25)
  yield dga_global(16, 0.1)


def dga_streaming(
  m: int, rate: float, *, raw: int = RAW_TOKENS, sinks: int = SINKS, **switches: str
) -> Variant:
  """Streaming selection with about `raw` raw tokens before the query's own block."""
  config = DGAConfig(
    selection="streaming", group_size=m, importance_rate=rate, sink_tokens=sinks,
    local_window=round(raw / DGAConfig(group_size=m, importance_rate=rate).block_size),
    **_switches(switches),
  )  # fmt: skip
  name = f"DGA streaming, m={m} γ={rate} raw={raw}" + _suffix(sinks, switches)
  return Variant(name, {"attention": "dga", "dga": _changed(config)})


def dga_global(m: int, rate: float, *, sinks: int = SINKS, **switches: str) -> Variant:
  """Global selection without a floor on focal tokens."""
  config = DGAConfig(
    group_size=m, importance_rate=rate, min_focal_tokens=0, sink_tokens=sinks, **_switches(switches)
  )
  name = f"DGA global, m={m} γ={rate}" + _suffix(sinks, switches)
  return Variant(name, {"attention": "dga", "dga": _changed(config)})


def at_share(length: int, share: float, m: int, focal: int) -> DGAConfig | None:
  """Streaming with a local window that fills `share` of the keys; None if summaries alone do."""
  config = DGAConfig(
    selection="streaming", group_size=m, focal_per_block=focal, sink_tokens=SINKS, local_window=0
  )
  free = round(share * length) - cache_size(config=config, max_length=length).total
  if free < 0:
    return None
  window = free // config.block_size
  return DGAConfig(
    selection="streaming", group_size=m, focal_per_block=focal, sink_tokens=SINKS,
    local_window=window,
  )  # fmt: skip


def _baselines(share: float) -> Iterator[Variant]:
  for name, overrides in _BASELINES.items():
    yield Variant(f"{name}, {share:.3g}", overrides, share)


def _streaming(length: int, share: float) -> Iterator[Variant]:
  """DGA with as long a raw window as the share leaves room for."""
  for m, focal in ((16, 1), (16, 2), (30, 2), (62, 2), (126, 2), (16, 6)):
    config = at_share(length, share, m, focal)
    if config is not None:
      name = f"DGA {m}+{focal} and window, {share:.3g}"
      yield Variant(name, {"attention": "dga", "dga": _changed(config)})


def _switches(switches: dict[str, str]) -> dict[str, Any]:
  names = {"bias": "group_logit_bias", "scale": "aggregation_scale"}
  return {names[name]: value for name, value in switches.items()}


def _suffix(sinks: int, switches: dict[str, str]) -> str:
  named = "".join(f" {name}={value}" for name, value in switches.items())
  return ("" if sinks == SINKS else f" sinks={sinks}") + named


def _changed(config: DGAConfig) -> dict[str, Any]:
  """The fields that differ from the defaults."""
  default = DGAConfig()
  return {name: value for name, value in vars(config).items() if value != getattr(default, name)}

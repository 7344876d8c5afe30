"""The variants that benchmarks/quality.py compares.

The part of a variant's name before the first comma is the method. Plots draw one line per method.
"""

from collections.abc import Iterator
from typing import Any

from dga_jax.cache import cache_size
from dga_jax.config import DGAConfig
from dga_jax.evaluation.variants import Variant

SHARES = (0.125, 0.25, 0.5)  # Cache sizes, as a share of all keys.
SINKS = 4
RAW_TOKENS = 288  # Tokens of the local window: 16 blocks of 16 + 2 tokens.
_DENSE_PROMPT = {"dense_prompt": True}
_BASELINES: dict[str, dict[str, Any]] = {
  "sliding window": {"attention": "sliding_window"},
  "StreamingLLM": {"attention": "streaming_llm"},
  "LM-Infinite": {"attention": "lm_infinite"},
  "top-k eviction": {"attention": "top_k_eviction"},
  "KV merging": {"attention": "kv_merger"},
  # The published methods: dense attention over the prompt, whose queries all score the keys.
  "top-k eviction after a dense prompt": {
    "attention": "top_k_eviction", "top_k_eviction": _DENSE_PROMPT,
  },
  "KV merging after a dense prompt": {"attention": "kv_merger", "kv_merger": _DENSE_PROMPT},
  "SnapKV": {"attention": "snapkv"},
  "expected attention": {"attention": "expected_attention"},
  # These store all keys; the share is of the keys that a decoding step reads.
  "Quest": {"attention": "quest"},
  "ClusterKV": {"attention": "clusterkv"},
  "PQCache": {"attention": "pqcache"},
}  # fmt: skip


def core(length: int) -> Iterator[Variant]:
  """Dense attention, and each method at a quarter of the keys."""
  yield Variant("dense", {"attention": "dense"})
  yield from _baselines(0.25)
  yield Variant("MInference, 25 % attended", {"attention": "minference"}, 0.25)
  yield from _streaming(length, 0.25)
  yield dga_global(16, 0.1)


def other_shares(length: int) -> Iterator[Variant]:
  """Each method at the shares of SHARES other than a quarter."""
  for share in SHARES:
    if share != 0.25:
      yield from _baselines(share)
      yield from _streaming(length, share)


def paper_settings(length: int) -> Iterator[Variant]:
  """Each baseline with the settings of its paper."""
  del length
  for name, overrides in (_BASELINES | {"MInference": {"attention": "minference"}}).items():
    yield Variant(f"{name}, paper", overrides)


def grid(length: int) -> Iterator[Variant]:
  """DGA at m = 4, 8, 16 and γ = 0.1, 0.2, streaming and global."""
  del length
  for m in (4, 8, 16):
    for rate in (0.1, 0.2):
      # At m = 4 both rates keep one focal token per block.
      if (m, rate) != (4, 0.2):
        yield dga_streaming(m, rate)
      if (m, rate) != (16, 0.1):
        yield dga_global(m, rate)


def switches(length: int) -> Iterator[Variant]:
  """DGA at m = 16, γ = 0.1 with one or two settings changed."""
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


def long_context(length: int) -> Iterator[Variant]:
  """The variants for sequences beyond the context that the model was trained on."""
  yield Variant("dense", {"attention": "dense"})
  yield from (variant for variant in _baselines(0.25) if "sliding" not in variant.name)
  yield from _streaming(length, 0.25)
  yield dga_global(16, 0.1)


def dga_streaming(
  m: int, rate: float, *, raw: int = RAW_TOKENS, sinks: int = SINKS, **switches: str
) -> Variant:
  """Streaming selection with a local window of about `raw` tokens before the query's block."""
  config = DGAConfig(
    selection="streaming", group_size=m, importance_rate=rate, sink_tokens=sinks,
    local_window=round(raw / DGAConfig(group_size=m, importance_rate=rate).block_size),
    **_switches(switches),
  )  # fmt: skip
  name = f"DGA streaming, m={m} γ={rate} raw={raw}" + _suffix(sinks, switches)
  return Variant(name, {"attention": "dga", "dga": _non_default_fields(config)})


def dga_global(m: int, rate: float, *, sinks: int = SINKS, **switches: str) -> Variant:
  """Global selection with min_focal_tokens = 0."""
  config = DGAConfig(
    group_size=m, importance_rate=rate, min_focal_tokens=0, sink_tokens=sinks, **_switches(switches)
  )
  name = f"DGA global, m={m} γ={rate}" + _suffix(sinks, switches)
  return Variant(name, {"attention": "dga", "dga": _non_default_fields(config)})


def config_at_share(length: int, share: float, m: int, focal: int) -> DGAConfig | None:
  """Streaming selection with the longest local window whose cache is `share` of the keys.

  Args:
    length: tokens of the sequence.
    share: size of the cache, as a share of `length`.
    m: group size.
    focal: focal tokens per block.

  Returns:
    None if the cache exceeds the share even without a local window.
  """
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
  """DGA at several block sizes, with the longest local window that the share allows."""
  for m, focal in ((16, 1), (16, 2), (30, 2), (62, 2), (126, 2), (16, 6)):
    config = config_at_share(length, share, m, focal)
    if config is not None:
      name = f"DGA {m}+{focal} and window, {share:.3g}"
      yield Variant(name, {"attention": "dga", "dga": _non_default_fields(config)})


def _switches(switches: dict[str, str]) -> dict[str, Any]:
  names = {"bias": "group_logit_bias", "scale": "aggregation_scale"}
  return {names[name]: value for name, value in switches.items()}


def _suffix(sinks: int, switches: dict[str, str]) -> str:
  text = "".join(f" {name}={value}" for name, value in switches.items())
  return ("" if sinks == SINKS else f" sinks={sinks}") + text


def _non_default_fields(config: DGAConfig) -> dict[str, Any]:
  """The fields of the config that differ from the defaults."""
  default = DGAConfig()
  return {name: value for name, value in vars(config).items() if value != getattr(default, name)}

"""Configuration of Dynamic Group Attention: one frozen dataclass, checked when it is made."""

import dataclasses
from fractions import Fraction
from typing import Literal

import numpy as np

from dga_jax.config_dataclasses import (
  config_error,
  LARGEST_SEED,
  require_choice,
  require_int,
  require_number,
  require_type,
)

__all__ = ["RETROFIT", "DGAConfig"]

Selection = Literal["global", "streaming", "random"]
Visibility = Literal["inclusive", "exclusive"]
AggregationScale = Literal["head_dim", "none"]
GroupLogitBias = Literal["none", "log_size"]
CacheDtype = Literal["int8", "float8_e4m3fn"]


@dataclasses.dataclass(frozen=True)
class DGAConfig:
  """Every switch of Dynamic Group Attention (Zhang et al., ICML 2025, arXiv 2505.22107).

  Attributes:
    group_size: m, how many non-focal tokens are merged into one group.
    importance_rate: γ, the share of tokens that stay focal, in [0, 1].
    min_focal_tokens: floor on the number of focal tokens (global and random selection).
    selection: "global", the paper's, ranks all keys by sampled queries; "streaming" lets the last
      query of each block choose within its block, which is causal and equals decoding; "random"
      draws the focal tokens (Table 5 of the paper).
    visibility: whether a group is seen by the query at its own last position ("inclusive", the
      paper's) or only by later ones ("exclusive"). Streaming is always exclusive.
    aggregation_scale: scale of the merge logits, "head_dim" for 1/√D or "none" for 1.
    complementary: whether a query sees the raw tokens of its unfinished group (Table 7).
    group_logit_bias: "log_size" adds log m to the logits of groups.
    n_recent: how many of the last queries rank the keys (global selection).
    n_random: how many earlier queries, drawn without replacement, rank them too.
    seed: of that draw, and of random selection.
    sink_tokens: the first tokens of a document, always focal.
    local_window: blocks before a query's own which it sees raw (streaming).
    focal_per_block: f, focal tokens kept of each streaming or decoding block; None for
      max(1, round(γ·m)).
    cache_dtype: how the compact cache stores entries while decoding; None as the model computes
      them. Eight bits halve the cache of a 16-bit model, at the price of rounding: each entry of
      each head has a scale of its own.
    max_documents: bound on the documents packed in a row. Needed under jit with segment_ids,
      except for streaming selection without sinks; None counts concrete segment_ids.
  """

  group_size: int = 16
  importance_rate: float = 0.1
  min_focal_tokens: int = 1024
  selection: Selection = "global"
  visibility: Visibility = "inclusive"
  aggregation_scale: AggregationScale = "head_dim"
  complementary: bool = True
  group_logit_bias: GroupLogitBias = "none"
  n_recent: int = 32
  n_random: int = 32
  seed: int = 0
  sink_tokens: int = 0
  local_window: int = 0
  focal_per_block: int | None = None
  cache_dtype: CacheDtype | None = None
  max_documents: int | None = None

  def __post_init__(self) -> None:
    require_choice(self, "selection", Selection)
    require_choice(self, "visibility", Visibility)
    require_choice(self, "aggregation_scale", AggregationScale)
    require_choice(self, "group_logit_bias", GroupLogitBias)
    require_choice(self, "cache_dtype", CacheDtype, optional=True)
    require_int(self, "group_size", least=1)
    require_int(
      self, "min_focal_tokens", "n_recent", "n_random", "sink_tokens", "local_window", least=0
    )
    require_int(self, "seed", least=0, most=LARGEST_SEED)
    require_int(self, "focal_per_block", "max_documents", least=1, optional=True)
    require_number(self, "importance_rate", least=0, most=1)
    require_type(self, "complementary", bool)
    if self.n_recent + self.n_random == 0:
      raise ValueError("DGAConfig.n_recent + n_random is 0; it must be at least 1.")
    if self.selection == "streaming" and not self.complementary:
      raise config_error(
        self,
        "complementary",
        "True with selection='streaming', where a query sees its own block by its raw tokens alone",
      )
    if self.selection != "streaming" and self.local_window:
      raise config_error(
        self, "local_window", f"0 with selection={self.selection!r}; use selection='streaming'"
      )

  @property
  def focal_in_block(self) -> int:
    """f: focal tokens that a streaming or decoding block of m + f tokens keeps."""
    if self.focal_per_block is not None:
      return self.focal_per_block
    return max(1, round(self.importance_rate * self.group_size))

  @property
  def block_size(self) -> int:
    """m' = m + f: tokens in a streaming block, and in the decoding buffer."""
    return self.group_size + self.focal_in_block

  def focal_at_rate(self, lengths: np.ndarray) -> np.ndarray:
    """⌈γℓ⌉, with γ read as the decimal that was written: 0.1 · 30 rounds up to 3, not to 4."""
    rate = Fraction(str(float(self.importance_rate)))
    fits = rate.numerator * int(lengths.max()) < 2**62
    wide = lengths.astype(np.int64 if fits else object)
    return (-((-wide * rate.numerator) // rate.denominator)).astype(np.int64)

  def focal_quota(self, length: int) -> np.ndarray:
    """r for every document length 0..length under global and random selection.

    r₀ = min(ℓ, max(⌈γℓ⌉, min_focal_tokens, sink_tokens)) and r = r₀ + ((ℓ − r₀) mod m): what
    is left after whole groups joins the focal tokens.

    Args:
      length: the longest document.

    Returns:
      int32 [length + 1].
    """
    lengths = np.arange(length + 1)
    floor = max(self.min_focal_tokens, self.sink_tokens)
    r0 = np.minimum(lengths, np.maximum(self.focal_at_rate(lengths), floor))
    return (r0 + (lengths - r0) % self.group_size).astype(np.int32)


# What to begin with for a model that was pretrained with dense attention: causal, so that decoding
# computes what prefill does; the first tokens are sinks, the last 38 blocks (1216 tokens) raw. Of
# the settings that keep a quarter of 8192 keys it loses least on SmolLM2 (benchmarks/quality.py).
RETROFIT = DGAConfig(
  group_size=30, focal_per_block=2, selection="streaming", sink_tokens=4, local_window=38
)

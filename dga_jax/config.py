"""Configuration of Dynamic Group Attention: one frozen dataclass, validated on construction."""

import dataclasses
from fractions import Fraction
from typing import Literal

import numpy as np

from dga_jax.choices import CacheDtypeName
from dga_jax.config_dataclasses import (
  config_error,
  LARGEST_SEED,
  require_choice,
  require_int,
  require_number,
  require_type,
)

__all__ = ["RETROFIT", "DGAConfig", "retrofit"]

Selection = Literal["global", "streaming", "random"]
Visibility = Literal["inclusive", "exclusive"]
AggregationScale = Literal["head_dim", "none"]
GroupLogitBias = Literal["none", "log_size"]
Selector = Literal["last_query", "fitted"]


@dataclasses.dataclass(frozen=True)
class DGAConfig:
  """Settings of Dynamic Group Attention (Zhang et al., ICML 2025, arXiv 2505.22107).

  Attributes:
    group_size: m, the non-focal tokens that are merged into one group.
    importance_rate: γ, the share of tokens that stay focal, in [0, 1].
    min_focal_tokens: lower bound on the number of focal tokens (global and random selection).
    selection: how focal tokens are chosen. "global" (the paper's) ranks all keys of a document by
      the attention of sampled queries; later queries decide for earlier ones. "streaming" lets the
      last query of each block choose within the block; it is causal, and decoding computes the
      same function. "random" draws the focal tokens (Table 5 of the paper).
    selector: which tokens of a streaming or decoding block stay focal: those that the block's last
      query attends to most ("last_query"), or those with the highest focal scores ("fitted"). The
      scores are an argument of the op and of the cache functions; a decoder with
      `ModelConfig.focal_selector` computes them. "fitted" requires streaming selection.
    causal: whether a query sees no later token. False is for encoders: a query sees all focal
      tokens of its document, the raw members of its own group (the group whose span contains the
      query) and all other groups merged. The tokens of an incomplete streaming block are focal.
      False supports no cache, no decoder and no context parallelism.
    visibility: whether the query at a group's last position sees the group ("inclusive", the
      paper's) or only later queries do ("exclusive"). Streaming selection is always exclusive.
    aggregation_scale: scale of the merge logits: "head_dim" for 1/√D, "none" for 1.
    complementary: whether a query sees the raw tokens of its unfinished group (Table 7).
    group_logit_bias: "log_size" adds log m to the attention logits of groups.
    n_recent: the number of most recent queries that rank the keys (global selection).
    n_random: the number of earlier queries, drawn without replacement, that also rank them.
    seed: seeds the draw of ranking queries, and random selection.
    sink_tokens: the first tokens of each document, which are always focal.
    local_window: w, the blocks before a query's own block that the query sees raw (streaming). With
      causal=False, the w groups on both sides of its own group.
    focal_per_block: f, the focal tokens of each streaming or decoding block; None for
      max(1, round(γ·m)).
    cache_dtype: the dtype in which the compact cache stores its entries; None for the dtype that
      the model computes in. 8 bits halve the cache of a 16-bit model and round each entry, which
      has one scale per head.
    max_documents: upper bound on the documents packed in a row. Required with segment_ids that
      are traced (under jit), except for streaming selection without sinks. None counts the
      documents of concrete segment_ids.

  Raises:
    ValueError: names the field, its value and the values it takes.
  """

  group_size: int = 16
  importance_rate: float = 0.1
  min_focal_tokens: int = 1024
  selection: Selection = "global"
  selector: Selector = "last_query"
  causal: bool = True
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
  cache_dtype: CacheDtypeName | None = None
  max_documents: int | None = None

  def __post_init__(self) -> None:
    require_choice(self, "selection", Selection)
    require_choice(self, "selector", Selector)
    require_choice(self, "visibility", Visibility)
    require_choice(self, "aggregation_scale", AggregationScale)
    require_choice(self, "group_logit_bias", GroupLogitBias)
    require_choice(self, "cache_dtype", CacheDtypeName, optional=True)
    require_int(self, "group_size", least=1)
    require_int(
      self, "min_focal_tokens", "n_recent", "n_random", "sink_tokens", "local_window", least=0
    )
    require_int(self, "seed", least=0, most=LARGEST_SEED)
    require_int(self, "focal_per_block", "max_documents", least=1, optional=True)
    require_number(self, "importance_rate", least=0, most=1)
    require_type(self, "causal", bool)
    require_type(self, "complementary", bool)
    if not self.causal and self.visibility != "inclusive":
      raise config_error(
        self, "visibility", "'inclusive' with causal=False, where every query sees later groups"
      )
    if not self.causal and self.cache_dtype is not None:
      raise config_error(self, "cache_dtype", "None with causal=False, which has no cache")
    if self.n_recent + self.n_random == 0:
      raise ValueError(
        "DGAConfig.n_recent + n_random is 0; it must be at least 1, so that some query ranks keys."
      )
    if self.selection == "streaming" and not self.complementary:
      raise config_error(
        self,
        "complementary",
        "True with selection='streaming', where a query sees its own block by its raw tokens alone",
      )
    if self.selection != "streaming" and self.selector != "last_query":
      raise config_error(
        self,
        "selector",
        f"'last_query' with selection={self.selection!r}, which ranks whole documents; use"
        " selection='streaming'",
      )
    if self.selection != "streaming" and self.local_window:
      raise config_error(
        self, "local_window", f"0 with selection={self.selection!r}; use selection='streaming'"
      )

  @property
  def focal_in_block(self) -> int:
    """f: focal tokens of a streaming or decoding block of m + f tokens."""
    if self.focal_per_block is not None:
      return self.focal_per_block
    return max(1, round(self.importance_rate * self.group_size))

  @property
  def block_size(self) -> int:
    """m' = m + f: tokens of a streaming block, and of the decoding buffer."""
    return self.group_size + self.focal_in_block

  def focal_at_rate(self, lengths: np.ndarray) -> np.ndarray:
    """⌈γℓ⌉ for document lengths ℓ (int array), as int64.

    γ is read as the decimal that its float prints as, so that ⌈0.1 · 30⌉ is 3: in floating point
    0.1 · 30 is slightly above 3.
    """
    rate = Fraction(str(float(self.importance_rate)))
    fits = max(rate.numerator * int(lengths.max()), rate.denominator) < 2**62
    wide = lengths.astype(np.int64 if fits else object)
    return (-((-wide * rate.numerator) // rate.denominator)).astype(np.int64)

  def focal_quota(self, length: int) -> np.ndarray:
    """r, the number of focal tokens, for every document length ℓ from 0 to `length`.

    r₀ = min(ℓ, max(⌈γℓ⌉, min_focal_tokens, sink_tokens)) and r = r₀ + ((ℓ − r₀) mod m): the
    remainder after whole groups joins the focal tokens. Global and random selection.

    Args:
      length: the longest document.

    Returns:
      int32 [length + 1], indexed by ℓ.
    """
    lengths = np.arange(length + 1)
    floor = max(self.min_focal_tokens, self.sink_tokens)
    r0 = np.minimum(lengths, np.maximum(self.focal_at_rate(lengths), floor))
    return (r0 + (lengths - r0) % self.group_size).astype(np.int32)


# One setting for all heads of a model that was pretrained with dense attention and has no
# calibrated budgets (dga_jax.pretrained). Streaming selection decodes with the function that
# prefill computes. The first 4 tokens are sinks and the last 38 blocks (1216 tokens) stay raw. Of
# the settings that keep a quarter of 8192 keys, these lose least on SmolLM2
# (benchmarks/quality.py).
RETROFIT = DGAConfig(
  group_size=30, focal_per_block=2, selection="streaming", sink_tokens=4, local_window=38
)


def retrofit(*, has_selector: bool) -> DGAConfig:
  """`RETROFIT`, with the fitted selector for a model that has its weights."""
  return dataclasses.replace(RETROFIT, selector="fitted" if has_selector else "last_query")

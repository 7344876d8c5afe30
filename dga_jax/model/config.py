"""Configuration of the decoder: a frozen dataclass, validated, convertible to and from dicts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from dga_jax.choices import AttentionName, DtypeName, RematName
from dga_jax.config import DGAConfig
from dga_jax.config_dataclasses import (
  config_error,
  from_dict,
  require_choice,
  require_int,
  require_number,
  require_type,
)
from dga_jax.head_budgets import HeadBudgets
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.model.attention_kinds.clusterkv import ClusterKVConfig
from dga_jax.model.attention_kinds.expected_attention import ExpectedAttentionConfig
from dga_jax.model.attention_kinds.kv_merger import KVMergerConfig
from dga_jax.model.attention_kinds.lm_infinite import LMInfiniteConfig
from dga_jax.model.attention_kinds.minference import MInferenceConfig
from dga_jax.model.attention_kinds.pqcache import PQCacheConfig
from dga_jax.model.attention_kinds.quest import QuestConfig
from dga_jax.model.attention_kinds.registry import ATTENTION_SETTINGS, make_kind
from dga_jax.model.attention_kinds.sliding_window import SlidingWindowConfig
from dga_jax.model.attention_kinds.snapkv import SnapKVConfig
from dga_jax.model.attention_kinds.streaming_llm import StreamingLLMConfig
from dga_jax.model.attention_kinds.top_k_eviction import TopKEvictionConfig
from dga_jax.model.rope import inverse_frequencies, RopeScaling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A LLaMA-family decoder.

  Attributes:
    vocab_size: V, rows of the embedding table.
    num_layers: decoder layers.
    embed_dim: E, width of the residual stream.
    num_heads: H, query heads.
    num_kv_heads: N, key and value heads; H must be a multiple of N.
    head_dim: D, width of one head; even, since RoPE rotates pairs of channels.
    mlp_dim: F, inner width of SwiGLU.
    rope_base: base of the rotary wavelengths.
    rope_scaling: scaling of the rotary frequencies; None for none.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: whether the embedding table is also the unembedding.
    qkv_bias: whether the query, key and value projections add a bias (Qwen 2.5).
    qk_norm: whether an RMSNorm over each head's channels follows the query and key projections,
      before RoPE (Qwen 3).
    focal_selector: whether each layer has the weights of the fitted selector, which the attention
      settings with selector="fitted" need (dga_jax/model/focal_selector.py). The weights of a new
      model are 0, under which the first tokens of a block stay focal; `dga fit_selector` fits them.
    head_gates: whether every KV head has a gate that mixes dense attention into the output of
      `attention` (dga_jax/model/head_gates.py), for training that chooses full heads. Such a model
      has no cache. The gates of a new model are 0.
    attention: the attention kind. Every kind but "dense" has settings in the field of its name;
      the other kinds' settings are ignored.
    dga: settings of Dynamic Group Attention.
    head_budgets: the setting of each KV head of each layer: "full", one of Dynamic Group
      Attention, or sinks and a window; required for attention="head_budgets".
    sliding_window: settings of sliding-window attention.
    streaming_llm: settings of attention sinks and a window.
    lm_infinite: settings of global tokens and a window, with a bound on distances.
    minference: settings of the sparse prefill with a dense cache.
    top_k_eviction: settings of heavy hitters and recent tokens.
    kv_merger: settings of merging adjacent similar keys.
    snapkv: settings of keeping the tokens of a prompt for which its last queries vote.
    quest: settings of reading the pages with the highest bounds.
    expected_attention: settings of keeping the tokens that future queries are expected to read.
    clusterkv: settings of reading clusters of similar keys.
    pqcache: settings of reading the tokens that product-quantised keys choose.
    dtype: of activations, and of weights while they are used.
    param_dtype: of the stored (master) weights.
    remat: what the backward pass recomputes in each layer: "none"; "full", everything from the
      layer's input; "dots", everything but the outputs of products with weights.
    unroll_layers: whether a program has code of its own for each layer, in place of a loop over
      stacked arrays. A training step then copies nothing to and from the stacks of values that the
      backward pass reads, and takes longer to compile.

  Raises:
    ValueError: names the field, its value and the values it takes.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  rope_base: float = 10000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  tie_embeddings: bool = False
  qkv_bias: bool = False
  qk_norm: bool = False
  focal_selector: bool = False
  head_gates: bool = False
  attention: AttentionName = "dga"
  dga: DGAConfig = dataclasses.field(default_factory=DGAConfig)
  head_budgets: HeadBudgets | None = None
  sliding_window: SlidingWindowConfig = dataclasses.field(default_factory=SlidingWindowConfig)
  streaming_llm: StreamingLLMConfig = dataclasses.field(default_factory=StreamingLLMConfig)
  lm_infinite: LMInfiniteConfig = dataclasses.field(default_factory=LMInfiniteConfig)
  minference: MInferenceConfig = dataclasses.field(default_factory=MInferenceConfig)
  top_k_eviction: TopKEvictionConfig = dataclasses.field(default_factory=TopKEvictionConfig)
  kv_merger: KVMergerConfig = dataclasses.field(default_factory=KVMergerConfig)
  snapkv: SnapKVConfig = dataclasses.field(default_factory=SnapKVConfig)
  quest: QuestConfig = dataclasses.field(default_factory=QuestConfig)
  expected_attention: ExpectedAttentionConfig = dataclasses.field(
    default_factory=ExpectedAttentionConfig
  )
  clusterkv: ClusterKVConfig = dataclasses.field(default_factory=ClusterKVConfig)
  pqcache: PQCacheConfig = dataclasses.field(default_factory=PQCacheConfig)
  dtype: DtypeName = "bfloat16"
  param_dtype: DtypeName = "float32"
  remat: RematName = "none"
  unroll_layers: bool = False

  def __post_init__(self) -> None:
    require_int(
      self,
      "vocab_size",
      "num_layers",
      "embed_dim",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "mlp_dim",
      least=1,
      most=2**31 - 1,  # JAX's array sizes.
    )
    if self.num_heads % self.num_kv_heads:
      raise config_error(self, "num_heads", f"a multiple of num_kv_heads={self.num_kv_heads}")
    if self.head_dim % 2:
      raise config_error(self, "head_dim", "even, since RoPE rotates pairs of channels")
    require_number(self, "rope_base", "norm_eps", above=0)
    require_type(self, "rope_scaling", RopeScaling, type(None))
    for name in (
      "tie_embeddings",
      "qkv_bias",
      "qk_norm",
      "focal_selector",
      "head_gates",
      "unroll_layers",
    ):
      require_type(self, name, bool)
    for name, settings in ATTENTION_SETTINGS.items():
      require_type(self, name, settings, *((type(None),) if name == "head_budgets" else ()))
    require_choice(self, "attention", AttentionName)
    if not self.dga.causal:
      raise ValueError(
        "ModelConfig.dga has causal=False; it must have causal=True, since the decoder predicts the"
        " next token. Encoders call dynamic_group_attention, or use dga_jax.flax.attention_fn."
      )
    self._check_head_budgets()
    self._check_focal_selector()
    if self.head_gates and self.attention == "dense":
      raise config_error(
        self,
        "head_gates",
        "False with attention='dense', which the gates mix into another kind; load the model that"
        " the gates were trained for (config.init_from)",
      )
    require_choice(self, "remat", RematName)
    require_choice(self, "dtype", DtypeName)
    require_choice(self, "param_dtype", DtypeName)

  def _check_head_budgets(self) -> None:
    budgets = self.head_budgets
    if budgets is None:
      if self.attention == "head_budgets":
        raise config_error(self, "head_budgets", "HeadBudgets with attention='head_budgets'")
    elif (budgets.num_layers, budgets.num_kv_heads) != (self.num_layers, self.num_kv_heads):
      raise ValueError(
        f"ModelConfig.head_budgets has {budgets.num_layers} layers of {budgets.num_kv_heads} KV "
        f"heads; it must have num_layers={self.num_layers} layers of "
        f"num_kv_heads={self.num_kv_heads}. Use budgets that were made for this model, or None."
      )

  def _check_focal_selector(self) -> None:
    if self.focal_selector or self.attention not in ("dga", "head_budgets"):
      return
    if self.make_attention().takes_focal_scores:
      raise ValueError(
        f"ModelConfig.focal_selector is False, and the settings of attention={self.attention!r} "
        "have selector='fitted'; the model must have the weights of a selector. Make them with dga "
        "fit_selector and set focal_selector=True, or set selector='last_query'."
      )

  def rope_frequencies(self) -> np.ndarray:
    """Angles per position ω [D/2] of RoPE; see `inverse_frequencies`."""
    return inverse_frequencies(self.head_dim, base=self.rope_base, scaling=self.rope_scaling)

  def make_attention(self) -> AttentionKind:
    """The attention kind that `attention` names, with the settings of its field."""
    settings = getattr(self, self.attention, None)
    return make_kind(self.attention, settings, self.rope_frequencies())

  def to_dict(self) -> dict[str, Any]:
    """This config as nested plain dicts that JSON can store."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> Self:
    """The inverse of `to_dict`; absent keys take their defaults.

    Args:
      values: field names to values; `rope_scaling` and the settings of attention kinds may be
        mappings themselves.

    Raises:
      ValueError: an unknown key, with the closest known one; a missing key; or a wrong value.
    """
    return from_dict(cls, values, path="model")

"""Configuration of the decoder: frozen dataclasses, checked when made, to and from JSON dicts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from dga_jax.choices import AttentionName, DtypeName, RematName, RopeKind
from dga_jax.config import DGAConfig
from dga_jax.config_dataclasses import (
  config_error,
  from_dict,
  require_choice,
  require_int,
  require_number,
  require_type,
)
from dga_jax.model.baselines import (
  KVMergerConfig,
  LMInfiniteConfig,
  MInferenceConfig,
  SlidingWindowConfig,
  StreamingLLMConfig,
  TopKEvictionConfig,
)

# The field of ModelConfig that holds an attention kind's settings, and their class.
ATTENTION_SETTINGS: dict[str, type] = {
  "dga": DGAConfig,
  "sliding_window": SlidingWindowConfig,
  "streaming_llm": StreamingLLMConfig,
  "lm_infinite": LMInfiniteConfig,
  "minference": MInferenceConfig,
  "top_k_eviction": TopKEvictionConfig,
  "kv_merger": KVMergerConfig,
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the context that a model was trained on.

  Attributes:
    kind: "linear" divides every frequency by `factor`; "llama3" divides the low ones, keeps the
      high ones and blends between them (see rope.inverse_frequencies).
    factor: by how much the context grows, at least 1.
    low_freq_factor: wavelengths above original_max_position / low_freq_factor are stretched.
    high_freq_factor: wavelengths below original_max_position / high_freq_factor are kept.
    original_max_position: context length in tokens of the training before stretching.
  """

  kind: RopeKind
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position: int = 8192

  def __post_init__(self) -> None:
    require_choice(self, "kind", RopeKind)
    require_number(self, "factor", least=1)
    require_number(self, "low_freq_factor", above=0)
    require_number(self, "high_freq_factor", above=self.low_freq_factor)
    require_int(self, "original_max_position", least=1)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A LLaMA-family decoder.

  Attributes:
    vocab_size: V, entries of the embedding table.
    num_layers: decoder layers.
    embed_dim: E, width of the residual stream.
    num_heads: H, query heads.
    num_kv_heads: N, key and value heads; H must be a multiple of N.
    head_dim: D, width of one head; even, since RoPE rotates pairs.
    mlp_dim: F, inner width of SwiGLU.
    rope_base: base of the rotary wavelengths.
    rope_scaling: stretch of the rotary frequencies, None for none.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: whether the embedding table is the unembedding too.
    qkv_bias: whether the query, key and value projections add a bias (Qwen 2.5).
    qk_norm: whether an RMSNorm over each head's channels follows the query and key projections,
      before RoPE (Qwen 3).
    attention: attention kind. All but "dense" have settings in the field of their name, which
      the other kinds ignore.
    dga: switches of the "dga" kind.
    sliding_window: settings of the baseline of that name, like the following.
    streaming_llm: attention sinks and a window.
    lm_infinite: first tokens and a window, under a bound on distances.
    minference: sparse prefill, dense cache.
    top_k_eviction: heavy hitters and recent tokens.
    kv_merger: adjacent similar keys merged.
    dtype: of activations and of weights while they are used.
    param_dtype: of the stored (master) weights.
    remat: what the backward pass recomputes in each layer: "none" of it; "full", all from the
      layer's input; "dots", all but the outputs of products with weights.
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
  attention: AttentionName = "dga"
  dga: DGAConfig = dataclasses.field(default_factory=DGAConfig)
  sliding_window: SlidingWindowConfig = dataclasses.field(default_factory=SlidingWindowConfig)
  streaming_llm: StreamingLLMConfig = dataclasses.field(default_factory=StreamingLLMConfig)
  lm_infinite: LMInfiniteConfig = dataclasses.field(default_factory=LMInfiniteConfig)
  minference: MInferenceConfig = dataclasses.field(default_factory=MInferenceConfig)
  top_k_eviction: TopKEvictionConfig = dataclasses.field(default_factory=TopKEvictionConfig)
  kv_merger: KVMergerConfig = dataclasses.field(default_factory=KVMergerConfig)
  dtype: DtypeName = "bfloat16"
  param_dtype: DtypeName = "float32"
  remat: RematName = "none"

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
    )
    if self.num_heads % self.num_kv_heads:
      raise config_error(self, "num_heads", f"a multiple of num_kv_heads={self.num_kv_heads}")
    if self.head_dim % 2:
      raise config_error(self, "head_dim", "even, since RoPE rotates pairs of channels")
    require_number(self, "rope_base", "norm_eps", above=0)
    require_type(self, "rope_scaling", RopeScaling, type(None))
    for name in ("tie_embeddings", "qkv_bias", "qk_norm"):
      require_type(self, name, bool)
    for name, settings in ATTENTION_SETTINGS.items():
      require_type(self, name, settings)
    require_choice(self, "attention", AttentionName)
    require_choice(self, "remat", RematName)
    require_choice(self, "dtype", DtypeName)
    require_choice(self, "param_dtype", DtypeName)

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

"""The tensor of a LLaMA-family checkpoint for each parameter, and the order of its axes.

A group of letters is one axis of the file's tensor: "HD E" is the matrix [H·D, E] that a linear
layer of PyTorch stores, and "E H D" is the decoder's array [E, H, D]. In the files each layer has
tensors of its own; each fills one row of the leading axis of the decoder's stacked array.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from dga_jax.model import ModelConfig
from dga_jax.model.focal_selector import selector_features

Naming = Literal["hugging_face", "gguf"]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """One parameter of the decoder, or one layer's part of it.

  Attributes:
    path: the parameter's keys in the nested dict of parameters.
    hugging_face: the tensor's name in a Hugging Face checkpoint, "{}" for the layer's number.
    gguf: its name in a GGUF file.
    stored_axes: the axes of the file's tensor.
    axes: the axes of the decoder's array, apart from the leading one of layers.
  """

  path: tuple[str, ...]
  hugging_face: str
  gguf: str
  stored_axes: str
  axes: str

  @property
  def in_layers(self) -> bool:
    """Whether every layer has one."""
    return self.path[0] == "layers"

  def name(self, naming: Naming, layer: int | None = None) -> str:
    """The tensor's name in a file, of one layer if the parameter is stacked."""
    template = self.hugging_face if naming == "hugging_face" else self.gguf
    return template if layer is None else template.format(layer)

  def stored_shape(self, config: ModelConfig) -> tuple[int, ...]:
    """The shape of the tensor in a file."""
    sizes = axis_sizes(config)
    return tuple(math.prod(sizes[a] for a in axis) for axis in self.stored_axes.split())

  def from_stored(self, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The decoder's array of a file's tensor, as a view where numpy can make one."""
    sizes, letters = axis_sizes(config), self.stored_axes.replace(" ", "")
    apart = tensor.reshape([sizes[letter] for letter in letters])
    return apart.transpose([letters.index(letter) for letter in self.axes.split()])

  def to_stored(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The inverse of `from_stored`; the result is contiguous."""
    ours = self.axes.split()
    apart = array.transpose([ours.index(letter) for letter in self.stored_axes.replace(" ", "")])
    return np.ascontiguousarray(apart.reshape(self.stored_shape(config)))


def axis_sizes(config: ModelConfig) -> dict[str, int]:
  """The size of each axis by its letter."""
  return {
    "V": config.vocab_size,
    "E": config.embed_dim,
    "H": config.num_heads,
    "N": config.num_kv_heads,
    "D": config.head_dim,
    "F": config.mlp_dim,
    "S": selector_features(config.head_dim),
  }


def tensor_specs(config: ModelConfig) -> list[TensorSpec]:
  """Every parameter of the decoder, each once."""
  return [*model_specs(config), *selector_specs(config)]


def selector_specs(config: ModelConfig) -> list[TensorSpec]:
  """The weights of the fitted selector, which the LLaMA family lacks, in a file of their own."""
  if not config.focal_selector:
    return []
  return [_layer("attention.selector", "self_attn.focal_selector", "focal_selector", "N S", "N S")]


def model_specs(config: ModelConfig) -> list[TensorSpec]:
  """The parameters that every model of the LLaMA family has."""
  specs = [
    TensorSpec(("embedding",), "model.embed_tokens.weight", "token_embd.weight", "V E", "V E"),
    TensorSpec(("norm", "scale"), "model.norm.weight", "output_norm.weight", "E", "E"),
    _layer("attention_norm.scale", "input_layernorm", "attn_norm", "E", "E"),
    _layer("attention.query", "self_attn.q_proj", "attn_q", "HD E", "E H D"),
    _layer("attention.key", "self_attn.k_proj", "attn_k", "ND E", "E N D"),
    _layer("attention.value", "self_attn.v_proj", "attn_v", "ND E", "E N D"),
    _layer("attention.out", "self_attn.o_proj", "attn_output", "E HD", "H D E"),
    _layer("mlp_norm.scale", "post_attention_layernorm", "ffn_norm", "E", "E"),
    _layer("mlp.gate", "mlp.gate_proj", "ffn_gate", "F E", "E F"),
    _layer("mlp.up", "mlp.up_proj", "ffn_up", "F E", "E F"),
    _layer("mlp.down", "mlp.down_proj", "ffn_down", "E F", "F E"),
  ]
  if not config.tie_embeddings:
    specs.append(TensorSpec(("unembedding",), "lm_head.weight", "output.weight", "V E", "E V"))
  if config.qkv_bias:
    specs += [
      _layer("attention.query_bias", "self_attn.q_proj", "attn_q", "HD", "H D", kind="bias"),
      _layer("attention.key_bias", "self_attn.k_proj", "attn_k", "ND", "N D", kind="bias"),
      _layer("attention.value_bias", "self_attn.v_proj", "attn_v", "ND", "N D", kind="bias"),
    ]
  if config.qk_norm:
    specs += [
      _layer("attention.query_norm.scale", "self_attn.q_norm", "attn_q_norm", "D", "D"),
      _layer("attention.key_norm.scale", "self_attn.k_norm", "attn_k_norm", "D", "D"),
    ]
  return specs


def _layer(
  path: str,
  hugging_face: str,
  gguf: str,
  stored_axes: str,
  axes: str,
  kind: Literal["weight", "bias"] = "weight",
) -> TensorSpec:
  return TensorSpec(
    ("layers", *path.split(".")),
    f"model.layers.{{}}.{hugging_face}.{kind}",
    f"blk.{{}}.{gguf}.{kind}",
    stored_axes,
    axes,
  )

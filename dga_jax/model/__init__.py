"""LLaMA-family decoder with a choice of attention kinds."""

from dga_jax.model.config import ModelConfig, RopeScaling
from dga_jax.model.cost import flops_per_token, mean_keys, parameter_count
from dga_jax.model.decoder import Decoder, DecoderCache

__all__ = [
  "Decoder",
  "DecoderCache",
  "ModelConfig",
  "RopeScaling",
  "flops_per_token",
  "mean_keys",
  "parameter_count",
]

"""LLaMA-family decoder with a choice of attention kinds."""

from dga_jax.model.apply_budgets import apply_budgets
from dga_jax.model.config import ModelConfig, RopeScaling
from dga_jax.model.decoder import Decoder, DecoderCache
from dga_jax.model.flops import cache_keys, flops_per_token, mean_keys, parameter_count
from dga_jax.model.quantized import quantize_weights, weight_name

__all__ = [
  "Decoder",
  "DecoderCache",
  "ModelConfig",
  "RopeScaling",
  "apply_budgets",
  "cache_keys",
  "flops_per_token",
  "mean_keys",
  "parameter_count",
  "quantize_weights",
  "weight_name",
]

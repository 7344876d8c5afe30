"""A small model for each baseline attention kind, shared by the tests of rules and caches."""

import dataclasses
import functools

import numpy as np
from flax import nnx

from dga_jax.model import Decoder, ModelConfig
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.model.attention_kinds.kv_merger import KVMergerConfig
from dga_jax.model.attention_kinds.lm_infinite import LMInfiniteConfig
from dga_jax.model.attention_kinds.minference import MInferenceConfig
from dga_jax.model.attention_kinds.sliding_window import SlidingWindowConfig
from dga_jax.model.attention_kinds.streaming_llm import StreamingLLMConfig
from dga_jax.model.attention_kinds.top_k_eviction import TopKEvictionConfig

CONFIG = ModelConfig(
  vocab_size=31,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
  rope_base=100.0,
  dtype="float32",
  sliding_window=SlidingWindowConfig(window=5),
  streaming_llm=StreamingLLMConfig(sinks=3, window=4),
  lm_infinite=LMInfiniteConfig(global_tokens=3, local_window=4),
  minference=MInferenceConfig(
    vertical=4, slash=5, last_queries=3, first_tokens=1, recent_distances=2
  ),
  top_k_eviction=TopKEvictionConfig(heavy=3, recent=2, interval=2),
  kv_merger=KVMergerConfig(budget=7, heavy=1, recent=3, interval=3),
)
B, L, H, N, D = 3, 23, 4, 2, 8
R = H // N
CAUSAL = ("sliding_window", "streaming_llm", "lm_infinite", "top_k_eviction", "kv_merger")
KINDS = (*CAUSAL, "minference")


PROMPT, NEW = 13, 10
full = nnx.jit(Decoder.__call__)
prefill = nnx.jit(functools.partial(Decoder.prefill, max_length=PROMPT + NEW))
decode = nnx.jit(Decoder.decode)
extend = nnx.jit(Decoder.extend)


def tokens_of(seed: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (B, PROMPT + NEW))


def kind_of(name: str) -> AttentionKind:
  return dataclasses.replace(CONFIG, attention=name).make_attention()

"""The names that a model's config and the commands' flags choose from. Imports nothing heavy."""

from typing import Literal

AttentionName = Literal[
  "dga",
  "dense",
  "head_budgets",
  "sliding_window",
  "streaming_llm",
  "lm_infinite",
  "minference",
  "top_k_eviction",
  "kv_merger",
  "snapkv",
  "quest",
  "expected_attention",
  "clusterkv",
  "pqcache",
]
DtypeName = Literal["bfloat16", "float16", "float32"]
CacheDtypeName = Literal["int8", "float8_e4m3fn"]
WeightName = Literal["int8", "fp8"]
RematName = Literal["none", "full", "dots"]
RopeKind = Literal["linear", "llama3"]

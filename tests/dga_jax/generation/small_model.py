"""The small decoder of the tests of generation."""

from dga_jax import DGAConfig
from dga_jax.generation import Sampling
from dga_jax.model import ModelConfig

CONFIG = ModelConfig(
  vocab_size=61,
  num_layers=2,
  embed_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  attention="dga",
  dga=DGAConfig(selection="streaming", group_size=5, sink_tokens=2, local_window=1),
  dtype="float32",
)
GREEDY = Sampling(temperature=0.0)

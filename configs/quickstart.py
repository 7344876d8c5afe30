"""A small decoder with Dynamic Group Attention, on the running Python's own library source.

  ./workspace quickstart

or, as its first half, python -m train.main --config=configs/quickstart.py --workdir=DIR. On two
CPU cores it trained in 4.7 minutes: held-out loss 8.87 at the start and 5.41 nats per token at the
end (3.63 and 2.22 bits per byte).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Streaming selection: causal, and the same function in training and decoding."""
  config = base.get_config()
  config.num_steps = 300
  config.batch_size = 1
  config.learning_rate = 4e-3
  config.warmup_steps = 20
  config.loss_chunk = 128
  config.eval_every = 75
  config.eval_batches = 12
  config.checkpoint_every = 75

  config.model.num_layers = 3
  config.model.embed_dim = 256
  config.model.num_heads = 4
  config.model.num_kv_heads = 2
  config.model.head_dim = 64
  config.model.mlp_dim = 768
  config.model.tie_embeddings = True
  config.model.dtype = "float32"  # A CPU computes faster in it than in bfloat16.
  config.model.dga.selection = "streaming"
  config.model.dga.group_size = 16
  config.model.dga.focal_per_block = 2

  config.data.sequence_length = 2048
  return config

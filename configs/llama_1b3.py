"""A LLaMA of 1.3 billion parameters with Dynamic Group Attention.

For one GPU of 80 GB:

  python -m train.main --config=configs/llama_1b3.py --workdir=runs/1b3 \
    --config.data.train_files="('texts/**/*.txt',)" --config.data.sequence_length=32768
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Streaming selection, from scratch; one sequence a step."""
  config = base.get_config()
  config.num_steps = 10000
  config.batch_size = 1
  config.learning_rate = 2e-4
  config.warmup_steps = 500
  config.loss_chunk = 4096  # The unembedding's gradient is added up once a chunk.
  config.eval_every = 1000
  config.checkpoint_every = 1000

  config.model.vocab_size = 32000
  config.model.num_layers = 24
  config.model.embed_dim = 2048
  config.model.num_heads = 16
  config.model.num_kv_heads = 16
  config.model.head_dim = 128
  config.model.mlp_dim = 5504
  config.model.rope_base = 500000.0
  config.model.remat = "full"
  config.model.dga.selection = "streaming"

  config.data.sequence_length = 8192
  config.data.vocab_size = 32000
  return config

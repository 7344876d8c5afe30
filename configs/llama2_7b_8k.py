"""LLaMA2-7B at 8K with Dynamic Group Attention: the paper's continued pretraining.

  python -m dga_jax.convert --source=Llama-2-7b-hf --workdir=runs/llama2
  python -m train.main --config=configs/llama2_7b_8k.py --config.init_from=runs/llama2 \
    --config.data.train_files="('texts/**/*.txt',)" --workdir=runs/llama2_8k

RoPE base 500000 and 1000 steps, as in the paper; batch, learning rate and data are ours. For 64
chips of a TPU v5p or as many GPUs of 80 GB; it was compiled for such TPUs (README) and not run.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Global selection, γ = 0.1, m = 16, at least 1024 focal tokens."""
  config = base.get_config()
  config.num_steps = 1000
  config.batch_size = 64
  config.learning_rate = 2e-5
  config.warmup_steps = 20
  config.loss_chunk = 1024
  config.eval_every = 250
  config.checkpoint_every = 250

  config.model.vocab_size = 32000
  config.model.num_layers = 32
  config.model.embed_dim = 4096
  config.model.num_heads = 32
  config.model.num_kv_heads = 32
  config.model.head_dim = 128
  config.model.mlp_dim = 11008
  config.model.rope_base = 500000.0
  config.model.remat = "full"
  config.model.dga.max_documents = 16

  config.mesh.data = 1
  config.mesh.fsdp = -1

  config.data.sequence_length = 8192
  config.data.max_documents = 16
  config.data.vocab_size = 32000
  return config

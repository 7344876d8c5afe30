r"""LLaMA2-7B at 8K with Dynamic Group Attention, as in the paper's continued pretraining.

  python -m dga_jax.convert --source=Llama-2-7b-hf --workdir=runs/llama2
  python -m train.main --config=configs/llama2_7b_8k.py --config.init_from=runs/llama2 \
    --config.data.train_files="('texts/**/*.txt',)" --workdir=runs/llama2_8k

The paper gives RoPE base 500000 and 1000 steps (the default here); batch size, learning rate and
data are our choice. The config is for 64 TPU v5p chips or 64 GPUs of 80 GB. The step was compiled
for such TPUs (docs/benchmarks.md) but not run.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Global selection with the default γ = 0.1, m = 16 and at least 1024 focal tokens."""
  return ConfigDict(
    {
      "batch_size": 64,
      "learning_rate": 2e-5,
      "warmup_steps": 20,
      "loss_chunk": 1024,
      "eval_every": 250,
      "checkpoint_every": 250,
      "model": {
        "vocab_size": 32000,
        "num_layers": 32,
        "embed_dim": 4096,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 128,
        "mlp_dim": 11008,
        "rope_base": 500000.0,
        "remat": "full",
        "dga": {"max_documents": 16},
      },
      "mesh": {"data": 1, "fsdp": -1},
      "data": {"sequence_length": 8192, "max_documents": 16, "vocab_size": 32000},
    }
  )

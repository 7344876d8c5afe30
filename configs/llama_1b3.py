r"""A LLaMA of 1.3 billion parameters with Dynamic Group Attention, on one GPU of 80 GB.

The command for a folder of text files:

  python -m train.main --config=configs/llama_1b3.py --workdir=runs/1b3 \
    --config.data.train_files="('texts/**/*.txt',)" --config.data.sequence_length=32768
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Streaming selection, random initial parameters, one sequence per step."""
  return ConfigDict(
    {
      "num_steps": 10000,
      "batch_size": 1,
      "learning_rate": 2e-4,
      "warmup_steps": 500,
      "loss_chunk": 4096,  # The gradient of the unembedding is accumulated once per chunk.
      "eval_every": 1000,
      "checkpoint_every": 1000,
      "model": {
        "vocab_size": 32000,
        "num_layers": 24,
        "embed_dim": 2048,
        "num_heads": 16,
        "num_kv_heads": 16,
        "head_dim": 128,
        "mlp_dim": 5504,
        "rope_base": 500000.0,
        "remat": "full",
        "dga": {"selection": "streaming"},
      },
      "data": {"sequence_length": 8192, "vocab_size": 32000},
    }
  )

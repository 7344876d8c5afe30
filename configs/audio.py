r"""Speech at 8 kHz, one μ-law token a sample, in a context of 16 384 samples (2.05 seconds).

  python -m train.make_speech --texts="books/*.txt" --output=speech --minutes=60
  python -m train.main --config=configs/audio.py --workdir=runs/audio
  dga generate --workdir=runs/audio --prompt_audio=in.wav --output_audio=out.wav --seconds=2

A DGA query sees an eighth of the keys: 2 focal tokens and 1 group for 32 tokens, and the raw tokens
of its own block and of 16 blocks before it (68 ms). The same steps with other attention, where the
sliding window has a cache of the same size:

  --config.model.attention=dense
  --config.model.attention=sliding_window --config.model.sliding_window.window=2048

One H200 (jax 0.11.2), bits per sample of held-out voices and texts, and milliseconds a step: DGA
3.83 and 14.8, sliding window 3.92 and 15.2, dense 4.31 and 23.9 (docs/audio.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """A model of 8 million parameters for one GPU."""
  return ConfigDict(
    {
      "num_steps": 2500,
      "batch_size": 2,
      "eval_every": 500,
      "eval_batches": 64,
      "learning_rate": 2e-3,
      "checkpoint_every": 500,
      "model": {
        "vocab_size": 257,
        "num_layers": 6,
        "embed_dim": 384,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "mlp_dim": 1024,
        "dga": {
          "selection": "streaming",
          "group_size": 30,
          "focal_per_block": 2,
          "local_window": 16,
        },
      },
      "data": {
        "kind": "audio",
        "sequence_length": 16_384,
        "max_documents": 1,
        "train_files": ("speech/train/*.wav",),
        "validation_files": ("speech/held_out/*.wav",),
      },
    }
  )

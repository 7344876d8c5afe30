r"""Speech at 8 kHz, one μ-law token a sample, in a context of 8192 samples (1.02 seconds).

  python -m train.make_speech --texts="books/*.txt" --output=speech --minutes=60
  python -m train.main --config=configs/audio.py --workdir=runs/audio
  dga generate --workdir=runs/audio --prompt_audio=in.wav --output_audio=out.wav --seconds=2

A DGA query sees an eighth of the keys (3 focal tokens and 1 group for 32 tokens) and its raw block.
The same steps with other attention:

  --config.model.attention=dense
  --config.model.attention=sliding_window --config.model.sliding_window.window=1024
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """A model of 13 million parameters for one GPU."""
  return ConfigDict(
    {
      "num_steps": 2000,
      "eval_every": 250,
      "checkpoint_every": 500,
      "model": {
        "vocab_size": 257,
        "num_layers": 8,
        "embed_dim": 384,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 64,
        "mlp_dim": 1024,
        "dga": {"selection": "streaming", "group_size": 29, "focal_per_block": 3},
      },
      "data": {
        "kind": "audio",
        "sequence_length": 8192,
        "train_files": ("speech/train/*.wav",),
        "validation_files": ("speech/held_out/*.wav",),
      },
    }
  )

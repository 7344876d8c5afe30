"""Gates that choose the full KV heads of SmolLM2-135M at 8192 tokens.

  python -m train.main --config=configs/smollm2_gates.py:quarter --workdir=runs/gates \
    --config.init_from=MODEL --config.data.train_files="('books.txt','facts.jsonl')"
  python -m train.harden_gates --workdir=runs/gates --keys=0.25 --length=8192 --output=budgets.json
  python -m train.main --config=configs/smollm2_continued.py:budgets.json --workdir=runs/trained \
    --config.init_from=MODEL --config.data.train_files="('books.txt','facts.jsonl')"

The text after the colon is a key of COMPACT. Model and data are those of
configs/smollm2_continued.py. The gates are trained by distillation from dense attention alone, and
all other weights stay fixed.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.smollm2_continued import get_config as continued

# The compact setting of all heads, of 1153 and 577 keys of 8192, and the share of KV heads that can
# be full beside it at a quarter and at an eighth of the keys.
COMPACT: dict[str, tuple[dict[str, Any], float]] = {
  "quarter": ({"group_size": 62, "local_window": 11}, 11 / 90),
  "eighth": ({"group_size": 62, "local_window": 2}, 5 / 90),
}


def get_config(run: str = "quarter") -> ConfigDict:
  """A run by its key in COMPACT.

  Args:
    run: the key.

  Raises:
    ValueError: no such key.
  """
  if run not in COMPACT:
    raise ValueError(f"run is {run!r}; it must be one of {', '.join(COMPACT)}.")
  compact, full_heads = COMPACT[run]
  config = continued("streaming_quarter")
  with config.unlocked():
    config.update(
      {
        "learning_rate": 0.1,
        "warmup_steps": 5,
        "num_steps": 100,
        "eval_batches": 0,
        "checkpoint_every": 100,
        "distillation": 1.0,
        "full_heads": full_heads,
      }
    )
    config.model.head_gates = True
    config.model.dga.update(compact)
    del config["eval_every"]  # Without evaluation.
  return config

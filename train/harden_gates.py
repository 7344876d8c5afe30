"""Makes head budgets from the gates of a training run: the largest gates mark full KV heads.

  python -m train.main --config=configs/smollm2_gates.py --workdir=runs/gates \
    --config.init_from=runs/smollm2
  python -m train.harden_gates --workdir=runs/gates --keys=0.25 --length=8192 --output=budgets.json
  dga generate --workdir=runs/smollm2 --budgets=budgets.json --prompt="Once upon a time"

As many KV heads are full as the share --keys of a dense cache of --length tokens allows; all other
heads follow the setting under which the gates were trained. The budgets are for the model that the
run began with (config.init_from), whose other weights the run has not changed.
"""

import json
from pathlib import Path

from absl import flags

from dga_jax import command_line
from dga_jax.files.path_flags import define_path

_WORKDIR = define_path("workdir", None, "Folder of the run that trained the gates.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_KEYS = flags.DEFINE_float(
  "keys", 0.25, "Bound on the bytes of the cache, as a share of a dense cache.", 0.0, 1.0
)
_LENGTH = flags.DEFINE_integer("length", 8192, "Tokens of a sequence.", lower_bound=16)
_OUTPUT = define_path("output", None, "JSON file of the budgets.", required=True)


def main() -> None:
  """Writes the budgets, and prints the full heads."""
  import numpy as np

  from dga_jax.calibration.candidates import label
  from dga_jax.calibration.hardening import compact_setting, count_full_heads, harden
  from dga_jax.checkpoint import load_model
  from dga_jax.checkpoint_files import existing_step
  from dga_jax.model.flops import mean_head_keys

  step = existing_step(_WORKDIR.value, _STEP.value)
  model, config, _ = load_model(_WORKDIR.value, step)
  compact = compact_setting(config)
  gates_KxN = np.asarray(model.head_gates[...], np.float32)
  num_full = count_full_heads(_KEYS.value, _LENGTH.value, compact, config)
  budgets = harden(gates_KxN, compact, num_full)
  keys = mean_head_keys(budgets.counts(), _LENGTH.value)
  values = budgets.to_dict() | {
    "calibration": {
      "name": "/".join(Path(_WORKDIR.value).absolute().parts[-2:]),
      "share": _KEYS.value,
      "length": _LENGTH.value,
      "cost": keys / _LENGTH.value,
      "step": step,
      "gates": np.round(gates_KxN.astype(float), 4).tolist(),
    }
  }
  output = Path(_OUTPUT.value)
  output.parent.mkdir(parents=True, exist_ok=True)
  partial = output.with_name(f"{output.name}.partial")
  partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
  partial.replace(output)
  full = [(int(k), int(n)) for k, n in np.argwhere(np.array(budgets.assignment) == 0)]
  print(
    f"{num_full} of {gates_KxN.size} KV heads are full, as (layer, KV head): {full}. All others: "
    f"{label(compact)}. The cache keeps {keys:.0f} of {_LENGTH.value} keys in the mean of heads."
  )
  print(output)


if __name__ == "__main__":
  command_line.run(main)

r"""Makes head budgets from the gates of a training run: the largest gates mark full KV heads.

  python -m train.main --config=configs/smollm2_gates.py --workdir=runs/gates \
    --config.init_from=runs/smollm2
  python -m train.harden_gates --workdir=runs/gates --keys=0.25 --length=8192 --output=budgets.json
  dga generate --workdir=runs/smollm2 --budgets=budgets.json --prompt="Once upon a time"

As many KV heads are full as the share --keys of a dense cache of --length tokens allows; all other
heads follow the setting under which the gates were trained. With --like=OTHER.json the settings and
the number of heads of each are those of other budgets for a model of this size, and the heads with
the largest gates follow the setting with the most keys. The result is for the model that the run
began with (config.init_from), whose other weights the run has not changed.
"""

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
_LIKE = define_path(
  "like", None, "Budgets whose settings and numbers of heads to use, in place of --keys."
)
_OUTPUT = define_path("output", None, "JSON file of the budgets.", required=True)


def main() -> None:
  """Writes the budgets, and prints the full heads."""
  import numpy as np

  from dga_jax.calibration.candidates import label
  from dga_jax.calibration.hardening import compact_setting, count_full_heads, harden
  from dga_jax.checkpoint import load_model
  from dga_jax.checkpoint_files import existing_step
  from dga_jax.head_budgets import FULL, HeadSetting, read_head_budgets, write_head_budgets
  from dga_jax.model.flops import mean_head_keys, setting_keys

  step = existing_step(_WORKDIR.value, _STEP.value)
  model, config, _ = load_model(_WORKDIR.value, step)
  compact = compact_setting(config)  # Raises for a model without gates.
  gates_KxN = np.asarray(model.head_gates[...], np.float32)
  if _LIKE.value:
    counts = read_head_budgets(_LIKE.value).counts()
    largest_first = sorted(counts, key=lambda one: -setting_keys(one, _LENGTH.value))
    heads: dict[HeadSetting, int] = {setting: counts[setting] for setting in largest_first}
  else:
    num_full = count_full_heads(_KEYS.value, _LENGTH.value, compact, config)
    heads = {FULL: num_full, compact: gates_KxN.size - num_full}
  budgets = harden(gates_KxN, heads)
  keys = mean_head_keys(heads, _LENGTH.value)
  calibration = {
    "name": "/".join(Path(_WORKDIR.value).absolute().parts[-2:]),
    "share": None if _LIKE.value else _KEYS.value,
    "length": _LENGTH.value,
    "cost": keys / _LENGTH.value,
    "step": step,
    "gates": np.round(gates_KxN.astype(float), 4).tolist(),
  }
  output = Path(_OUTPUT.value)
  write_head_budgets(budgets, calibration, output)
  print(
    "\n".join(f"{count} KV heads: {label(setting)}" for setting, count in heads.items())
    + f"\nThe cache keeps {keys:.0f} of {_LENGTH.value} keys in the mean of the heads."
  )
  full = [(int(k), int(n)) for k, n in np.argwhere(np.array(budgets.assignment) == 0)]
  print(f"{label(budgets.settings[0])} as (layer, KV head): {full}")
  print(output)


if __name__ == "__main__":
  command_line.run(main)

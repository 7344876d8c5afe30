"""Draws what each query sees, and how groups merge tokens.

  dga picture --output=mask.png

The plot compares global and streaming selection for one KV head. The keys and
queries are random: neighbouring tokens resemble each other, and all queries
attend more to a few tokens that are drawn at random. The command needs the
extra "evaluate" (matplotlib).
"""

import dataclasses
from pathlib import Path

from absl import flags

from dga_jax import command_line
from dga_jax.files.path_flags import define_path

_OUTPUT = define_path("output", "mask.png", "File to write, .png or .svg.")
_LENGTH = flags.DEFINE_integer("length", 48, "Tokens of the row.", lower_bound=8, upper_bound=256)
_GROUP_SIZE = flags.DEFINE_integer("group_size", 6, "m, tokens in a group.", lower_bound=1)
_FOCAL_RATE = flags.DEFINE_float("importance_rate", 0.2, "γ, share of focal tokens.", 0.0, 1.0)
_SEED = flags.DEFINE_integer("seed", 3, "Seed of the random keys and queries.", lower_bound=0)


def main() -> None:
  """Writes the plot."""
  from dga_jax import DGAConfig, plan_groups
  from dga_jax.evaluation.mask_plot import plot_masks, salient_tokens

  query, key = salient_tokens(_LENGTH.value, _SEED.value)
  config = DGAConfig(
    group_size=_GROUP_SIZE.value,
    importance_rate=_FOCAL_RATE.value,
    min_focal_tokens=0,
    n_recent=max(1, _LENGTH.value // 3),
    n_random=0,
  )
  streaming = dataclasses.replace(config, selection="streaming")
  plans = {
    "global selection (the paper's)": plan_groups(query, key, config=config),
    "streaming selection (causal)": plan_groups(query, key, config=streaming),
  }
  path = Path(_OUTPUT.value)
  title = (
    f"Dynamic Group Attention · {_LENGTH.value} tokens made by code · groups of "
    f"{_GROUP_SIZE.value} · γ = {_FOCAL_RATE.value:g}"
  )
  plot_masks(query, key, plans, path, title=title)
  print(f"wrote {path}")


if __name__ == "__main__":
  command_line.run(main)

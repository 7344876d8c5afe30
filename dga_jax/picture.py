"""Draws what each query sees and how groups merge tokens, for global and streaming selection.

  python -m dga_jax.picture --output=docs/mask.png

The keys and queries are made by code: neighbouring tokens resemble each other, and every query is
attracted to a few salient tokens, drawn at random. The plot shows one KV head.
"""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array

from dga_jax.attention import plan_groups
from dga_jax.config import DGAConfig

_OUTPUT = flags.DEFINE_string("output", "mask.png", "File to write, .png or .svg.")
_LENGTH = flags.DEFINE_integer("length", 48, "Tokens of the row.", lower_bound=8, upper_bound=256)
_GROUP_SIZE = flags.DEFINE_integer("group_size", 6, "m, tokens in a group.", lower_bound=1)
_FOCAL_RATE = flags.DEFINE_float("importance_rate", 0.2, "γ, share of focal tokens.", 0.0, 1.0)
_SEED = flags.DEFINE_integer("seed", 3, "Seed of the random keys and queries.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
  """Writes the plot."""
  if len(argv) > 1:
    raise app.UsageError(f"{argv[1]!r} is no flag.")
  from dga_jax.evaluation.mask_plot import plot_masks  # matplotlib takes a second to import

  query, key = _salient_tokens(_LENGTH.value, _SEED.value)
  common = {
    "group_size": _GROUP_SIZE.value,
    "importance_rate": _FOCAL_RATE.value,
    "min_focal_tokens": 0,
    "n_recent": max(1, _LENGTH.value // 3),
    "n_random": 0,
  }
  plans = {
    "global selection (the paper's)": plan_groups(query, key, config=DGAConfig(**common)),
    "streaming selection (causal)": plan_groups(
      query, key, config=DGAConfig(**common, selection="streaming")
    ),
  }
  path = Path(_OUTPUT.value)
  plot_masks(query, key, plans, path)
  print(f"wrote {path}")


def _salient_tokens(length: int, seed: int) -> tuple[Array, Array]:
  """Query and key, float32 [1, L, 1, 16]; one token in eight is salient."""
  draw = np.random.default_rng(seed)
  query_LxD, key_LxD = draw.normal(size=(2, length, 16)).cumsum(axis=1) * length**-0.25
  salient = draw.choice(length, max(1, length // 8), replace=False)
  direction_D = draw.normal(size=16)
  query_LxD = query_LxD + direction_D
  key_LxD[salient] += direction_D
  query, key = (jnp.asarray(x[None, :, None], jnp.float32) for x in (query_LxD, key_LxD))
  return query, key


if __name__ == "__main__":
  app.run(main)

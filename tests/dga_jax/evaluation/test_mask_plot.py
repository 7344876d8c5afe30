"""The plot of a plan has a colour for each kind of visibility."""

from pathlib import Path

import jax
import matplotlib.image
import numpy as np
from matplotlib.colors import to_rgb

from dga_jax import DGAConfig, plan_groups
from dga_jax.analyse import Seen, visibility
from dga_jax.evaluation.mask_plot import _COLOURS, plot_masks


def test_every_kind_of_visibility_has_its_colour(tmp_path: Path) -> None:
  query, key = jax.random.normal(jax.random.key(0), (2, 1, 20, 1, 8))
  plan = plan_groups(query, key, config=DGAConfig(group_size=4, selection="streaming"))
  plot_masks(query, key, {"streaming": plan}, tmp_path / "mask.png", title="48 tokens")
  pixels = matplotlib.image.imread(tmp_path / "mask.png")[..., :3]
  seen = visibility(plan)
  assert set(np.unique(seen)) == {code.value for code in Seen}
  counts = {}
  for code in Seen:
    counts[code] = int((np.abs(pixels - to_rgb(_COLOURS[code])) < 0.01).all(axis=-1).sum())
  # The share of pixels of a colour equals the share of entries, up to the pixels of the legend.
  shares = {code: (seen == code).mean() for code in Seen}
  total = sum(counts.values())
  for code in Seen:
    assert abs(counts[code] / total - shares[code]) < 0.05

"""The plot of a plan shows every way in which a query sees a token."""

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
  drawn = {}
  for code in Seen:
    drawn[code] = int((np.abs(pixels - to_rgb(_COLOURS[code])) < 0.01).all(axis=-1).sum())
  # The mask's pixels are shared out as its entries are; the legend adds little.
  shares = {code: (seen == code).mean() for code in Seen}
  total = sum(drawn.values())
  for code in Seen:
    assert abs(drawn[code] / total - shares[code]) < 0.05

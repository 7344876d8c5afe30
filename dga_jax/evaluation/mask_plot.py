"""Plots of one plan: what each query sees, and how groups merge tokens."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dga_jax.analyse import merge_weights, Seen, visibility
from dga_jax.attention.plan import GroupPlan
from dga_jax.files.figure import save_figure

_COLOURS = {
  Seen.UNSEEN: "#f0f0f0",
  Seen.FOCAL: "#d55e00",
  Seen.MERGED: "#a6cee3",
  Seen.RAW: "#1b7837",
}
_LABELS = {
  Seen.UNSEEN: "not seen",
  Seen.FOCAL: "focal token",
  Seen.MERGED: "merged, seen through its group",
  Seen.RAW: "raw token",
}


def plot_masks(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  plans: Mapping[str, GroupPlan],
  path: Path,
  *,
  title: str,
) -> None:
  """Draws the mask and the merge weights of the first row and KV head of each plan.

  Args:
    query: what the plans were made with.
    key: what the plans were made with.
    plans: by name, one column of plots each; rows short enough to look at (L up to about 100).
    path: of the PNG or SVG file.
    title: of the figure.
  """
  figure = Figure(figsize=(5.5 * len(plans), 8.5), layout="constrained", dpi=110)
  figure.suptitle(title)
  panels = figure.subplots(2, len(plans), height_ratios=(3, 1), squeeze=False)
  colours = ListedColormap(list(_COLOURS.values()))
  for column, (name, plan) in enumerate(plans.items()):
    mask, weights = panels[0, column], panels[1, column]
    mask.imshow(visibility(plan), cmap=colours, vmin=0, vmax=3)
    mask.set(title=name, xlabel="token", ylabel="query")
    image = weights.imshow(
      merge_weights(query, key, plan), cmap="Blues", vmin=0, vmax=0.6, aspect="auto"
    )
    for token in np.flatnonzero(np.asarray(plan.focal_mask)[0, 0]):
      weights.axvspan(token - 0.5, token + 0.5, color=_COLOURS[Seen.FOCAL], alpha=0.3, linewidth=0)
    weights.set(title="weights of the merged tokens", xlabel="token", ylabel="group")
  figure.colorbar(image, ax=panels[1, :], label="weight in the group", extend="max")
  patches = [Patch(color=_COLOURS[code], label=_LABELS[code]) for code in Seen]
  figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
  save_figure(figure, path)


def salient_tokens(
  length: int, seed: int
) -> tuple[Float[Array, "1 L 1 16"], Float[Array, "1 L 1 16"]]:
  """Query and key, float32: a random walk in which one token in eight attracts every query.

  Args:
    length: L.
    seed: of the walk and of the salient tokens.
  """
  draw = np.random.default_rng(seed)
  query_LxD, key_LxD = draw.normal(size=(2, length, 16)).cumsum(axis=1) * length**-0.25
  salient = draw.choice(length, max(1, length // 8), replace=False)
  direction_D = draw.normal(size=16)
  query_LxD = query_LxD + direction_D[None]
  key_LxD[salient] += direction_D
  query, key = (jnp.asarray(x[None, :, None], jnp.float32) for x in (query_LxD, key_LxD))
  return query, key

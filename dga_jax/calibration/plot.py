"""The picture of a calibration: the setting and the cost of every KV head."""

import textwrap
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dga_jax.calibration.candidates import label
from dga_jax.calibration.run import Calibration
from dga_jax.evaluation.plots import text_colour
from dga_jax.files.figure import save_figure
from dga_jax.head_budgets import FULL
from dga_jax.model.flops import setting_keys

# "full" is dark; the fewer keys a setting keeps, the lighter its colour. Distinct in greyscale.
_COLOURS = ("#08306b", "#2b7bba", "#6baed6", "#bdd7e7", "#eff3ff")
_FEW_HEADS = 8  # Up to which panels are below each other and every cell has a number.


def plot_budgets(result: Calibration, length: int, title: str, path: Path) -> None:
  """Draws three panels of heads over layers: the setting, and each head's part of both costs.

  Args:
    result: of the calibration.
    length: L, tokens of the context.
    title: names the model, the length and the share.
    path: of the PNG file.
  """
  layers, heads = result.rises.text.shape[:2]
  few = heads <= _FEW_HEADS
  if few:
    size = (max(10.0, 1.6 + 0.42 * layers), 2.2 + 3 * max(0.9, 0.34 * heads))
  else:
    size = (3 * max(4.5, 1.2 + 0.19 * layers), 2.0 + 0.19 * heads)
  figure = Figure(figsize=size, layout="constrained", dpi=130)
  panels = figure.subplots(*((3, 1) if few else (1, 3)), sharex=True, sharey=True)
  _draw_settings(panels[0], result, length)
  last = len(result.candidates) - 1
  cheapest = f"alone under {label(result.candidates[last])}"
  for axes, name in zip(panels[1:], ("text", "retrieval"), strict=True):
    rise_KxN = getattr(result.rises, name)[..., last]
    share_NxK = 100 * (rise_KxN / getattr(result.scale, name)).T
    title_of_panel = f"Divergence on {name}, % of the sum,{' ' if few else chr(10)}one head"
    _draw_shares(axes, share_NxK, f"{title_of_panel} {cheapest}", numbers=few)
  for axes in panels[-1:] if few else panels:
    axes.set_xlabel("layer")
  panels[-1].set_xticks(range(0, layers, 1 if few and layers <= 40 else 4))
  figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize=11, parse_math=False)
  save_figure(figure, path)


def _draw_settings(axes: Axes, result: Calibration, length: int) -> None:
  budgets = result.budgets
  order = sorted(
    range(len(budgets.settings)), key=lambda i: -setting_keys(budgets.settings[i], length)
  )
  settings = [budgets.settings[index] for index in order]
  assignment_NxK = np.argsort(order)[np.array(budgets.assignment)].T
  first = 0 if FULL in settings else 1
  colours = _COLOURS[first:][: len(settings)]
  axes.imshow(
    assignment_NxK, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, aspect="auto"
  )
  _grid(axes, assignment_NxK.shape)
  patches = []
  for index, (setting, colour) in enumerate(zip(settings, colours, strict=True)):
    count = int((assignment_NxK == index).sum())
    keys = 100 * setting_keys(setting, length) / length
    name = f"{label(setting)}: {count} heads, {keys:.0f} % of the keys"
    patches.append(Patch(facecolor=colour, edgecolor="#888888", label=name))
  axes.legend(
    handles=patches, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9,
    ncols=2 if len(assignment_NxK) <= _FEW_HEADS else 1,
  )  # fmt: skip


def _draw_shares(
  axes: Axes, share_NxK: Float[np.ndarray, "N K"], title: str, *, numbers: bool
) -> None:
  """Shares in percent, as numbers or with a scale of colours; falls of the divergence are white."""
  most = max(float(share_NxK.max()), 1e-9)
  norm = PowerNorm(0.5, vmin=0, vmax=most)  # Shows small shares beside one that is large.
  image = axes.imshow(np.maximum(share_NxK, 0), cmap="Reds", norm=norm, aspect="auto")
  _grid(axes, share_NxK.shape)
  axes.set_title(title, fontsize=10)
  if not numbers:
    axes.figure.colorbar(image, ax=axes, label="%")
    return
  for (head, layer), share in np.ndenumerate(share_NxK):
    colour = text_colour([float(part) for part in image.to_rgba(share)[:3]])
    axes.text(layer, head, _number(share), ha="center", va="center", color=colour, fontsize=7.5)


def _number(share: float) -> str:
  text = f"{share:.1f}" if abs(share) < 9.95 else f"{share:.0f}"
  return "0" if text in ("0.0", "-0.0") else text


def _grid(axes: Axes, shape: tuple[int, ...]) -> None:
  heads, layers = shape
  axes.set_ylabel("KV head")
  axes.set_yticks(range(0, heads, 1 if heads <= 16 else 4))
  axes.set_xticks(np.arange(layers + 1) - 0.5, minor=True)
  axes.set_yticks(np.arange(heads + 1) - 0.5, minor=True)
  axes.grid(which="minor", color="white", linewidth=1)
  axes.tick_params(which="minor", length=0)

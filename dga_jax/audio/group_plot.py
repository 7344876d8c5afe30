"""Plot of the groups that a model makes of a sound: focal samples and group boundaries."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure

from dga_jax.audio.layer_groups import FOCAL
from dga_jax.files.figure import save_figure

_BIN_SECONDS = 0.01  # Bins of the share of focal samples.
_QUIET = 0.05  # Largest RMS of a pause, as a share of the loudest bin's.
_FOCAL_COLOUR, _GROUP_COLOURS = "#d55e00", ("#a6cee3", "#dfeaf2")


@dataclasses.dataclass(frozen=True)
class FocalShares:
  """Share of the samples that stay focal, over all layers and KV heads.

  Attributes:
    pauses: in bins of 10 ms whose RMS is at most 5 % of the loudest bin's.
    sound: in the other bins.
    pauses_of_sound: share of the bins that are pauses.
  """

  pauses: float
  sound: float
  pauses_of_sound: float

  @classmethod
  def of_groups(
    cls,
    samples_T: Float[np.ndarray, "T"],
    groups_YxNxT: Int[np.ndarray, "Y N T"],
    sample_rate: int,
  ) -> "FocalShares":
    """Counts the focal samples of `groups_by_layer`; NaN for a kind of bin that is missing."""
    quiet_F = _quiet_bins(samples_T, sample_rate)
    focal_F = _bins(groups_YxNxT == FOCAL, sample_rate).mean(axis=(0, 1))
    means = [float(x.mean()) if len(x) else np.nan for x in (focal_F[quiet_F], focal_F[~quiet_F])]
    return cls(means[0], means[1], float(quiet_F.mean()))


def plot_groups(
  path: str | os.PathLike[str],
  samples_T: Float[np.ndarray, "T"],
  groups: Mapping[str, Int[np.ndarray, "Y N T"]],
  sample_rate: int,
  *,
  title: str,
  head: tuple[int, int],
  zoom: tuple[float, float],
) -> None:
  """Draws the waveform, the share of focal samples over time, and the groups of one head.

  Args:
    path: of the PNG or SVG file.
    samples_T: samples from −1 to 1, at least 10 ms of them.
    groups: of `groups_by_layer`, by the name of the selection.
    sample_rate: samples a second.
    title: of the figure.
    head: layer and KV head whose groups are drawn.
    zoom: begin and end, in seconds, of the part in which groups are drawn.
  """
  seconds_T = np.arange(len(samples_T)) / sample_rate
  rows = 1 + 2 * len(groups)
  figure = Figure(figsize=(10, 1.6 * rows), layout="constrained", dpi=100)
  figure.suptitle(title, parse_math=False)
  panels = figure.subplots(rows, 1)
  panels[0].plot(seconds_T, samples_T, color="#1f4e79", linewidth=0.5)
  panels[0].axvspan(*zoom, color="#2ca02c", alpha=0.25, linewidth=0)
  panels[0].set(ylabel="amplitude", xlim=(0, seconds_T[-1]))
  for index, (name, groups_YxNxT) in enumerate(groups.items()):
    overview, detail = panels[1 + 2 * index], panels[2 + 2 * index]
    _draw_shares(figure, overview, groups_YxNxT, sample_rate)
    overview.set_title(f"{name}: share of focal samples by layer and KV head", fontsize=10)
    _draw_groups(detail, samples_T, groups_YxNxT[head], sample_rate, zoom)
    detail.set_title(
      f"{name}: groups (bands) and focal samples (dots), layer {head[0]}, KV head {head[1]}",
      fontsize=10,
    )
  panels[-1].set_xlabel("seconds")
  save_figure(figure, path)


def _draw_shares(
  figure: Figure, axes: Any, groups_YxNxT: Int[np.ndarray, "Y N T"], sample_rate: int
) -> None:
  Y, N, T = groups_YxNxT.shape
  shares = _bins(groups_YxNxT == FOCAL, sample_rate).reshape(Y * N, -1)
  top = max(float(np.percentile(shares, 99)), 0.01)
  extent = (0, T / sample_rate, Y - 0.5, -0.5)
  image = axes.imshow(shares, aspect="auto", cmap="magma", vmin=0, vmax=top, extent=extent)
  axes.set(ylabel="layer", xlim=(0, (T - 1) / sample_rate))
  figure.colorbar(image, ax=axes)


def _draw_groups(
  axes: Any,
  samples_T: Float[np.ndarray, "T"],
  groups_T: Int[np.ndarray, "T"],
  sample_rate: int,
  zoom: tuple[float, float],
) -> None:
  """The waveform of a part of the sound on bands, one for each group from first to last member."""
  begin, end = (round(second * sample_rate) for second in zoom)
  for group in np.unique(groups_T[begin:end]):
    if group >= 0:
      members = np.flatnonzero(groups_T == group)
      span = (members[0] / sample_rate, (members[-1] + 1) / sample_rate)
      axes.axvspan(*span, color=_GROUP_COLOURS[group % 2], linewidth=0)
  seconds = np.arange(begin, min(end, len(samples_T)))
  axes.plot(seconds / sample_rate, samples_T[seconds], color="#1f4e79", linewidth=0.8)
  focal = seconds[groups_T[seconds] == FOCAL]
  axes.plot(focal / sample_rate, samples_T[focal], "o", color=_FOCAL_COLOUR, markersize=2.5)
  axes.set(ylabel="amplitude", xlim=zoom)


def _quiet_bins(samples_T: Float[np.ndarray, "T"], sample_rate: int) -> Bool[np.ndarray, "F"]:
  rms_F = np.sqrt(_bins(np.square(samples_T, dtype=np.float64), sample_rate))
  return rms_F <= _QUIET * rms_F.max()


def _bins(x_T: np.ndarray, sample_rate: int) -> np.ndarray:
  """Means over bins of 10 ms of the last axis. An incomplete last bin is left out."""
  size = max(1, round(_BIN_SECONDS * sample_rate))
  bins = x_T.shape[-1] // size
  return x_T[..., : bins * size].reshape(*x_T.shape[:-1], bins, size).mean(axis=-1)

"""Plot of a sound and its continuation: waveform and spectrogram."""

import os

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from dga_jax.files.figure import save_figure

_WINDOW_SECONDS = 0.032
_RANGE_DB = 70  # Dynamic range of the colours, below the loudest bin.


def plot_continuation(
  path: str | os.PathLike[str],
  prompt_T: Float[np.ndarray, "T"],
  new_T: Float[np.ndarray, "S"],
  sample_rate: int,
  *,
  title: str,
) -> None:
  """Draws the prompt and its continuation one after the other, divided by a line.

  Args:
    path: of the PNG or SVG file.
    prompt_T: samples from −1 to 1.
    new_T: the samples of the continuation.
    sample_rate: samples a second.
    title: of the figure.
  """
  samples_T = np.concatenate([prompt_T, new_T])
  seconds_T = np.arange(len(samples_T)) / sample_rate
  border = len(prompt_T) / sample_rate
  figure = Figure(figsize=(10, 5.5), layout="constrained", dpi=110)
  figure.suptitle(title, parse_math=False)
  wave, spectrum = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
  wave.plot(seconds_T, samples_T, color="#1f4e79", linewidth=0.5)
  wave.set(ylabel="amplitude", ylim=(-1.05, 1.05))
  window = min(len(samples_T), max(16, round(_WINDOW_SECONDS * sample_rate)))
  with np.errstate(divide="ignore"):  # Digital silence is −∞ dB.
    power, _, _, image = spectrum.specgram(
      samples_T, NFFT=window, Fs=sample_rate, noverlap=window * 3 // 4, cmap="magma"
    )
  # Silence has a power of zero.
  loudest = 10 * np.log10(max(power.max(), np.finfo(np.float64).tiny))
  image.set_clim(loudest - _RANGE_DB, loudest)
  spectrum.set_facecolor("black")
  spectrum.set(xlabel="seconds", ylabel="frequency in Hz", xlim=(0, seconds_T[-1]))
  for axes in (wave, spectrum):
    axes.axvline(border, color="#2ca02c", linewidth=1.5)
  for text, side, align in (("prompt ", border, "right"), (" continuation", border, "left")):
    wave.annotate(text, (side, 0.97), ha=align, va="top", color="#2ca02c")
  figure.colorbar(image, ax=spectrum, label="power in dB")
  save_figure(figure, path)

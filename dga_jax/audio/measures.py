"""Measures of a sound: loudness, clipping and pitch."""

import dataclasses

import numpy as np
from jaxtyping import Float

_FRAME_SECONDS, _HOP_SECONDS = 0.04, 0.01
_LOWEST_HZ, _HIGHEST_HZ = 60.0, 400.0  # Range of the fundamental of a voice.
_VOICED = 0.6  # Least normalised autocorrelation of a voiced frame.
_AUDIBLE = 0.1  # Least RMS of a voiced frame, as a share of the loudest frame's.
_SAME_PEAK = 0.9  # A peak of this share of the highest one wins if its lag is shorter.
_CLIPPED = 0.999


@dataclasses.dataclass(frozen=True)
class SoundMeasures:
  """Loudness, clipping and pitch of a sound.

  Attributes:
    rms_db: root mean square in dB relative to full scale; −inf for silence.
    peak: largest absolute sample.
    clipped: share of samples at full scale.
    voiced: share of the frames of 40 ms that are periodic with 60 to 400 Hz.
    pitch_hz: 10th, 50th and 90th percentile of the fundamental of the voiced frames; None without
      voiced frames.
  """

  rms_db: float
  peak: float
  clipped: float
  voiced: float
  pitch_hz: tuple[float, float, float] | None

  @classmethod
  def from_samples(cls, samples_T: Float[np.ndarray, "T"], sample_rate: int) -> "SoundMeasures":
    """Measures a sound of at least one sample.

    The pitch of a frame is the shortest lag whose autocorrelation, divided by the energies of both
    parts, is within 10 % of its maximum over lags of 1/400 to 1/60 s.

    Args:
      samples_T: samples from −1 to 1.
      sample_rate: samples a second.

    Raises:
      ValueError: there is no sample.
    """
    if not len(samples_T):
      raise ValueError("samples_T is empty; a sound has at least one sample.")
    magnitude_T = np.abs(samples_T)
    rms = float(np.sqrt(np.mean(np.square(samples_T, dtype=np.float64))))
    pitch_F, frames = _pitch_of_frames(samples_T.astype(np.float64), sample_rate)
    low_mid_high = np.percentile(pitch_F, (10, 50, 90)) if len(pitch_F) else None
    return cls(
      rms_db=20 * float(np.log10(rms)) if rms else -np.inf,
      peak=float(magnitude_T.max()),
      clipped=float(np.mean(magnitude_T >= _CLIPPED)),
      voiced=len(pitch_F) / frames if frames else 0.0,
      pitch_hz=None
      if low_mid_high is None
      else (float(low_mid_high[0]), float(low_mid_high[1]), float(low_mid_high[2])),
    )

  def summary(self) -> str:
    """One line of text."""
    pitch = "no pitch"
    if self.pitch_hz is not None:
      low, mid, high = self.pitch_hz
      pitch = f"pitch {low:.0f} to {high:.0f} Hz (median {mid:.0f})"
    return (
      f"RMS {self.rms_db:.1f} dB, peak {self.peak:.2f}, clipped {self.clipped:.2%}, "
      f"voiced {self.voiced:.0%}, {pitch}"
    )


def _pitch_of_frames(
  samples_T: Float[np.ndarray, "T"], sample_rate: int
) -> tuple[Float[np.ndarray, "F"], int]:
  """The fundamental of each voiced frame in Hz, and the number of all frames."""
  size, hop = round(_FRAME_SECONDS * sample_rate), max(1, round(_HOP_SECONDS * sample_rate))
  shortest, longest = int(sample_rate / _HIGHEST_HZ), int(sample_rate / _LOWEST_HZ)
  if len(samples_T) < size:
    return np.zeros(0), 0
  frames_FxS = np.lib.stride_tricks.sliding_window_view(samples_T, size)[::hop]
  frames_FxS = frames_FxS - frames_FxS.mean(axis=1, keepdims=True)
  spectrum_FxW = np.fft.rfft(frames_FxS, 2 * size, axis=1)
  product_FxS = np.fft.irfft(np.abs(spectrum_FxW) ** 2, axis=1)[:, :size]
  energy_FxS = np.cumsum(frames_FxS**2, axis=1)
  total_Fx1 = energy_FxS[:, -1:]
  lags = np.arange(shortest, longest + 1)
  # Of the frame without its last `lag` samples, and of the frame without its first ones.
  first_FxP, last_FxP = energy_FxS[:, size - 1 - lags], total_Fx1 - energy_FxS[:, lags - 1]
  scale_FxP = np.sqrt(np.maximum(first_FxP * last_FxP, np.finfo(np.float64).tiny))
  periodic_FxP = product_FxS[:, lags] / scale_FxP
  best_F = periodic_FxP.max(axis=1)
  is_peak_FxP = periodic_FxP >= _SAME_PEAK * best_F[:, None]
  # The first lags belong to the peak at lag 0 until the autocorrelation falls.
  rises_FxP = np.diff(periodic_FxP, axis=1, prepend=np.inf) >= 0
  falls_FxP = np.diff(periodic_FxP, axis=1, append=np.inf) <= 0
  is_peak_FxP &= rises_FxP & falls_FxP
  rms_F = np.sqrt(total_Fx1[:, 0] / size)
  voiced_F = (best_F >= _VOICED) & (rms_F >= _AUDIBLE * rms_F.max()) & is_peak_FxP.any(axis=1)
  return sample_rate / lags[is_peak_FxP.argmax(axis=1)][voiced_F], len(frames_FxS)

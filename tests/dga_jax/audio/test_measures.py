"""Loudness, clipping and pitch of sounds with known ones."""

import numpy as np
import pytest

from dga_jax.audio.measures import SoundMeasures

RATE = 8000


def tone(frequency: float) -> np.ndarray:
  """Half a second of three harmonics, with a peak below 0.6."""
  time_T = np.arange(RATE // 2) / RATE
  parts = [0.2 * np.sin(2 * np.pi * frequency * n * time_T) for n in (1, 2, 3)]
  return np.sum(parts, axis=0).astype(np.float32)


@pytest.mark.parametrize("frequency", [70, 110, 163, 240, 380])
def test_pitch_of_a_harmonic_tone(frequency: float) -> None:
  measures = SoundMeasures.from_samples(tone(frequency), RATE)
  assert measures.pitch_hz is not None
  # A lag is a whole number of samples.
  np.testing.assert_allclose(measures.pitch_hz, frequency, rtol=frequency / RATE)
  assert measures.voiced == 1
  assert measures.clipped == 0


def test_pitch_range_of_two_tones() -> None:
  measures = SoundMeasures.from_samples(np.concatenate([tone(100), tone(200)]), RATE)
  assert measures.pitch_hz is not None
  np.testing.assert_allclose(measures.pitch_hz[::2], (100, 200), rtol=0.02)


def test_loudness_of_a_sine() -> None:
  sine_T = 0.5 * np.sin(2 * np.pi * 100 * np.arange(RATE) / RATE)
  measures = SoundMeasures.from_samples(sine_T.astype(np.float32), RATE)
  assert measures.rms_db == pytest.approx(20 * np.log10(0.5 / np.sqrt(2)), abs=0.01)
  assert measures.peak == pytest.approx(0.5, abs=1e-4)


def test_noise_has_no_pitch_and_half_of_a_square_wave_is_clipped() -> None:
  noise_T = np.random.default_rng(0).uniform(-0.5, 0.5, RATE).astype(np.float32)
  measures = SoundMeasures.from_samples(noise_T, RATE)
  assert measures.voiced < 0.02
  assert SoundMeasures.from_samples(np.float32([0, 1, 0, -1]), RATE).clipped == 0.5


def test_pauses_are_not_voiced() -> None:
  sound_T = np.concatenate([tone(120), 1e-3 * tone(120)])
  assert SoundMeasures.from_samples(sound_T, RATE).voiced == pytest.approx(0.5, abs=0.05)


def test_silence_has_no_pitch() -> None:
  measures = SoundMeasures.from_samples(np.zeros(RATE, np.float32), RATE)
  assert (measures.rms_db, measures.voiced, measures.pitch_hz) == (-np.inf, 0, None)
  assert "no pitch" in measures.summary()


def test_an_empty_sound_is_refused() -> None:
  with pytest.raises(ValueError, match="samples_T is empty"):
    SoundMeasures.from_samples(np.zeros(0, np.float32), RATE)

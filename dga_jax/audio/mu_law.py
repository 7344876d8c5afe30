"""μ-law companding: samples of sound as 256 levels, finer near zero (ITU-T G.711, μ = 255)."""

import numpy as np
from jaxtyping import Float, Integer, UInt8

LEVELS = 256
_MU = LEVELS - 1


def encode_mu_law(samples_T: Float[np.ndarray, "T"]) -> UInt8[np.ndarray, "T"]:
  """The level of each sample.

  level = round(μ · (F(x) + 1) / 2) with F(x) = sign(x) · ln(1 + μ|x|) / ln(1 + μ), as in WaveNet
  (van den Oord et al., 2016, section 2.2).

  Args:
    samples_T: from −1 to 1.

  Raises:
    ValueError: a sample is outside of −1 to 1, or NaN.
  """
  if not np.all(np.abs(samples_T) <= 1):
    raise ValueError(
      f"samples_T has values up to {np.abs(samples_T).max()}; samples must be from -1 to 1. Scale "
      "or clip them."
    )
  compressed_T = np.sign(samples_T) * np.log1p(_MU * np.abs(samples_T)) / np.log1p(_MU)
  return np.floor((compressed_T + 1) / 2 * _MU + 0.5).astype(np.uint8)


def decode_mu_law(levels_T: Integer[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
  """The float32 sample of each level, the inverse of `encode_mu_law` up to its rounding.

  Args:
    levels_T: 0 to 255.

  Raises:
    ValueError: a level is outside of 0 to 255.
  """
  if not np.all((levels_T >= 0) & (levels_T < LEVELS)):
    raise ValueError(f"levels_T has {levels_T.min()} to {levels_T.max()}; levels are 0 to {_MU}.")
  compressed_T = 2 * levels_T.astype(np.float64) / _MU - 1
  magnitude_T = np.expm1(np.abs(compressed_T) * np.log1p(_MU)) / _MU
  return (np.sign(compressed_T) * magnitude_T).astype(np.float32)

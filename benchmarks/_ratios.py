"""Ratios of means with their standard errors."""

import math

import numpy as np
from jaxtyping import Float


def ratio_of_means(a_B: Float[np.ndarray, "B"], b_B: Float[np.ndarray, "B"]) -> tuple[float, float]:
  """mean(a) / mean(b) and its standard error over rows by the delta method; NaN for one row."""
  ratio = a_B.mean() / b_B.mean()
  deviation = (a_B - ratio * b_B).std() / abs(b_B.mean())
  return float(ratio), float(deviation) / math.sqrt(len(a_B) - 1) if len(a_B) > 1 else math.nan

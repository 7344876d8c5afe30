"""The profile of a model: the rise of the loss of every head under every candidate.

Few heads carry most of the loss. So all heads are measured under the cheapest candidate, and the
other candidates only in the heads that carry the bulk; the rest is estimated.
"""

import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from dga_jax.calibration.measuring import HeadRises, Measurer, RowSet


def measure_profile(measurer: Measurer, rows: RowSet, tail: float) -> HeadRises:
  """The rises of all heads and candidates, with progress bars.

  Args:
    measurer: its last candidate has the smallest cache.
    rows: of the calibration.
    tail: the heads that together carry at most this share of the text's rise and of retrieval's
      are measured under the last candidate alone; see `fill_tail`. 0 measures all.

  Raises:
    FloatingPointError: a loss is NaN or infinite.
  """
  shape = (*measurer.shape, len(measurer.candidates))
  wanted = np.zeros(shape, bool)
  wanted[..., -1] = True
  rises = _measure(measurer, rows, wanted, "all heads, smallest cache")
  wanted |= find_bulk(rises, tail)[..., None]
  return fill_tail(_measure(measurer, rows, wanted, "costly heads, other candidates"))


def find_bulk(rises: HeadRises, tail: float) -> Bool[np.ndarray, "K N"]:
  """The heads outside the tail of text or of retrieval, by the rise under the last candidate."""
  bulk = np.zeros(rises.text.shape[:2], bool)
  for rise in rises:
    positive = np.maximum(rise[..., -1], 0)
    order = np.argsort(positive, axis=None)
    in_tail = np.cumsum(positive.ravel()[order]) <= tail * positive.sum()
    bulk.ravel()[order[~in_tail]] = True
  return bulk | (tail == 0)


def fill_tail(rises: HeadRises) -> HeadRises:
  """Replaces NaN: the rise under the last candidate, times the ratio of the measured heads.

  The ratio is that of the sums of the measured heads' rises under the two candidates, from 0 to 1.
  """
  return HeadRises(*map(_fill, rises))


def _fill(rise_KxNxC: Float[np.ndarray, "K N C"]) -> Float[np.ndarray, "K N C"]:
  filled, last = rise_KxNxC.copy(), rise_KxNxC[..., -1]
  for candidate in range(1, rise_KxNxC.shape[-1] - 1):
    own = rise_KxNxC[..., candidate]
    is_missing = np.isnan(own)
    least = last[~is_missing].sum()
    ratio = np.clip(own[~is_missing].sum() / least, 0, 1) if least > 0 else 1.0
    filled[..., candidate] = np.where(is_missing, ratio * last, own)
  return filled


def _measure(
  measurer: Measurer, rows: RowSet, wanted: Bool[np.ndarray, "K N C"], title: str
) -> HeadRises:
  with tqdm(total=measurer.missing(rows, wanted), desc=title, unit="pass", disable=None) as bar:
    return measurer.measure_heads(rows, wanted, bar.update)

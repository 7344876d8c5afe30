"""The profile of a model: the rise of the loss of every head under every candidate.

Few heads carry most of the loss. So all heads are measured under the cheapest candidate, and the
other candidates only in the heads that carry the bulk; the rest is estimated.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from dga_jax.calibration.measuring import HeadRises, Measurer, RowSet
from dga_jax.head_budgets import HeadSetting
from dga_jax.model.flops import setting_keys


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
  full = np.zeros(measurer.shape, int)
  wanted = np.zeros(shape, bool)
  wanted[..., -1] = True
  rises = measure_beside(measurer, rows, wanted, full, "all heads, smallest cache")
  wanted |= find_bulk(rises, tail)[..., None]
  return fill_tail(measure_beside(measurer, rows, wanted, full, "costly heads, other candidates"))


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


def rise_of(
  setting: HeadSetting,
  candidates: Sequence[HeadSetting],
  rise_KxNxC: Float[np.ndarray, "K N C"],
  length: int,
) -> Float[np.ndarray, "K N"]:
  """The rise of each head under a setting, interpolated unless it is a candidate.

  The interpolation is linear in the keys of the cache, between the candidates of the setting's own
  kind and "full". A setting with fewer keys than these has the rise of the one with the fewest.

  Args:
    setting: any; a candidate of its kind must have been measured.
    candidates: of the calibration; "full" is the first.
    rise_KxNxC: text or retrieval of `HeadRises`.
    length: L, tokens of the context.
  """
  if setting in candidates:
    return rise_KxNxC[..., candidates.index(setting)]
  known = [0, *(i for i, one in enumerate(candidates) if type(one) is type(setting))]
  known.sort(key=lambda index: setting_keys(candidates[index], length))
  keys = [setting_keys(candidates[index], length) for index in known]
  own = setting_keys(setting, length)
  above = min(int(np.searchsorted(keys, own)), len(keys) - 1)
  below = max(above - 1, 0)
  gap = keys[above] - keys[below]
  weight = min(max((own - keys[below]) / gap, 0.0), 1.0) if gap else 1.0
  low, high = rise_KxNxC[..., known[below]], rise_KxNxC[..., known[above]]
  return (1 - weight) * low + weight * high


def _fill(rise_KxNxC: Float[np.ndarray, "K N C"]) -> Float[np.ndarray, "K N C"]:
  filled, last = rise_KxNxC.copy(), rise_KxNxC[..., -1]
  for candidate in range(1, rise_KxNxC.shape[-1] - 1):
    own = rise_KxNxC[..., candidate]
    is_missing = np.isnan(own)
    least = last[~is_missing].sum()
    ratio = np.clip(own[~is_missing].sum() / least, 0, 1) if least > 0 else 1.0
    filled[..., candidate] = np.where(is_missing, ratio * last, own)
  return filled


def measure_beside(
  measurer: Measurer,
  rows: RowSet,
  wanted: Bool[np.ndarray, "K N C"],
  base: Int[np.ndarray, "K N"],
  title: str,
) -> HeadRises:
  """`Measurer.measure_heads` with a progress bar of this title."""
  missing = measurer.missing(rows, wanted, base)
  with tqdm(total=missing, desc=title, unit="pass", disable=None) as bar:
    return measurer.measure_heads(rows, wanted, base, bar.update)

"""Calibrated budgets beside baselines with the same bytes in the cache."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dga_jax.calibration.candidates import Candidate, entries, SinksAndWindow
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, HeadSetting


class Baseline(NamedTuple):
  """A set to compare with.

  Attributes:
    candidates: what `assignment` counts.
    assignment: the candidate of each KV head.
  """

  candidates: tuple[Candidate, ...]
  assignment: Int[np.ndarray, "K N"]

  def share(self, length: int) -> float:
    """Keys in the cache over the keys of a dense cache."""
    keys = np.array([entries(candidate, length) for candidate in self.candidates])
    return float(keys[self.assignment].mean() / length)


def one_setting(
  candidates: Sequence[HeadSetting], assignment: Int[np.ndarray, "K N"], length: int
) -> Baseline | None:
  """All heads under one `DGAConfig`, whose raw window uses the bytes of the set.

  Args:
    candidates: of the set; the blocks and sinks are those of the smallest candidate.
    assignment: the set.
    length: L, tokens of the context.

  Returns:
    None if the set keeps every key, or if the config exceeds its bytes without a raw window.
  """
  keys = int(_keys(candidates, assignment, length).sum() // assignment.size)
  config = min(
    (one for one in candidates if isinstance(one, DGAConfig)),
    key=lambda one: entries(one, length),
    default=None,
  )
  if config is None or keys >= length:
    return None
  without = entries(dataclasses.replace(config, local_window=0), length)
  if without > keys:
    return None
  window = (keys - without) // config.block_size
  config = dataclasses.replace(config, local_window=window)
  return Baseline((config,), np.zeros(assignment.shape, int))


def sinks_and_window(
  candidates: Sequence[HeadSetting], assignment: Int[np.ndarray, "K N"], length: int
) -> Baseline | None:
  """The same full heads; sinks and a window in all others, at the bytes of the set.

  This is DuoAttention's form (Xiao et al., arXiv 2410.10819).

  Args:
    candidates: of the set.
    assignment: the set.
    length: L, tokens of the context.

  Returns:
    None if the set has no head that is not full.
  """
  is_full_KxN = np.array([one == FULL for one in candidates])[assignment]
  if is_full_KxN.all():
    return None
  keys = int(_keys(candidates, assignment, length)[~is_full_KxN].sum() // (~is_full_KxN).sum())
  sinks = max(one.sink_tokens for one in candidates if isinstance(one, DGAConfig))
  window = SinksAndWindow(sinks, keys - sinks)
  return Baseline((FULL, window), np.where(is_full_KxN, 0, 1))


def _keys(
  candidates: Sequence[HeadSetting], assignment: np.ndarray, length: int
) -> Int[np.ndarray, "K N"]:
  """Keys in the cache of each head."""
  return np.array([entries(candidate, length) for candidate in candidates])[assignment]

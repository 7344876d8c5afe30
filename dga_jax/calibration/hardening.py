"""Head budgets from learned gates: KV heads with larger gates get settings with more keys."""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from dga_jax.calibration.candidates import head_costs, label
from dga_jax.head_budgets import FULL, HeadBudgets, HeadSetting
from dga_jax.model import ModelConfig

_ROUNDING = 1e-12  # Of a number of heads that is whole.


def compact_setting(config: ModelConfig) -> HeadSetting:
  """The setting that the gates of a model mix with full attention.

  Args:
    config: of a model with gates, under attention="dga", or under attention="head_budgets" with one
      setting in all heads.

  Raises:
    ValueError: the model has no gates, or another attention kind.
  """
  if not config.head_gates:
    raise ValueError(
      "the model has no gates: ModelConfig.head_gates is False. Train gates with "
      "--config=configs/smollm2_gates.py."
    )
  if config.attention == "dga":
    return config.dga
  if config.attention == "head_budgets" and config.head_budgets is not None:
    settings = list(config.head_budgets.counts())
    if len(settings) == 1:
      return settings[0]
  raise ValueError(
    f"the model has attention={config.attention!r}; gates become head budgets for 'dga', and for "
    "'head_budgets' with one setting in all heads."
  )


def count_full_heads(share: float, length: int, compact: HeadSetting, config: ModelConfig) -> int:
  """The largest number n of full KV heads with which the cache keeps a share of a dense one.

  n·full + (heads − n)·compact ≤ share·heads·full, in bytes of the caches of single heads.

  Args:
    share: bound on the bytes as a share of those of a dense cache.
    length: tokens of a sequence.
    compact: setting of the heads that are not full.
    config: of the model.

  Raises:
    ValueError: the compact setting in all heads exceeds the share, the share is above 1, or a
      compact head keeps as much as a full one.
  """
  full_cost, compact_cost = head_costs("bytes", (FULL, compact), config, length)
  if compact_cost >= full_cost:
    raise ValueError(
      f"the setting {label(compact)!r} keeps {compact_cost / full_cost:.3f} of a dense cache of "
      f"{length} tokens, no less than a full head: lower its window, or raise --length."
    )
  if not compact_cost <= share * full_cost <= full_cost:
    raise ValueError(
      f"the share is {share:g}; it must be from {compact_cost / full_cost:.4f}, the share of "
      f"{label(compact)!r} in all heads at {length} tokens, to 1. Change --keys, or learn gates "
      "with a smaller setting."
    )
  heads = config.num_layers * config.num_kv_heads
  num_full = heads * (share * full_cost - compact_cost) / (full_cost - compact_cost)
  return math.floor(num_full * (1 + _ROUNDING))


def harden(gates_KxN: Float[np.ndarray, "K N"], heads: Mapping[HeadSetting, int]) -> HeadBudgets:
  """Budgets in which KV heads with larger gates have earlier settings.

  Args:
    gates_KxN: of each layer and KV head, in the order of the model's heads. Of equal gates that of
      the earlier head counts as the larger one.
    heads: the number of heads of each setting, the one for the largest gates first.

  Returns:
    Budgets for the model that the gates were learned for.

  Raises:
    ValueError: the numbers do not add up to the heads of the model.
  """
  counts = list(heads.values())
  if sum(counts) != gates_KxN.size:
    raise ValueError(
      f"the settings have {' + '.join(map(str, counts))} heads; the model has {gates_KxN.size} "
      "gates. Give numbers that add up to it."
    )
  setting_of_head = np.empty(gates_KxN.size, int)
  order = np.argsort(-gates_KxN, axis=None, kind="stable")
  setting_of_head[order] = np.repeat(np.arange(len(counts)), counts)
  rows = tuple(map(tuple, setting_of_head.reshape(gates_KxN.shape).tolist()))
  return HeadBudgets(tuple(heads), rows)

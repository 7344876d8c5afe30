"""Counts of parameters, operations and visible keys equal counts by hand."""

import dataclasses

import numpy as np
import pytest

from dga_jax.cache import cache_size
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import HeadBudgets, SinkWindow
from dga_jax.model import cache_keys, flops_per_token, mean_keys, ModelConfig, parameter_count

CONFIG = ModelConfig(
  vocab_size=50,
  num_layers=3,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
)


def with_dga(**changes) -> ModelConfig:
  return dataclasses.replace(CONFIG, attention="dga", dga=DGAConfig(**changes))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_flops_of_dense_attention(tie_embeddings: bool) -> None:
  config = dataclasses.replace(CONFIG, attention="dense", tie_embeddings=tie_embeddings)
  norms = (2 * 3 + 1) * 16
  lookup = 0 if tie_embeddings else 50 * 16
  products = parameter_count(config) - norms - lookup
  # The queries of a sequence of 5 see 3 keys on average. A key costs two products of 8 channels in
  # 4 heads of 3 layers, at 2 operations per multiply-add. The backward pass costs twice as much.
  assert flops_per_token(config, 5) == 6 * products + 3 * 3 * 4 * (2 * 2 * 8) * 3


def streaming_keys_by_hand(dga: DGAConfig, i: int) -> int:
  if i < dga.sink_tokens:
    return i + 1
  blocks = {}
  for j in range(dga.sink_tokens, i + 1):
    blocks.setdefault((j - dga.sink_tokens) // dga.block_size, []).append(j)
  own = (i - dga.sink_tokens) // dga.block_size
  keys = dga.sink_tokens
  for block, tokens in blocks.items():
    raw = block == own or block >= own - dga.local_window
    keys += len(tokens) if raw else dga.focal_in_block + 1
  return keys


@pytest.mark.parametrize(
  "changes",
  [
    {"group_size": 4},
    {"group_size": 6, "focal_per_block": 2, "local_window": 2},
    {"group_size": 3, "sink_tokens": 5, "local_window": 1},
  ],
)
@pytest.mark.parametrize("length", [1, 4, 61])
def test_keys_of_streaming_selection(changes: dict, length: int) -> None:
  config = with_dga(selection="streaming", **changes)
  by_hand = [streaming_keys_by_hand(config.dga, i) for i in range(length)]
  assert mean_keys(config, length) == pytest.approx(np.mean(by_hand))


@pytest.mark.parametrize("complementary", [True, False])
def test_keys_of_global_selection(complementary: bool) -> None:
  config = with_dga(
    group_size=4, importance_rate=0.25, min_focal_tokens=0, complementary=complementary
  )
  L, keys = 32, []
  pending, groups, focal = 0, 0, 0
  for i in range(L):
    if i % 4 == 0:  # Every fourth token is focal.
      focal += 1
    else:
      pending += 1
    if pending == 4:
      pending, groups = 0, groups + 1
    keys.append(focal + groups + (pending if complementary else 0))
  assert mean_keys(config, L) == pytest.approx(np.mean(keys))
  assert mean_keys(config, L) < (L + 1) / 2


@pytest.mark.parametrize(
  "changes",
  [
    {"importance_rate": 1.0, "min_focal_tokens": 0},
    {"group_size": 1, "min_focal_tokens": 0},
    {"min_focal_tokens": 1024},
  ],
)
def test_settings_that_make_dga_dense_count_as_dense(changes: dict) -> None:
  assert mean_keys(with_dga(**changes), 200) == pytest.approx(100.5)


def test_an_empty_context_is_an_error() -> None:
  with pytest.raises(ValueError, match="context_length is 0"):
    mean_keys(CONFIG, 0)


def test_head_budgets_are_averages_over_heads() -> None:
  dga = DGAConfig(selection="streaming", group_size=6, sink_tokens=2, local_window=1)
  budgets = HeadBudgets(("full", dga, DGAConfig(selection="streaming")), ((0, 1), (1, 1), (0, 1)))
  config = dataclasses.replace(CONFIG, attention="head_budgets", head_budgets=budgets)
  dense = dataclasses.replace(CONFIG, attention="dense")
  other = dataclasses.replace(CONFIG, attention="dga", dga=dga)
  want = (2 * mean_keys(dense, 300) + 4 * mean_keys(other, 300)) / 6
  assert mean_keys(config, 300) == pytest.approx(want)
  assert cache_keys(dense, 300) == 300
  assert cache_keys(other, 300) == cache_size(config=dga, max_length=300).total
  assert cache_keys(config, 300) == pytest.approx((600 + 4 * cache_keys(other, 300)) / 6)
  windows = HeadBudgets((SinkWindow(9, sinks=2), SinkWindow(400)), ((0, 0), (0, 1), (0, 1)))
  config = dataclasses.replace(config, head_budgets=windows)
  seen = [4 * min(i + 1, 11) + 2 * min(i + 1, 404) for i in range(300)]
  assert mean_keys(config, 300) == pytest.approx(np.mean(seen) / 6)
  assert cache_keys(config, 300) == pytest.approx((4 * 11 + 2 * 300) / 6)
  with pytest.raises(ValueError, match="cache_keys counts 'dense'"):
    cache_keys(CONFIG, 300)

"""Ablations: replaced parts of DGA equal dense masks, and layers run one by one equal the model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax.config import DGAConfig
from dga_jax.evaluation.ablation import AblatedDGA, focal_by_score, received_later, swaps
from dga_jax.evaluation.layerwise import losses_by_kinds
from dga_jax.evaluation.losses import teacher_forced
from dga_jax.evaluation.variants import Variant
from dga_jax.model.attention_kinds.dense import DenseAttention
from dga_jax.model.attention_kinds.dga import DynamicGroupAttention
from tests.dga_jax.evaluation.tiny import CONFIG, family

DGA = DGAConfig(
  selection="streaming", group_size=3, focal_per_block=1, sink_tokens=2, local_window=1
)
B, L, H, N, D = 2, 31, 4, 2, 8
QKV = tuple(
  jnp.asarray(np.random.default_rng(0).normal(size=(B, L, heads, D)), jnp.float32)
  for heads in (H, N, N)
)


def attend(kind: object) -> np.ndarray:
  return np.asarray(jax.jit(kind)(*QKV))


def masked(seen: np.ndarray) -> np.ndarray:
  """Attention in NumPy under a mask [L, L]."""
  q, k, v = (np.asarray(x, np.float64) for x in QKV)
  k, v = (np.repeat(x, H // N, axis=2) for x in (k, v))
  logits = np.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D)
  weights = np.exp(np.where(seen, logits, -np.inf))
  weights /= weights.sum(axis=-1, keepdims=True)
  return np.einsum("bhij,bjhd->bihd", weights, v)


def raw(i: int, j: int) -> bool:
  """Whether query i sees token j unmerged, with blocks of 4, 2 sinks and a window of one block."""
  return j <= i and (j < 2 or i < 2 or (j - 2) // 4 >= (i - 2) // 4 - 1)


def test_the_unchanged_ablation_equals_the_kind() -> None:
  np.testing.assert_allclose(attend(AblatedDGA(DGA)), attend(DynamicGroupAttention(DGA)), atol=1e-6)


def test_hidden_summaries_leave_sinks_and_window() -> None:
  seen = np.array([[raw(i, j) for j in range(L)] for i in range(L)])
  alone = attend(AblatedDGA(DGA, merging="hidden", focal=False))
  np.testing.assert_allclose(alone, masked(seen), atol=2e-5)


def test_groups_of_one_token_give_dense_attention() -> None:
  """The mean of a group of one token is that token, for every selection."""
  single = dataclasses.replace(DGA, group_size=1)
  for selection in ("oracle", "random"):
    o = attend(AblatedDGA(single, selection=selection, merging="mean"))
    np.testing.assert_allclose(o, masked(np.tril(np.ones((L, L), bool))), atol=2e-5)


def test_the_oracle_sums_the_attention_of_later_queries() -> None:
  q, k, _ = (np.asarray(x, np.float64) for x in QKV)
  expected = np.zeros((B, N, L))
  for b, i, h in np.ndindex(B, L, H):
    paid = np.exp(k[b, : i + 1, h // 2] @ q[b, i, h] / math.sqrt(D))
    for j, weight in enumerate(paid / paid.sum()):
      # Sinks precede the first block, so their scores are not used.
      if j >= 2 and not raw(i, j):
        expected[b, h // 2, j] += weight
  received = np.asarray(received_later(QKV[0], QKV[1], DGA))
  np.testing.assert_allclose(received[..., 2:], expected[..., 2:], atol=1e-5)


def test_focal_tokens_have_the_highest_score_of_their_block() -> None:
  scores = np.random.default_rng(1).random((1, 1, 12))
  focal = np.asarray(focal_by_score(jnp.asarray(scores), DGA))[0, 0]
  assert focal[:2].all()
  for start in (2, 6):
    block = scores[0, 0, start : start + 4]
    np.testing.assert_array_equal(focal[start : start + 4], block == block.max())
  assert not focal[10:].any()


def test_every_replaced_part_changes_the_result() -> None:
  results = {name: attend(kind) for name, kind in swaps(DGA).items()}
  own = results.pop("as configured")
  assert len(results) == 9
  for name, o in results.items():
    assert np.isfinite(o).all(), name
    assert np.abs(o - own).max() > 1e-3, name


def test_ablations_need_streaming_selection_and_unpadded_rows() -> None:
  with pytest.raises(ValueError, match=r"config\.selection is 'global'"):
    AblatedDGA(DGAConfig())
  with pytest.raises(ValueError, match="whole rows"):
    AblatedDGA(DGA)(*QKV, lengths=jnp.array([3, 4]))


def test_layers_run_one_by_one_equal_the_model() -> None:
  models = family()
  rows = np.random.default_rng(2).integers(0, 257, (2, 33), dtype=np.int32)
  dense, own = DenseAttention(), AblatedDGA(CONFIG.dga)
  model = models.model(Variant("v"), 32)
  for kind, variant in ((dense, Variant("v", {"attention": "dense"})), (own, Variant("v"))):
    expected = teacher_forced(models.graphdef(variant, 32), models.params, rows)
    np.testing.assert_allclose(losses_by_kinds(model, [kind] * 2, rows), expected, atol=1e-5)
  mixed = losses_by_kinds(model, [dense, own], rows)
  assert np.abs(mixed - losses_by_kinds(model, [own, dense], rows)).max() > 1e-4
  with pytest.raises(ValueError, match="kinds has 1 entries; it must have 2"):
    losses_by_kinds(model, [dense], rows)

"""The solver against every assignment of small instances, and the correction."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dga_jax.calibration.allocation import allocate, Bounds, count_rows, Near, Scale, with_prior
from dga_jax.calibration.correction import correct
from dga_jax.calibration.measuring import Divergence, HeadRises


def not_measured(choice: np.ndarray) -> np.ndarray:
  raise AssertionError("no refinement is wanted")


def settings(most: int) -> Bounds:
  """A bound on settings alone: a layer has one head, so that rows are settings."""
  return Bounds(kv_heads=1, rows=most, settings=most)


ANY = settings(4)
UNREFINED: dict[str, Any] = {"measure_beside": not_measured, "refinements": 0}


@st.composite
def instances(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float, int]:
  heads, candidates = draw(st.integers(1, 5)), draw(st.integers(2, 4))
  numbers = st.integers(0, 1000)
  damage = [[draw(numbers) / 100 for _ in range(candidates)] for _ in range(heads)]
  cost = np.array([draw(st.integers(1, 500)) for _ in range(candidates)], float)
  budget = draw(st.integers(heads * int(cost.min()), heads * int(cost.max())))
  return np.array(damage), cost, float(budget), draw(st.integers(1, candidates))


def best_by_force(damage: np.ndarray, cost: np.ndarray, budget: float, most: int) -> float:
  heads = np.arange(len(damage))
  return min(
    damage[heads, choice].sum()
    for choice in map(np.array, itertools.product(range(len(cost)), repeat=len(damage)))
    if cost[choice].sum() <= budget and len(set(choice.tolist())) <= most
  )


@given(instances())
def test_the_allocation_is_the_best_of_all(instance: tuple[np.ndarray, np.ndarray, float, int]):
  damage, cost, budget, most = instance
  choice = allocate(damage, cost, budget, settings(most))
  assert cost[choice].sum() <= budget
  assert len(set(choice.tolist())) <= most
  total = damage[np.arange(len(damage)), choice].sum()
  assert total == pytest.approx(best_by_force(damage, cost, budget, most), rel=1e-5, abs=1e-9)


def test_a_large_budget_is_kept_exactly() -> None:
  rng = np.random.default_rng(0)
  damage = np.sort(rng.exponential(size=(1024, 5)), axis=1)
  cost = np.array([131072, 30011, 20011, 14003, 9001], float)
  budget = 0.25 * 1024 * cost[0]
  choice = allocate(damage, cost, budget, ANY)
  assert 0.999 * budget < cost[choice].sum() <= budget
  assert len(set(choice.tolist())) <= 4


@given(instances(), st.integers(0, 5), st.integers(0, 2**16))
def test_an_allocation_near_another_changes_at_most_so_many_heads(instance, heads, seed) -> None:
  damage, cost, budget, most = instance
  other = allocate(np.random.default_rng(seed).random(damage.shape), cost, budget, settings(most))
  near = Near(other, heads)
  choice = allocate(damage, cost, budget, settings(most), near=near)
  assert (choice != other).sum() <= heads
  assert cost[choice].sum() <= budget
  rows = np.arange(len(damage))
  assert damage[rows, choice].sum() <= damage[rows, other].sum() + 1e-4 * damage.sum() + 1e-9
  if heads >= len(damage):
    best = best_by_force(damage, cost, budget, most)
    assert damage[rows, choice].sum() == pytest.approx(best, rel=1e-5, abs=1e-9)


def test_more_heads_may_change_in_layers_with_many_heads() -> None:
  # 32 heads have too many multisets to list all rows: those of the other allocation are tried.
  rng = np.random.default_rng(0)
  damage, cost = rng.random((4 * 32, 4)), np.array([8.0, 4, 2, 1])
  bounds = Bounds(kv_heads=32, rows=2)
  base = allocate(rng.random(damage.shape), cost, 450, bounds)
  heads = np.arange(len(damage))
  sums = []
  for most in (2, 8):
    near = allocate(damage, cost, 450, bounds, near=Near(base, most))
    assert count_rows(near, 32) <= 2
    sums.append(damage[heads, near].sum())
  assert sums[1] + 1 < sums[0] < damage[heads, base].sum() - 1


def test_an_impossible_budget_names_the_remedy() -> None:
  with pytest.raises(ValueError, match=r"cheapest candidate in all heads costs 20: raise --keys"):
    allocate(np.zeros((4, 2)), np.array([10.0, 5.0]), 19, ANY)


def test_equal_damages_keep_more() -> None:
  damage = with_prior(np.zeros((3, 3)), np.array([10.0, 4, 2]))
  assert allocate(damage, np.array([10.0, 4, 2]), 30, ANY).tolist() == [0, 0, 0]
  assert allocate(damage, np.array([10.0, 4, 2]), 12, ANY).tolist() == [1, 1, 1]


def test_damage_is_the_sum_of_two_shares() -> None:
  text = np.array([[[0.0, 0.1, 0.2], [0, -0.1, 0.6]]])
  retrieval = np.array([[[0.0, 1, 3], [0, 0, 1]]])
  rises = HeadRises(text, retrieval)
  scale = Scale.from_rises(rises)
  assert scale == pytest.approx((0.8, 4))
  expected = [[[0, 0.125 + 0.25, 0.25 + 0.75], [0, 0, 0.75 + 0.25]]]
  np.testing.assert_allclose(scale.damage(rises), expected)
  assert scale.score(Divergence(text=0.4, retrieval=1.0)) == pytest.approx(0.5 + 0.25)
  assert Scale.from_rises(HeadRises(0 * text, -retrieval)) == (1.0, 1.0)


def test_correction_finds_what_damages_alone_do_not_tell() -> None:
  # Heads 0 and 1 cost little alone and much together; two of four heads may be full.
  damage = np.array([[0, 0.1], [0, 0.1], [0, 0.3], [0, 0.2]])
  cost = np.array([10.0, 2])

  def measure(choice: np.ndarray) -> float:
    alone = damage[np.arange(4), choice].sum()
    return alone + 5 * (choice[0] == 1 and choice[1] == 1)

  first = allocate(damage, cost, 24, ANY)
  assert first.tolist() == [1, 1, 0, 0]
  corrected = correct(
    first, measure(first), damage, cost, 24, ANY, measure=measure, rounds=8, **UNREFINED
  )
  assert corrected.choice.tolist() == [0, 1, 0, 1]
  assert corrected.score == measure(corrected.choice) == pytest.approx(0.3)
  assert corrected.accepted == 1
  assert 1 <= corrected.tried <= 8


def test_damages_beside_a_set_move_many_heads_at_once() -> None:
  # The first damages order the heads the wrong way round.
  true = np.stack([np.zeros(8), np.arange(8.0), np.full(8, np.inf)], axis=1)
  first_damage = np.stack([np.zeros(8), np.arange(8.0)[::-1], np.full(8, 9.0)], axis=1)
  cost = np.array([10.0, 2, 1])
  start = allocate(first_damage[:, :2], cost[:2], 4 * 10 + 4 * 2, ANY)
  assert start.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
  bases = []

  def beside(choice: np.ndarray) -> np.ndarray:
    bases.append(choice.tolist())
    return true - true[np.arange(8), choice][:, None]

  corrected = correct(
    start,
    22,
    first_damage,
    cost,
    48,
    ANY,
    measure=lambda choice: float(true[np.arange(8), choice].sum()),
    rounds=0,
    measure_beside=beside,
    refinements=5,
  )
  # The second refinement finds nothing better, so there is no third.
  assert bases == [start.tolist(), [1, 1, 1, 1, 0, 0, 0, 0]]
  assert corrected.choice.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
  assert (corrected.score, corrected.accepted) == (6, 1)


@given(instances(), st.integers(1, 3), st.integers(1, 3))
def test_the_allocation_with_few_rows_is_the_best_of_all(instance, kv_heads, most_rows) -> None:
  damage, cost, budget, _ = instance
  damage = np.tile(damage, (kv_heads, 1))[: len(damage) // kv_heads * kv_heads or kv_heads]
  heads = len(damage)
  budget = max(budget * heads / len(instance[0]), heads * cost.min())
  bounds = Bounds(kv_heads, most_rows, settings=len(cost))
  choice = allocate(damage, cost, budget, bounds)
  assert cost[choice].sum() <= budget
  assert count_rows(choice, kv_heads) <= most_rows
  # The settings are those of the solution without the bound on rows.
  used = np.unique(allocate(damage, cost, budget, bounds._replace(rows=heads)))
  best = min(
    damage[np.arange(heads), other].sum()
    for other in map(np.array, itertools.product(used, repeat=heads))
    if cost[other].sum() <= budget and count_rows(other, kv_heads) <= most_rows
  )
  assert damage[np.arange(heads), choice].sum() == pytest.approx(best, rel=2e-3, abs=1e-9)


def test_layers_of_many_heads_choose_among_the_rows_of_prices() -> None:
  rng = np.random.default_rng(0)
  damage = rng.exponential(size=(6 * 16, 1)) * np.array([0, 0.1, 0.5, 1.0])
  cost = np.array([100.0, 40, 10, 4])
  bounds = Bounds(kv_heads=16, rows=3)
  choice = allocate(damage, cost, 0.3 * 96 * 100, bounds)
  assert count_rows(choice, 16) == 3
  assert 0.25 * 96 * 100 < cost[choice].sum() <= 0.3 * 96 * 100
  free = allocate(damage, cost, 0.3 * 96 * 100, bounds._replace(rows=6))
  total, least = (damage[np.arange(96), one].sum() for one in (choice, free))
  assert least < total < 1.2 * least


@given(instances(), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_correction_keeps_the_budget_and_never_loses(
  instance: tuple[np.ndarray, np.ndarray, float, int], rounds: int, seed: int
) -> None:
  damage, cost, budget, most = instance
  first = allocate(damage, cost, budget, settings(most))
  measured: dict[bytes, float] = {}

  def measure(choice: np.ndarray) -> float:
    assert cost[choice].sum() <= budget
    assert choice.tobytes() not in measured, "a set is measured once"
    rng = np.random.default_rng([seed, *choice.tolist()])
    return measured.setdefault(choice.tobytes(), rng.random())

  before = measure(first)
  corrected = correct(
    first,
    before,
    damage,
    cost,
    budget,
    settings(most),
    measure=measure,
    rounds=rounds,
    **UNREFINED,
  )
  assert corrected.tried == len(measured) - 1 <= rounds
  assert corrected.score == min(measured.values()) == measured[corrected.choice.tobytes()]
  assert set(corrected.choice.tolist()) <= set(first.tolist())

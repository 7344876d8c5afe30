"""The solver against every assignment of small instances, and the correction."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dga_jax.calibration.allocation import allocate, Near, Scale, with_prior
from dga_jax.calibration.candidates import make_grid
from dga_jax.calibration.correction import correct, Corrected
from dga_jax.calibration.measuring import Divergence, HeadRises, SetLoss
from dga_jax.calibration.starts import make_starts
from dga_jax.head_budgets import SinkWindow
from dga_jax.model.flops import setting_keys


def not_measured(choice: np.ndarray) -> np.ndarray:
  raise AssertionError("no refinement is wanted")


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
  choice = allocate(damage, cost, budget, max_settings=most)
  assert cost[choice].sum() <= budget
  assert len(set(choice.tolist())) <= most
  total = damage[np.arange(len(damage)), choice].sum()
  assert total == pytest.approx(best_by_force(damage, cost, budget, most), rel=1e-5, abs=1e-9)


def test_a_large_budget_is_kept_exactly() -> None:
  rng = np.random.default_rng(0)
  damage = np.sort(rng.exponential(size=(1024, 5)), axis=1)
  cost = np.array([131072, 30011, 20011, 14003, 9001], float)
  budget = 0.25 * 1024 * cost[0]
  choice = allocate(damage, cost, budget)
  assert 0.999 * budget < cost[choice].sum() <= budget
  assert len(set(choice.tolist())) <= 4


@given(instances(), st.integers(0, 5), st.integers(0, 2**16))
def test_an_allocation_near_another_changes_at_most_so_many_heads(instance, heads, seed) -> None:
  damage, cost, budget, most = instance
  other = allocate(
    np.random.default_rng(seed).random(damage.shape), cost, budget, max_settings=most
  )
  near = Near(other, heads)
  choice = allocate(damage, cost, budget, max_settings=most, near=near)
  assert (choice != other).sum() <= heads
  assert cost[choice].sum() <= budget
  rows = np.arange(len(damage))
  assert damage[rows, choice].sum() <= damage[rows, other].sum() + 1e-4 * damage.sum() + 1e-9
  if heads >= len(damage):
    best = best_by_force(damage, cost, budget, most)
    assert damage[rows, choice].sum() == pytest.approx(best, rel=1e-5, abs=1e-9)


def test_an_impossible_budget_names_the_remedy() -> None:
  with pytest.raises(ValueError, match=r"cheapest candidate in all heads costs 20: raise --keys"):
    allocate(np.zeros((4, 2)), np.array([10.0, 5.0]), 19)


def test_equal_damages_keep_more() -> None:
  damage = with_prior(np.zeros((3, 3)), np.array([10.0, 4, 2]))
  assert allocate(damage, np.array([10.0, 4, 2]), 30).tolist() == [0, 0, 0]
  assert allocate(damage, np.array([10.0, 4, 2]), 12).tolist() == [1, 1, 1]


def test_damage_is_the_sum_of_two_shares() -> None:
  text = np.array([[[0.0, 0.1, 0.2], [0, -0.1, 0.6]]])
  retrieval = np.array([[[0.0, 1, 3], [0, 0, 1]]])
  rises = HeadRises(text, retrieval)
  scale = Scale.from_rises(rises)
  assert scale == pytest.approx((0.8, 4))
  expected = [[[0, 0.125 + 0.25, 0.25 + 0.75], [0, 0, 0.75 + 0.25]]]
  np.testing.assert_allclose(scale.damage(rises), expected)
  measured = SetLoss(2.4, 0.0, 4, 4, Divergence(text=0.4, retrieval=1.0))
  assert scale.score(measured) == pytest.approx(0.5 + 0.25)
  assert Scale.from_rises(HeadRises(0 * text, -retrieval)) == (1.0, 1.0)


def test_correction_finds_what_damages_alone_do_not_tell() -> None:
  # Heads 0 and 1 cost little alone and much together; two of four heads may be full.
  damage = np.array([[0, 0.1], [0, 0.1], [0, 0.3], [0, 0.2]])
  cost = np.array([10.0, 2])

  def measure(choice: np.ndarray) -> float:
    alone = damage[np.arange(4), choice].sum()
    return alone + 5 * (choice[0] == 1 and choice[1] == 1)

  first = allocate(damage, cost, 24)
  assert first.tolist() == [1, 1, 0, 0]
  corrected = correct([first], damage, cost, 24, measure=measure, rounds=8, **UNREFINED)
  assert corrected.choice.tolist() == [0, 1, 0, 1]
  assert corrected.score == measure(corrected.choice) == pytest.approx(0.3)
  assert corrected.accepted == 1
  assert 1 <= corrected.tried <= 8


def test_damages_beside_a_set_move_many_heads_at_once() -> None:
  # The first damages order the heads the wrong way round.
  true = np.stack([np.zeros(8), np.arange(8.0), np.full(8, np.inf)], axis=1)
  first_damage = np.stack([np.zeros(8), np.arange(8.0)[::-1], np.full(8, 9.0)], axis=1)
  cost = np.array([10.0, 2, 1])
  start = allocate(first_damage[:, :2], cost[:2], 4 * 10 + 4 * 2)
  assert start.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
  bases = []

  def beside(choice: np.ndarray) -> np.ndarray:
    bases.append(choice.tolist())
    return true - true[np.arange(8), choice][:, None]

  corrected = correct(
    [np.ones(8, int), start],
    first_damage,
    cost,
    48,
    measure=lambda choice: float(true[np.arange(8), choice].sum()),
    rounds=0,
    measure_beside=beside,
    refinements=5,
  )
  # The second refinement finds nothing better, so there is no third.
  assert bases == [start.tolist(), [1, 1, 1, 1, 0, 0, 0, 0]]
  assert corrected.choice.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
  assert corrected.starts == (28, 22)
  assert (corrected.start, corrected.score, corrected.accepted) == (1, 6, 1)


def test_the_better_of_two_corrections_has_the_changes_of_both() -> None:
  first = Corrected(np.array([0, 1]), 0.5, 2, (0.9, 0.8, 0.6), tried=4, accepted=1)
  second = Corrected(np.array([1, 0]), 0.4, 0, (0.9,), tried=3, accepted=2)
  best = first.best(second, start=0)
  assert best.choice.tolist() == [1, 0]
  assert best[1:] == (0.4, 0, (0.9, 0.8, 0.6), 7, 3)
  worse = first.best(second._replace(score=0.7), start=0)
  assert worse.choice.tolist() == [0, 1]
  assert worse[1:] == (0.5, 2, (0.9, 0.8, 0.6), 7, 3)


def test_starts_are_within_the_budget() -> None:
  length, shape = 512, (4, 3)
  grid = make_grid([(30, 2)], [0, 96], 4, length)
  cost = np.array([4.0 * setting_keys(one, length) for one in grid])
  damage = np.random.default_rng(0).random((12, 1)) * (1 - cost / cost[0])[None]
  budget = 0.4 * 12 * cost[0]
  starts = make_starts(grid, damage, cost, budget, shape, length=length, equal_bytes=True)
  names = [start.name for start in starts]
  assert (names[0], names[-1]) == ("solver", "one DGA setting")
  assert len(starts) == 5  # One for each of two windows, and one with the solver's full heads.
  for _, one in starts:
    assert one.share(length) <= 0.4
    assert one.share(length) > 0.37 or len(one.candidates) == 1
  for _, one in starts[1:-1]:
    assert isinstance(one.candidates[1], SinkWindow)
    assert one.candidates[1].sinks == 4
  others = make_starts(grid, damage, cost, budget, shape, length=length, equal_bytes=False)
  assert [one.candidates == grid for _, one in others] == [True] * len(others)


@given(instances(), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_correction_keeps_the_budget_and_never_loses(
  instance: tuple[np.ndarray, np.ndarray, float, int], rounds: int, seed: int
) -> None:
  damage, cost, budget, most = instance
  first = allocate(damage, cost, budget, max_settings=most)
  measured: dict[bytes, float] = {}

  def measure(choice: np.ndarray) -> float:
    assert cost[choice].sum() <= budget
    assert choice.tobytes() not in measured, "a set is measured once"
    rng = np.random.default_rng([seed, *choice.tolist()])
    return measured.setdefault(choice.tobytes(), rng.random())

  cheapest = np.full(len(damage), cost.argmin())
  corrected = correct(
    [first, cheapest], damage, cost, budget, measure=measure, rounds=rounds, **UNREFINED
  )
  starts = {first.tobytes(), cheapest.tobytes()}
  assert corrected.tried == len(measured) - len(starts) <= rounds
  assert corrected.score == min(measured.values()) == measured[corrected.choice.tobytes()]
  assert corrected.score <= min(corrected.starts)
  start = (first, cheapest)[corrected.start]
  assert set(corrected.choice.tolist()) <= set(start.tolist())

"""The solver against every assignment of small instances, and the correction."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dga_jax.calibration.allocation import allocate, Scale, with_prior
from dga_jax.calibration.correction import correct
from dga_jax.calibration.measuring import HeadRises, SetLoss


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
  dense = SetLoss(2.0, 1.0, 3, 4)
  assert scale.score(SetLoss(2.4, 0.0, 4, 4), dense) == pytest.approx(0.5 - 0.25)
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
  corrected = correct(first, damage, cost, 24, measure=measure, rounds=8)
  assert corrected.choice.tolist() == [0, 1, 0, 1]
  assert corrected.score == measure(corrected.choice) == pytest.approx(0.3)
  assert corrected.accepted == 1
  assert 1 <= corrected.tried <= 8


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

  corrected = correct(first, damage, cost, budget, measure=measure, rounds=rounds)
  assert corrected.tried == len(measured) - 1 <= rounds
  assert corrected.score == min(measured.values()) == measured[corrected.choice.tobytes()]
  assert set(corrected.choice.tolist()) <= set(first.tolist())

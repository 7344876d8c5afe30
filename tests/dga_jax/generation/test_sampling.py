"""Sampling: filters, seeds, and the independence of the sequences of a batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax.generation.sampling import NOT_FINITE, sample, Sampling, SamplingParams

PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3])
DRAWS = 2000
# A share of DRAWS draws has a standard deviation of at most this.
DEVIATION = 0.5 / np.sqrt(DRAWS)


def draw(how: Sampling, count: int = DRAWS) -> np.ndarray:
  """`count` sampled tokens."""
  logits = jnp.broadcast_to(jnp.log(jnp.array(PROBABILITIES, jnp.float32)), (count, 4))
  return np.asarray(sample(logits, SamplingParams.from_samplings([how] * count), jnp.arange(count)))


@pytest.mark.parametrize(
  ("filters", "kept"),
  [
    ({"top_p": 1.0}, [0, 1, 2, 3]),
    ({"top_p": 0.7}, [1, 3]),
    ({"top_p": 0.81}, [0, 1, 3]),
    ({"top_p": 1.0, "top_k": 1}, [1]),
    ({"top_p": 1.0, "top_k": 3}, [0, 1, 3]),
    ({"top_p": 1.0, "min_p": 0.2}, [0, 1, 3]),
    ({"top_p": 1.0, "min_p": 0.5}, [1, 3]),
    # Of the two that top_k leaves the first holds 0.625.
    ({"top_p": 0.62, "top_k": 2}, [1]),
  ],
)
def test_filters_leave_the_likeliest_in_their_proportions(filters, kept):
  drawn = draw(Sampling(temperature=1.0, **filters))
  shares = np.bincount(drawn, minlength=4) / drawn.size
  want = np.where(np.isin(np.arange(4), kept), PROBABILITIES, 0)
  np.testing.assert_allclose(shares, want / want.sum(), atol=3.5 * DEVIATION)
  assert set(drawn) == set(kept)


def test_temperature_sharpens():
  shares = np.bincount(draw(Sampling(temperature=0.5, top_p=1.0)), minlength=4) / DRAWS
  want = PROBABILITIES**2 / (PROBABILITIES**2).sum()
  np.testing.assert_allclose(shares, want, atol=3.5 * DEVIATION)


def test_a_sequence_draws_alone_what_it_draws_among_others():
  hows = [
    Sampling(temperature=0.0),
    Sampling(temperature=1.0, top_p=1.0, seed=3),
    Sampling(temperature=2.0, top_p=0.9, min_p=0.1, seed=4),
    Sampling(temperature=1.0, top_k=2, seed=3),
  ]
  logits = jnp.log(jnp.array([PROBABILITIES] * 4, jnp.float32))
  steps = jnp.array([0, 5, 6, 7])
  together = sample(logits, SamplingParams.from_samplings(hows), steps)
  for row, how in enumerate(hows):
    alone = sample(
      logits[row : row + 1], SamplingParams.from_samplings([how]), steps[row : row + 1]
    )
    assert alone[0] == together[row]
  assert together[0] == 1


@pytest.mark.parametrize(
  "options",
  [
    {"temperature": -1.0},
    {"temperature": 1e-40},
    {"top_k": -1},
    {"top_k": 2**31},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"min_p": 2.0},
    {"seed": -1},
    {"seed": 2**32},
  ],
)
def test_bad_sampling(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    Sampling(**options)


def test_seeds_wrap_around_at_32_bits():
  assert Sampling(seed=2**32 - 1).with_offset(0).seed == 2**32 - 1
  assert Sampling(seed=2**32 - 1).with_offset(1).seed == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_give_no_token(temperature, value):
  params = SamplingParams.from_samplings([Sampling(temperature=temperature)] * 2)
  logits = jnp.zeros((2, 4)).at[0, 2].set(value)
  tokens = sample(logits, params, jnp.zeros(2, jnp.int32))
  assert tokens[0] == NOT_FINITE
  assert tokens[1] == sample(jnp.zeros((2, 4)), params, jnp.zeros(2, jnp.int32))[1] >= 0

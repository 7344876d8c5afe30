"""Bad steps are detected and change no parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.bad_steps import choose, Guard, is_good, new_guard, seen
from train.config import GuardConfig


def judge(config: GuardConfig, losses: list[float]) -> list[bool]:
  """For each loss, whether it is good given the losses before it."""

  def step(guard: Guard, loss: jax.Array) -> tuple[Guard, jax.Array]:
    good = is_good(config, guard, loss, jnp.float32(1), jnp.float32(1))
    return seen(guard, loss, good), good

  _, good = jax.lax.scan(step, new_guard(config), jnp.array(losses, jnp.float32))
  return good.tolist()


def test_a_spike_exceeds_the_recent_good_losses() -> None:
  rng = np.random.default_rng(0)
  losses = [*(3 + 0.1 * rng.standard_normal(40))]
  losses[3] = 50.0  # The window is not full yet.
  losses[20] = losses[25] = 4.0  # 10 standard deviations; the first must not hide the second.
  losses[30] = 0.5  # A low loss is not a spike.
  config = GuardConfig(spike_sigmas=6.0, spike_window=8)
  bad = [index for index, good in enumerate(judge(config, losses)) if not good]
  assert bad == [20, 25]
  assert all(judge(GuardConfig(spike_window=8), losses))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_non_finite_values_are_bad(value: float) -> None:
  config = GuardConfig()
  guard = new_guard(config)
  good, bad = jnp.float32(1), jnp.float32(value)
  assert is_good(config, guard, good, good, good)
  for index in range(3):
    numbers = [good, good, good]
    numbers[index] = bad
    assert not is_good(config, guard, *numbers)
  after = seen(guard, bad, jnp.bool(False))
  assert after.count == 0
  assert jnp.isfinite(after.losses).all()


def test_a_bad_step_updates_only_the_counts() -> None:
  old = {"moment": jnp.ones(3), "count": jnp.int32(4)}
  new = {"moment": jnp.full(3, jnp.nan), "count": jnp.int32(5)}
  kept = choose(jnp.bool(False), new, old)
  np.testing.assert_array_equal(kept["moment"], old["moment"])
  assert kept["count"] == 5
  assert jnp.isnan(choose(jnp.bool(True), new, old)["moment"]).all()


@pytest.mark.parametrize(
  ("changes", "name"),
  [
    ({"policy": "ignore"}, "policy"),
    ({"spike_sigmas": 0.0}, "spike_sigmas"),
    ({"spike_window": 1}, "spike_window"),
    ({"max_skipped": 0}, "max_skipped"),
  ],
)
def test_invalid_settings_are_errors(changes: dict, name: str) -> None:
  with pytest.raises(ValueError, match=rf"GuardConfig\.{name} is"):
    GuardConfig(**changes)

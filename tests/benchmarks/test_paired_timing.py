"""Programs are compiled in threads; one that cannot run is reported and the others are timed."""

import jax
import jax.numpy as jnp

from benchmarks._paired_timing import compare, compile_in_threads, TimedProgram


def _inputs(key: jax.Array) -> tuple[jax.Array]:
  return (jax.random.normal(key, (8,)),)


def _cos(x: jax.Array) -> jax.Array:
  return jnp.cos(x)


def _refuses(x: jax.Array) -> jax.Array:
  raise NotImplementedError("head_dim is 8\nmore")


PROGRAMS = {
  "jitted": TimedProgram(jax.jit(jnp.sin), jax.jit(_inputs)),
  "refused": TimedProgram(jax.jit(_refuses), jax.jit(_inputs)),
  "plain": TimedProgram(_cos, _inputs),
}


def test_jitted_programs_are_compiled_and_others_stay():
  compiled, refused = compile_in_threads(PROGRAMS)
  assert refused == {"refused": "head_dim is 8"}
  assert list(compiled) == ["jitted", "plain"]
  assert compiled["plain"] is PROGRAMS["plain"]
  (x,) = _inputs(jax.random.key(3))
  assert not hasattr(compiled["jitted"].run, "lower")
  assert (compiled["jitted"].run(x) == jax.jit(jnp.sin)(x)).all()


def test_every_program_that_runs_is_timed():
  timings, refused = compare(PROGRAMS, rounds=3, repeats=2, seed=0)
  assert set(timings) == {"jitted", "plain"}
  assert set(refused) == {"refused"}
  assert all(0 < t.minimum <= t.median <= t.maximum for t in timings.values())

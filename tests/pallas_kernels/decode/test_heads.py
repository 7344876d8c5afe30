"""How the kernel that decodes all heads of a layer divides them among programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode import TokenArrays, TokenHeads, TokenRows
from pallas_kernels.decode.triton_heads import class_steps, place_of, tiles_of_program
from pallas_kernels.decode.triton_split import Tile
from pallas_kernels.head_range import HeadRange

TILE = Tile()
FULL, OTHERS = HeadRange(0, 3), HeadRange(3, 29)


def classes(batch: int, context: int) -> list[TokenHeads]:
  """Heads with all tokens, and heads with sinks and a ring of 1088 tokens."""

  def array(heads: HeadRange, entries: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, batch, heads.size, entries, 128), "bfloat16")

  full = TokenArrays(TokenRows(*[array(FULL, context)] * 2))
  ring = TokenArrays(TokenRows(*[array(OTHERS, 1088)] * 2), TokenRows(*[array(OTHERS, 4)] * 2))
  length = jax.ShapeDtypeStruct((1, batch), "int32")
  return [TokenHeads(FULL, full, length, False), TokenHeads(OTHERS, ring, length, True)]


@pytest.mark.parametrize(
  ("batch", "context", "rounds"), [(1, 4096, 1), (1, 16384, 1), (4, 16384, 2), (4, 32768, 2)]
)
def test_programs_fit_the_gpu_and_fewer_tiles_each_would_not(batch: int, context: int, rounds: int):
  own, slots = classes(batch, context), TILE.slots * rounds
  steps = class_steps(own, batch, R=1, scale=0.1, tile=TILE)
  most = max(tiles_of_program(one, step.step, TILE) for one, step in zip(own, steps, strict=True))

  def programs(most: int) -> int:
    """The fewest programs that read at most `most` tiles each."""
    return batch * (FULL.size * -(-context // 64 // most) + OTHERS.size * -(-18 // most))

  assert batch * sum(one.programs for one in steps) <= slots
  assert most == 2 or programs(most - 1) > slots


def test_a_head_has_one_program_where_heads_alone_fill_the_gpu():
  steps = class_steps(classes(64, 16384), 64, R=1, scale=0.1, tile=TILE)
  assert [one.step.programs for one in steps] == [1, 1]


def test_every_program_has_one_part_of_one_head():
  steps = class_steps(classes(1, 16384), 1, R=1, scale=0.1, tile=TILE)
  total = sum(one.programs for one in steps)
  n, p = jax.vmap(lambda t: place_of(steps, t))(jnp.arange(total, dtype=jnp.int32))
  programs = [steps[0].step.programs] * 3 + [steps[1].step.programs] * 29
  wanted = [(head, part) for head, count in enumerate(programs) for part in range(count)]
  np.testing.assert_array_equal(np.stack([n, p], axis=1), wanted)

"""The TPU kernel of `compact_indices`, interpreted with checks, equals the XLA scatter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compact_indices import compact_indices
from pallas_kernels.compact_indices.mosaic_tpu_compact_indices import compact_indices_mosaic_tpu
from pallas_kernels.compact_indices.xla import compact_indices_xla
from pallas_kernels.mosaic_tpu_common import CHECKED
from tests.nightly import nightly
from tests.pallas_kernels.tpu import abstract_mesh, compile_for_tpu, lower_for_tpu, TOPOLOGIES

# Share of positions that are selected, probability of skipped slots, number of positions.
CASES = {
  "few": (0.1, 0.0, 1500),
  "many": (0.9, 0.0, 1500),
  "with_gaps": (0.5, 0.3, 700),
  "none": (0.0, 0.0, 300),
  "all": (1.0, 0.0, 257),
  "short": (0.5, 0.0, 3),
}


def slots(share: float, gaps: float, length: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  chosen = rng.random((2, 2, length)) < share
  chosen[1, 1, length // 2 :] = False
  steps = chosen + (rng.random(chosen.shape) < gaps) * rng.integers(0, 40, chosen.shape)
  return (np.cumsum(steps, axis=-1) - steps).astype(np.int32), chosen


@pytest.mark.parametrize("name", CASES)
def test_tpu_kernel_equals_the_scatter(name: str):
  slot, chosen = slots(*CASES[name])
  size = max(1, int(slot.max()) - 5)  # Some slots exceed the list.
  kernel = functools.partial(compact_indices_mosaic_tpu, size=size, interpret=CHECKED)
  want = compact_indices_xla(jnp.asarray(slot), jnp.asarray(chosen), size)
  np.testing.assert_array_equal(jax.jit(kernel)(slot, chosen), want)


def structs(length: int) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct((1, 8, length), dtype) for dtype in (jnp.int32, jnp.bool)]


def test_the_target_device_selects_the_backend():
  call = functools.partial(compact_indices, size=100)
  assert "tpu_custom_call" in lower_for_tpu(call, *structs(200))
  assert "scatter" in jax.jit(call).lower(*structs(200)).as_text()
  named = functools.partial(compact_indices, implementation="mosaic_tpu")
  with jax.sharding.use_abstract_mesh(abstract_mesh()):
    with pytest.raises(NotImplementedError, match="size is 0; neither may be empty"):
      jax.eval_shape(functools.partial(named, size=0), *structs(200))
    with pytest.raises(NotImplementedError, match="524289 slots; at most 524288 fit VMEM"):
      jax.eval_shape(functools.partial(named, size=2**19 + 1), *structs(200))


CHIPS_AND_LENGTHS = [
  (chip, length) for length in (2**13, 2**15, 2**17, 2**19) for chip in TOPOLOGIES
]
KEPT = [*[(chip, 2**13) for chip in TOPOLOGIES], ("v5e", 2**19)]


@pytest.mark.aot
@pytest.mark.parametrize(
  ("chip", "length"),
  [*KEPT, *nightly(*[pair for pair in CHIPS_AND_LENGTHS if pair not in KEPT])],
)
def test_compiles(chip: str, length: int):
  for size in (length // 10, length // 16 * 15):
    call = functools.partial(compact_indices, size=size, implementation="mosaic_tpu")
    compile_for_tpu(call, *structs(length), chip=chip)

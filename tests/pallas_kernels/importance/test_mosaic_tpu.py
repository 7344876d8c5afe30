"""The TPU kernel of the importance of keys equals Eq. 16 and 17 in float64, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.importance import sampled_importance
from pallas_kernels.importance.mosaic_tpu_importance import (
  ImportanceBlocks,
  sampled_importance_mosaic_tpu,
)
from pallas_kernels.importance.xla import sampled_importance_xla
from pallas_kernels.mosaic_tpu_common import CHECKED
from tests.pallas_kernels.importance.test_importance import Case, CASES, check, structs
from tests.pallas_kernels.tpu import abstract_mesh, lower_for_tpu

# Several blocks of rows and, in the longer cases, several tiles of keys.
_interpreted = functools.partial(
  sampled_importance_mosaic_tpu,
  blocks=ImportanceBlocks(block_q=16, block_k=128),
  interpret=CHECKED,
)
KERNEL_CASES = {name: CASES[name] for name in ("one_key", "odd_sizes")} | {
  "nothing_seen": Case(length=140, samples=2, ranges="none", batch=1),
  "a_document_inside_one_tile": Case(length=640, samples=16, ranges="one_document", batch=1),
  "any_ranges_of_three_tiles": Case(length=384, samples=20, ranges="any"),
}


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_interpreted_kernel_equals_the_equation(name):
  check(_interpreted, KERNEL_CASES[name])


def test_bfloat16_error_is_at_most_twice_that_of_xla():
  check(_interpreted, Case(length=300, samples=12, dtype="bfloat16", batch=1))


def test_a_non_finite_key_changes_no_key_of_another_range():
  """Queries see keys from 150 on, which share a tile with unseen ones; the first tile is unseen."""
  run = jax.jit(_interpreted)
  query, key, _, _ = Case(length=300).inputs()
  start = jnp.full((2, 8), 150)
  end = jnp.broadcast_to(jnp.arange(170, 178), (2, 8))
  clean = run(query, key, start, end)
  unseen = np.array([3, 149, 178, 299])
  for bad in (np.nan, np.inf, -np.inf):
    np.testing.assert_array_equal(run(query, key.at[:, unseen].set(bad), start, end), clean)


def test_a_nan_key_gives_nan_in_the_same_scores_as_xla():
  query, key, start, end = Case(length=300).inputs()
  key = key.at[0, 5, 0].set(np.nan)
  got, want = (jax.jit(f)(query, key, start, end) for f in (_interpreted, sampled_importance_xla))
  np.testing.assert_array_equal(jnp.isnan(got), jnp.isnan(want))
  assert jnp.isnan(got[0, 0]).any()
  assert not jnp.isnan(got[0, 1]).any()


@pytest.mark.parametrize("head_dim", [20, 64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tpu_targets_use_the_kernel(head_dim, dtype):
  args = structs(head_dim=head_dim, dtype=dtype)
  assert "tpu_custom_call" in lower_for_tpu(sampled_importance, *args)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"dtype": "float16"}, "dtype is float16; it must be bfloat16 or float32"),
    ({"head_dim": 512}, "head_dim is 512; it must be at most 256"),
    ({"samples": 64, "heads": 64, "kv_heads": 1}, "the 4096 sampled query rows of a KV head take"),
  ],
)
def test_refused_calls_use_xla_and_the_kernel_tells_why(options, message):
  args = structs(**options)
  assert "tpu_custom_call" not in lower_for_tpu(sampled_importance, *args)
  named = functools.partial(sampled_importance, implementation="mosaic_tpu")
  with (
    jax.sharding.use_abstract_mesh(abstract_mesh()),
    pytest.raises(NotImplementedError, match=message),
  ):
    jax.eval_shape(named, *args)


def test_lowers_inside_a_shard_map_over_heads():
  heads = PartitionSpec(None, None, "heads")
  sharded = jax.shard_map(
    sampled_importance,
    mesh=abstract_mesh(devices=2),
    in_specs=(heads, heads, PartitionSpec(), PartitionSpec()),
    out_specs=PartitionSpec(None, "heads"),
  )
  assert "tpu_custom_call" in lower_for_tpu(sharded, *structs(), devices=2)

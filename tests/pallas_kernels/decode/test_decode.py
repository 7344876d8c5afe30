"""The TPU decode kernel equals jax.numpy, interpreted with checks; it lowers for a TPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.decode import (
  CacheArrays,
  CacheLayout,
  CacheMask,
  decode_attention,
  GroupBias,
)
from pallas_kernels.decode.mosaic_tpu_decode import decode_attention_mosaic_tpu
from pallas_kernels.decode.xla import decode_attention_xla
from pallas_kernels.mosaic_tpu_common import CHECKED
from tests.pallas_kernels.tpu import abstract_mesh, lower_for_tpu


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes of one call of `decode_attention`."""

  compact: int = 50
  raw: int = 9
  query_heads: int = 4
  kv_heads: int = 2
  head_dim: int = 16
  bias: float = 0.0
  dtype: str = "float32"
  batch: int = 4
  layers: int = 2

  def arrays(self) -> tuple[Any, ...]:
    """The positional arguments. One sequence sees all entries, one none, one only raw tokens."""
    rng = np.random.default_rng(0)
    B, C, W = self.batch, self.compact, self.raw
    shapes = [(B, self.query_heads, self.head_dim)]
    shapes += [(self.layers, B, self.kv_heads, s, self.head_dim) for s in (C, C, W, W)]
    query, *cache = (jnp.asarray(rng.normal(size=shape) * 2, self.dtype) for shape in shapes)
    compact_end = np.array([C, 0, 0, max(1, C * 2 // 5)])
    raw_end = np.array([W, 0, W // 2 + 1, W])
    hidden = np.array([[1, 0, 0, W // 3], [W // 2, 0, 0, W // 3]])
    mask = CacheMask(*(jnp.asarray(x, jnp.int32) for x in (compact_end, raw_end, *hidden)))
    return query, CacheArrays(*cache), jnp.int32(self.layers - 1), mask

  def options(self) -> dict[str, Any]:
    """The keyword arguments."""
    layout = CacheLayout(members=16, focal=2, window=0)
    prefix, prefix_focal = jnp.array([[10, 0, 5, 20], [3, 0, 5, 7]], jnp.int32)
    bias = GroupBias(self.bias, layout, prefix, prefix_focal) if self.bias else None
    return {"scale": 0.3, "group_bias": bias}


CASES = {
  "plain": Case(bias=2.7),
  "many_tiles": Case(compact=3000, head_dim=128, layers=1, batch=4),
  "wide_raw_part": Case(raw=2100, head_dim=128, layers=1, compact=3),
  "many_queries_a_head": Case(query_heads=12, kv_heads=1, bias=1.0),
  "one_entry": Case(compact=1, raw=1, layers=1),
  "odd_sizes": Case(head_dim=20, query_heads=3, kv_heads=3, compact=70),
  "half": Case(dtype="bfloat16", bias=2.7, head_dim=32),
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_equals_plain(name: str):
  """The error is at most twice that of jax.numpy in the same dtype."""
  case = CASES[name]
  arrays, options = case.arrays(), case.options()
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays[:2])
  with jax.default_matmul_precision("highest"):
    exact = np.asarray(decode_attention_xla(*wide, *arrays[2:], **options))
    plain = np.asarray(decode_attention_xla(*arrays, **options), np.float32)
  got = jax.jit(functools.partial(decode_attention_mosaic_tpu, interpret=CHECKED, **options))
  got = np.asarray(got(*arrays), np.float32)
  norm = np.linalg.norm(exact)
  allowed = 2 * np.linalg.norm(plain - exact) / norm
  assert np.linalg.norm(got - exact) / norm <= max(allowed, 2e-6)
  np.testing.assert_array_equal(got[1], 0)  # This sequence sees no entries.


def test_entries_beyond_the_visible_ones_have_no_effect():
  case = CASES["plain"]
  query, cache, layer, mask = case.arrays()
  beyond = np.arange(case.compact)[None] >= np.asarray(mask.compact_end)[:, None]
  bad = jnp.asarray(beyond)[None, :, None, :, None]
  run = jax.jit(functools.partial(decode_attention_mosaic_tpu, interpret=CHECKED, **case.options()))
  clean = run(query, cache, layer, mask)
  dirty = cache._replace(
    compact_key=jnp.where(bad, jnp.nan, cache.compact_key),
    compact_value=jnp.where(bad, jnp.inf, cache.compact_value),
  )
  dirty = run(query, dirty, layer, mask)
  np.testing.assert_array_equal(clean, dirty)


def structs(case: Case) -> tuple[Any, ...]:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.arrays())


@pytest.mark.parametrize("name", CASES)
def test_tpu_targets_use_the_kernel(name: str):
  call = functools.partial(decode_attention, **CASES[name].options())
  assert "tpu_custom_call" in lower_for_tpu(call, *structs(CASES[name]))


def test_lowers_inside_a_shard_map_over_heads():
  heads, cache = PartitionSpec(None, "heads"), PartitionSpec(None, None, "heads")
  sharded = jax.shard_map(
    functools.partial(decode_attention, **CASES["one_entry"].options()),
    mesh=abstract_mesh(devices=2),
    in_specs=(heads, CacheArrays(*[cache] * 4), PartitionSpec(), PartitionSpec()),
    out_specs=heads,
  )
  assert "tpu_custom_call" in lower_for_tpu(sharded, *structs(CASES["one_entry"]), devices=2)


def test_a_cpu_uses_xla_and_reports_name_the_reason():
  case = Case(dtype="float16")
  call = functools.partial(decode_attention, **case.options())
  assert "custom_call" not in jax.jit(call).lower(*structs(CASES["plain"])).as_text()
  assert "tpu_custom_call" not in lower_for_tpu(call, *structs(case))
  named = functools.partial(call, implementation="mosaic_tpu")
  with jax.sharding.use_abstract_mesh(abstract_mesh()):
    with pytest.raises(NotImplementedError, match="dtype is float16"):
      jax.eval_shape(named, *case.arrays())
    with pytest.raises(NotImplementedError, match="no compact entries"):
      jax.eval_shape(named, *Case(compact=0).arrays())
  with pytest.raises(NotImplementedError, match="mosaic_tpu: runs on a TPU, and this call is for"):
    jax.eval_shape(named, *CASES["plain"].arrays())
  with pytest.raises(ValueError, match="'fast'; for decode_attention it must be None"):
    jax.eval_shape(functools.partial(call, implementation="fast"), *CASES["plain"].arrays())


def test_the_decode_kernel_refuses_an_8_bit_cache():
  query, cache, *rest = CASES["plain"].arrays()
  packed = cache._replace(key_scale=jnp.ones(cache.compact_key.shape[:-1]))
  with pytest.raises(ValueError, match="with scales; decode_attention wants entries in the query"):
    decode_attention(query, packed, *rest, scale=1.0)

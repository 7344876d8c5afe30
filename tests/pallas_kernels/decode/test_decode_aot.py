"""Decoding compiled for TPUs without the hardware: it fits VMEM and updates the cache in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dga_jax.cache import CompactCache, decode_step, empty_cache
from dga_jax.config import DGAConfig
from tests.pallas_kernels.tpu import compile_for_tpu, TOPOLOGIES

pytestmark = pytest.mark.aot

BATCH, LAYERS = 2, 4


def decode_all_layers(config: DGAConfig) -> Any:
  def run(query: Any, key: Any, value: Any, cache: CompactCache) -> Any:
    def layer(carry: Any, index: jax.Array) -> Any:
      query, cache = carry
      options = {"config": config, "layer": index, "implementation": "mosaic_tpu"}
      return decode_step(query, key, value, cache, **options), None

    return jax.lax.scan(layer, (query, cache), jnp.arange(LAYERS))[0]

  return run


def structs(
  config: DGAConfig, length: int, *, heads: int = 32, kv_heads: int = 8, head_dim: int = 128
) -> tuple[Any, ...]:
  token = [
    jax.ShapeDtypeStruct((BATCH, h, head_dim), jnp.bfloat16) for h in (heads, kv_heads, kv_heads)
  ]
  shape = {"max_length": length, "num_kv_heads": kv_heads, "head_dim": head_dim}
  one = jax.eval_shape(lambda: empty_cache(config=config, batch=BATCH, dtype=jnp.bfloat16, **shape))
  return *token, jax.tree.map(lambda x: jax.ShapeDtypeStruct((LAYERS, *x.shape), x.dtype), one)


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("length", [2**13, 2**15, 2**17])
def test_it_fits_vmem_and_does_not_copy_the_cache(chip: str, length: int):
  config = DGAConfig(min_focal_tokens=0)
  args = structs(config, length)
  program = compile_for_tpu(decode_all_layers(config), *args, chip=chip, donate_argnums=3)
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes > 0.99 * args[-1].bytes
  assert memory.temp_size_in_bytes < 2**20


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_the_cache_of_one_layer_is_updated_in_place(chip: str):
  config = DGAConfig(selection="streaming")
  *token, cache = structs(config, 2**15)
  cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), cache)
  step = functools.partial(decode_step, config=config, implementation="mosaic_tpu")
  program = compile_for_tpu(step, *token, cache, chip=chip, donate_argnums=3)
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes > 0.99 * cache.bytes
  assert memory.temp_size_in_bytes < 2**20


OTHERS = {
  "many_heads": dict(heads=32, kv_heads=32),
  "few_heads": dict(heads=8, kv_heads=2),
  "one_kv_head": dict(heads=8, kv_heads=1),
  "head_dim_64": dict(head_dim=64),
  "head_dim_256": dict(head_dim=256),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_shapes_compile(name: str):
  config = DGAConfig(
    selection="streaming", local_window=16, sink_tokens=4, group_logit_bias="log_size"
  )
  program = compile_for_tpu(decode_all_layers(config), *structs(config, 8192, **OTHERS[name]))
  assert "decode_attention" in program.as_text()

"""Group merging compiled for TPUs without the hardware, both passes in one program."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.group_merge import merge_blocks, merge_groups
from tests.nightly import nightly
from tests.pallas_kernels.tpu import compile_for_tpu, TOPOLOGIES

pytestmark = pytest.mark.aot

M, FOCAL, KV_HEADS = 16, 2, 8


def program(selection: str) -> Any:
  """A function that computes gradients of all entries, so that it calls every kernel."""
  options = {"scale": 0.1, "implementation": "mosaic_tpu"}

  def entries(*arrays: Any) -> Any:
    if selection == "global":
      return merge_groups(*arrays, reorder_window=True, **options)
    start = arrays[3] if selection == "packed" else None
    return merge_blocks(*arrays[:3], start, members=M, focal=FOCAL, **options)[:2]

  def run(*arrays: Any) -> Any:
    out, pull = jax.vjp(lambda *tokens: entries(*tokens, *arrays[3:]), *arrays[:3])
    return pull(out)

  return run


def structs(
  selection: str, length: int, *, heads: int = 32, head_dim: int = 128, dtype: Any = jnp.bfloat16
) -> list[jax.ShapeDtypeStruct]:
  tokens = [(1, length, h, head_dim) for h in (heads, KV_HEADS, KV_HEADS)]
  groups = (length - length // 10) // M
  indices: list[tuple[int, ...]] = []
  if selection == "global":
    indices = [(1, KV_HEADS, length - groups * M), (1, KV_HEADS, groups, M), (1, KV_HEADS, groups)]
  if selection == "packed":
    indices = [(1, length // (M + FOCAL))]
  return [
    *(jax.ShapeDtypeStruct(shape, dtype) for shape in tokens),
    *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in indices),
  ]


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("length", [2**13, *nightly(2**15), 2**17])
def test_compiles(chip: str, length: int):
  """Compiles global selection. `test_tpu_programs.py` compiles streaming selection."""
  compiled = compile_for_tpu(program("global"), *structs("global", length), chip=chip)
  assert "group_merge_grad" in compiled.as_text()


OTHERS = {
  "packed": ("packed", {}),
  "one_head_each": ("global", dict(heads=KV_HEADS)),
  "head_dim_64": ("streaming", dict(head_dim=64)),
  "head_dim_256": ("global", dict(head_dim=256, heads=16)),
  "float32": ("packed", dict(dtype=jnp.float32)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_shapes_compile(name: str):
  selection, options = OTHERS[name]
  compiled = compile_for_tpu(program(selection), *structs(selection, 4000, **options))
  assert "group_merge_grad" in compiled.as_text()

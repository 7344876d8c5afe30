"""The Triton kernel of a dense decode step equals the step in jax.numpy, and splits evenly."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode import dense_step, TokenRows
from pallas_kernels.decode.triton_dense import dense_step_triton
from pallas_kernels.decode.triton_split import Tile
from pallas_kernels.decode.xla_dense import dense_step_xla
from tests.pallas_kernels.h100 import compile_for_h100, lower_for_h100, needs_cuda_compiler
from tests.rounding import assert_close, assert_same

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

LAYER = 1
ARRAYS = ("key", "value", "key_scale", "value_scale", "length")


class Case(NamedTuple):
  """Sizes of one call."""

  lengths: tuple[int, ...]
  slots: int
  heads: int = 4
  kv_heads: int = 2
  head_dim: int = 16
  dtype: str = "float32"
  cache_dtype: str | None = None

  def arguments(self) -> list[Any]:
    """Random tokens and caches of two layers. Entries beyond a sequence's length are huge."""
    keys = jax.random.split(jax.random.key(0), 5)
    B, D = len(self.lengths), self.head_dim
    token = [
      jax.random.normal(key, (B, n, D), self.dtype)
      for key, n in zip(keys, (self.heads, self.kv_heads, self.kv_heads), strict=False)
    ]
    shape = (2, B, self.kv_heads, self.slots, D)
    is_token = (
      jnp.arange(self.slots)[None, None, :, None] < jnp.array(self.lengths)[:, None, None, None]
    )
    cache = [
      jnp.where(is_token[None], jax.random.normal(key, shape, self.dtype), 1e4).astype(self.dtype)
      for key in keys[3:]
    ]
    tokens = TokenRows.pack(*cache, self.cache_dtype or self.dtype)
    return [*token, tokens, jnp.array([[0] * B, self.lengths])]


CASES = {
  "unequal_lengths": Case((37, 64, 3), 80),
  "first_token": Case((0, 1), 16),
  "last_slot": Case((31,), 32),
  "three_queries_a_head": Case((21,), 48, heads=3, kv_heads=1),
  "int8": Case((37, 64, 3), 80, cache_dtype="int8"),
  "float8": Case((37, 0), 80, cache_dtype="float8_e4m3fn"),
}
GPU_CASES = {
  "7b": Case((4000, 4095), 4096, 32, 32, 128, "bfloat16"),
  "three_rows": Case((4000, 17, 900), 4096, 32, 32, 128, "bfloat16"),
  "small": Case((1000, 300), 1024, 9, 3, 64, "bfloat16"),
  "float16": Case((100,), 128, 8, 2, 256, "float16"),
  "int8": Case((1000, 300), 1024, 9, 3, 64, "bfloat16", "int8"),
  "float8": Case((4000, 900), 4096, 32, 8, 128, "bfloat16", "float8_e4m3fn"),
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted_step_equals_plain(name: str):
  """The programs have unequal numbers of tiles, and some have none."""
  case = CASES[name]
  options = {"layer": LAYER, "scale": case.head_dim**-0.5}
  kernel = functools.partial(
    dense_step_triton, tile=Tile(entries=16, slots=24), interpret=True, **options
  )
  arguments = case.arguments()
  got = jax.jit(kernel)(*arguments)
  want = jax.jit(functools.partial(dense_step_xla, **options))(*arguments)
  terms = max(case.head_dim, case.slots)
  assert_same(got[0], want[0], terms=terms, name="out")
  for field, one, other in _arrays(got, want):
    np.testing.assert_array_equal(one, other, err_msg=field)


def _arrays(got: Any, want: Any) -> list[tuple[str, Any, Any]]:
  """The name of each array of a result but the first, and the array of both results."""
  one, other = ((*tokens, length) for _, tokens, length in (got, want))
  return [each for each in zip(ARRAYS, one, other, strict=True) if each[1] is not None]


@pytest.mark.parametrize(
  ("heads", "entries", "splits"),
  [
    (32, 4096, 8),  # 256 programs in one round
    (128, 16384, 2),
    (96, 32768, 11),  # 1056 programs in four rounds; three programs a head need two rounds for 288
    (264, 4096, 1),
    (1, 128, 1),  # a program has two tiles at least
    (1, 1 << 20, 16),
  ],
)
def test_splits_fill_the_device(heads: int, entries: int, splits: int):
  assert Tile().num_splits(heads, entries) == splits


def test_gpu_targets_use_the_kernel_and_other_head_dims_do_not():
  step = functools.partial(dense_step, layer=LAYER, scale=1.0)
  assert "decode_dense" in lower_for_h100(step, *jax.eval_shape(GPU_CASES["7b"].arguments))
  odd = Case((3,), 16, head_dim=80)
  assert "decode_dense" not in lower_for_h100(step, *odd.arguments())


@pytest.mark.parametrize("name", GPU_CASES)
@needs_cuda_compiler
def test_compiles_for_an_h100(name: str):
  kernel = functools.partial(dense_step_triton, layer=LAYER, scale=1.0)
  compile_for_h100(kernel, *jax.eval_shape(GPU_CASES[name].arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_a_gpu(name: str):
  case = GPU_CASES[name]
  options = {"layer": LAYER, "scale": case.head_dim**-0.5}
  arguments = case.arguments()
  query, key, value, tokens, length = arguments
  # The float32 reference reads the same rounded tokens, the new one included.
  new = TokenRows.pack(key, value, tokens.key.dtype).unpack(jnp.float32)
  cached = TokenRows(*tokens.unpack(jnp.float32))
  wide = [query.astype(jnp.float32), *new, cached, length]
  with jax.default_matmul_precision("highest"):
    exact = jax.jit(functools.partial(dense_step_xla, **options))(*wide)
  plain = jax.jit(functools.partial(dense_step_xla, **options))(*arguments)
  got = jax.jit(functools.partial(dense_step_triton, **options))(*arguments)
  assert_close(got[0], exact[0], terms=case.slots, plain=plain[0], name="out")
  for field, one, other in _arrays(got, plain):
    if case.cache_dtype is None:
      np.testing.assert_array_equal(one, other, err_msg=field)
    else:  # A division that rounds otherwise may give the next number.
      one, other = (np.asarray(x, np.float32) for x in (one, other))
      np.testing.assert_allclose(one, other, rtol=1 / 8, atol=1, err_msg=field)
      changed = ~np.isclose(one, other, rtol=1e-5, atol=0)
      assert changed.sum() <= 0.01 * key.size, field

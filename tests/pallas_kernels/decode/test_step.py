"""The Triton kernel of a whole decode step equals the step in jax.numpy, token by token."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax import DGAConfig
from dga_jax.cache import CompactCache, decode_step, empty_cache
from dga_jax.cache.layout import cache_layout
from pallas_kernels.decode import BlockRule
from pallas_kernels.decode.triton_step import step_triton, Tile
from tests.pallas_kernels.h100 import (
  abstract_mesh,
  compile_for_h100,
  lower_for_h100,
  needs_cuda_compiler,
)
from tests.rounding import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

LAYER = 1
STREAMING = DGAConfig(selection="streaming", group_size=5, focal_per_block=2)


@dataclasses.dataclass(frozen=True)
class Case:
  """A cache, and the number of tokens that are decoded into it."""

  config: DGAConfig = STREAMING
  batch: int = 2
  heads: int = 4
  kv_heads: int = 2
  head_dim: int = 16
  tokens: int = 40
  dtype: str = "float32"

  def cache(self) -> CompactCache:
    """A cache of three layers. The first contains only NaN."""
    one = empty_cache(
      config=self.config,
      batch=self.batch,
      max_length=self.tokens,
      num_kv_heads=self.kv_heads,
      head_dim=self.head_dim,
      dtype=self.dtype,
    )
    bad = jax.tree.map(_bad, one)
    return jax.tree.map(lambda b, x: jnp.stack([b, x, x]), bad, one)

  def token(self, rng: np.random.Generator) -> list[jax.Array]:
    """Random query, key and value of one token."""
    heads = (self.heads, self.kv_heads, self.kv_heads)
    shapes = [(self.batch, n, self.head_dim) for n in heads]
    return [jnp.asarray(rng.normal(size=shape), self.dtype) for shape in shapes]

  def scores(self, key: jax.Array) -> jax.Array | None:
    """Focal scores of a token, if the selector is "fitted"."""
    if self.config.selector != "fitted":
      return None
    return jnp.round(key[..., 0].astype(jnp.float32))  # Rounded: some tokens have equal scores.

  def step(self, interpret: bool = True, tile: Tile | None = None):
    """A jitted function that runs the kernel on a cache, as `decode_step` does."""
    c, D = self.config, self.head_dim
    merge_scale = D**-0.5 if c.aggregation_scale == "head_dim" else 1.0
    rule = BlockRule(cache_layout(c), D**-0.5, merge_scale)
    bias = math.log(c.group_size) if c.group_logit_bias == "log_size" else 0.0
    run = functools.partial(
      step_triton, rule=rule, scale=D**-0.5, group_bias=bias, interpret=interpret, tile=tile
    )

    def step(q, k, v, cache: CompactCache):
      score = self.scores(k)
      out, arrays, length = run(q, k, v, cache.arrays, cache.lengths, LAYER, score)
      lengths = cache.lengths._replace(length=length)
      return out, dataclasses.replace(cache, arrays=arrays, lengths=lengths)

    return jax.jit(step)


def _bad(x):
  if jnp.issubdtype(x.dtype, jnp.integer):
    return x
  return jnp.full_like(x, jnp.nan)


def _where(waits, new, old):
  return jnp.where(waits.reshape(1, -1, *[1] * (new.ndim - 2)), old, new)


def _config(**changes) -> DGAConfig:
  return dataclasses.replace(STREAMING, **changes)


CASES = {
  "plain": Case(),
  "sinks_and_window": Case(_config(sink_tokens=3, local_window=2)),
  "bias": Case(_config(group_logit_bias="log_size", sink_tokens=1)),
  "three_queries_a_head": Case(heads=3, kv_heads=1, batch=1),
  "odd_block": Case(DGAConfig(selection="streaming", group_size=16), head_dim=32, batch=1),
  "fitted_int8": Case(
    _config(selector="fitted", sink_tokens=2, local_window=1, cache_dtype="int8")
  ),
  "unscaled_merge": Case(_config(aggregation_scale="none")),
  "int8": Case(_config(cache_dtype="int8", sink_tokens=2)),
  "float8": Case(_config(cache_dtype="float8_e4m3fn", local_window=1)),
}


def run(case: Case, step, cache: CompactCache):
  """Decodes with `step` and with jax.numpy.

  Returns:
    The outputs of both, [tokens, B, H, D] each, and the caches of both.
  """
  plain = jax.jit(
    functools.partial(decode_step, layer=LAYER, config=case.config, implementation="xla")
  )
  rng, outs, wants, other = np.random.default_rng(0), [], [], cache
  for _ in range(case.tokens):
    token = case.token(rng)
    out, cache = step(*token, cache)
    want, other = plain(*token, other, focal_scores=case.scores(token[1]))
    outs.append(np.asarray(out, np.float32))
    wants.append(np.asarray(want, np.float32))
  return np.stack(outs), np.stack(wants), cache, other


@pytest.mark.parametrize("name", CASES)
def test_interpreted_step_equals_plain(name: str):
  """Compares outputs, cache and lengths over whole blocks. The splits have unequal tile counts."""
  case = CASES[name]
  out, want, cache, other = run(case, case.step(tile=Tile(entries=16, programs=12)), case.cache())
  # The kernel reads a sink before it is rounded to 8 bits, jax.numpy reads it afterwards.
  first = case.config.sink_tokens if case.config.cache_dtype else 0
  terms = max(case.head_dim, case.tokens)
  assert_same(out[first:], want[first:], terms=terms, sums=4, name="out")
  assert jax.tree.structure(cache) == jax.tree.structure(other)
  leaves = jax.tree_util.tree_leaves_with_path(cache)
  for (path, got), wanted in zip(leaves, jax.tree.leaves(other), strict=True):
    field = jax.tree_util.keystr(path)
    # Another order of a sum may round to the next 8-bit number.
    of_8_bits = got.dtype.itemsize == 1
    got, wanted = np.asarray(got[LAYER], np.float32), np.asarray(wanted[LAYER], np.float32)
    if of_8_bits:
      assert (got != wanted).mean() < 1e-3, field
    else:
      assert_same(got, wanted, terms=terms, sums=4, name=field)


def test_sequences_complete_blocks_independently():
  """A sequence gets equal bits alone and in a batch of other lengths."""
  case = Case(_config(sink_tokens=2), batch=3, tokens=60)
  cache, rng = case.cache(), np.random.default_rng(1)
  step = case.step()
  for n in range(24):
    token = case.token(rng)
    _, after = step(*token, cache)
    # Some sequences skip this token: their rows are restored.
    waits = jnp.array([n % 2, n % 3, 1]) == 0
    cache = jax.tree.map(functools.partial(_where, waits), after, cache)
  lengths = np.asarray(cache.length[LAYER])
  assert len(set(lengths)) == 3
  token = case.token(rng)
  together, _ = step(*token, cache)
  for b in range(3):
    row = np.array([b] * 3)
    others = jax.tree.map(lambda x, row=row: x[:, row], cache)
    alone, _ = step(*(x[row] for x in token), others)
    np.testing.assert_array_equal(alone[0], together[b])


GPU_CASES = {
  "7b": Case(DGAConfig(selection="streaming"), 2, 32, 32, 128, 60, "bfloat16"),
  "wide": Case(
    DGAConfig(
      selection="streaming", group_size=30, focal_per_block=2, sink_tokens=4, local_window=38
    ),
    2,
    9,
    3,
    64,
    2000,
    "bfloat16",
  ),
  "eight_queries_a_head": Case(_config(), 3, 16, 2, 256, 40, "float16"),
  "full_precision": Case(DGAConfig(selection="streaming", sink_tokens=2), 2, 8, 2, 64, 60),
  "fitted": Case(
    DGAConfig(selection="streaming", selector="fitted", local_window=2), 2, 8, 2, 64, 60, "bfloat16"
  ),
  "int8": Case(DGAConfig(selection="streaming", cache_dtype="int8"), 2, 8, 8, 128, 60, "bfloat16"),
  "float8": Case(
    DGAConfig(selection="streaming", cache_dtype="float8_e4m3fn"), 2, 8, 8, 128, 60, "bfloat16"
  ),
}


def structs(case: Case):
  shape = jax.eval_shape(lambda: (*case.token(np.random.default_rng(0)), case.cache()))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shape)


@pytest.mark.parametrize("name", GPU_CASES)
@needs_cuda_compiler
def test_compiles_for_an_h100(name: str):
  compile_for_h100(GPU_CASES[name].step(interpret=False), *structs(GPU_CASES[name]))


def test_gpu_targets_use_the_kernel_and_reports_name_the_reason():
  case = GPU_CASES["7b"]
  step = functools.partial(decode_step, layer=LAYER, config=case.config)
  assert "decode_combine" in lower_for_h100(step, *structs(case))
  odd = dataclasses.replace(case, head_dim=80)
  assert "decode_combine" not in lower_for_h100(step, *structs(odd))
  named = functools.partial(step, implementation="triton")
  with (
    jax.sharding.use_abstract_mesh(abstract_mesh()),
    pytest.raises(NotImplementedError, match="head_dim is 80"),
  ):
    jax.eval_shape(named, *structs(odd))
  with pytest.raises(NotImplementedError, match="triton: runs on an Ampere or newer GPU"):
    jax.eval_shape(named, *structs(case))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_a_gpu(name: str):
  """The error against float32 is at most twice that of jax.numpy in the same dtype."""
  case = GPU_CASES[name]
  out, want, cache, other = run(case, case.step(interpret=False), case.cache())
  wide = dataclasses.replace(case, dtype="float32")
  with jax.default_matmul_precision("highest"):
    exact = wide_outputs(case, wide)
  scale = np.linalg.norm(exact)
  allowed = 2 * np.linalg.norm(want - exact) / scale
  assert np.linalg.norm(out - exact) / scale <= max(allowed, 2e-6)
  np.testing.assert_array_equal(cache.length, other.length)
  assert np.isfinite(np.asarray(cache.arrays.compact_key[LAYER], np.float32)).all()


def wide_outputs(case: Case, wide: Case) -> np.ndarray:
  """The outputs of the step in float32 for the tokens of `case`, rounded to its dtype."""
  config = dataclasses.replace(case.config, cache_dtype=None)
  wide = dataclasses.replace(wide, config=config)
  plain = jax.jit(functools.partial(decode_step, layer=LAYER, config=config, implementation="xla"))
  rng, cache, outs = np.random.default_rng(0), wide.cache(), []
  for _ in range(case.tokens):
    token = case.token(rng)
    scores = case.scores(token[1])
    out, cache = plain(*(x.astype("float32") for x in token), cache, focal_scores=scores)
    outs.append(np.asarray(out))
  return np.stack(outs)

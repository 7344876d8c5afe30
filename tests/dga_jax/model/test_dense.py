"""The dense attention kind: padding, a full cache, cuDNN, packed documents, splash attention."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dga_jax.attention.dense import causal_sources
from dga_jax.attention.segments import find_documents
from dga_jax.attention.splash import padded_length, splash_causal
from dga_jax.model.attention_kinds.dense import DenseAttention
from pallas_kernels.grouped_attention import grouped_attention
from tests.dga_jax.attention.cases import arrays
from tests.pallas_kernels.h100 import lower_for_h100
from tests.pallas_kernels.tpu import abstract_mesh


def test_a_full_cache_keeps_its_tokens() -> None:
  kind = DenseAttention()
  rng = np.random.default_rng(0)
  cache = jax.tree.map(lambda x: x[None], kind.init_cache(2, 3, 1, 8, jnp.float32))
  for _ in range(3):
    q, k, v = (jnp.asarray(rng.normal(size=(2, 1, 8)), jnp.float32) for _ in range(3))
    o, cache = kind.decode(q, k, v, cache, jnp.array(0))
  o, beyond = kind.decode(q, k + 1, v + 1, cache, jnp.array(0))
  np.testing.assert_array_equal(beyond.tokens.key, cache.tokens.key)
  assert np.isfinite(o).all()


def test_padded_queries_give_zero_in_value_and_gradient() -> None:
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8))
  segment_ids = jnp.array([[1, 1, 2, 2, -1], [-1, -1, -1, -1, -1]])
  lengths = jnp.array([3, 0])
  for keywords, is_token in [
    ({"segment_ids": segment_ids}, segment_ids >= 0),
    ({"lengths": lengths}, jnp.arange(5)[None] < lengths[:, None]),
  ]:

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, keywords: dict = keywords) -> jax.Array:
      return DenseAttention()(q, k, v, **keywords)

    padding = ~np.asarray(is_token)
    assert not np.asarray(attend(q, k, v))[padding].any()
    gradients = jax.grad(lambda *qkv: (attend(*qkv) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
    for gradient in gradients:
      assert np.isfinite(gradient).all()
      assert not np.asarray(gradient)[padding].any()


def test_packed_documents_have_windows_that_begin_at_their_document() -> None:
  q, k, v, t = arrays(0, 2, 37, 4, 2, 16)
  ids = jnp.asarray(np.repeat([[1, 2, -1], [3, 3, 4]], [20, 9, 8], axis=1).astype(np.int32))
  documents = find_documents(2, 37, None, ids)

  def grouped(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    sources = causal_sources(k, v, documents)
    return grouped_attention(q, sources, scale=0.25, max_window=37, implementation="xla")

  def run(attend: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
    out, pull = jax.vjp(attend, q, k, v)
    return (out, *pull(t))

  want = run(lambda q, k, v: DenseAttention("xla")(q, k, v, segment_ids=ids))
  for ours, theirs in zip(run(grouped), want, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_packed_documents_on_a_gpu_need_no_mask_of_all_pairs() -> None:
  q = jax.ShapeDtypeStruct((1, 512, 4, 64), jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)

  def gradients(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> Any:
    out, pull = jax.vjp(lambda *qkv: DenseAttention()(*qkv, segment_ids=ids), q, k, v)
    return pull(out)

  program = lower_for_h100(gradients, q, q, q, ids)
  assert "grouped_attention_dkdv_window" in program
  assert "512x512" not in program


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
  ("length", "head_dim", "packed"),
  [(512, 64, False), (512, 64, True), (301, 64, False), (301, 64, True), (301, 256, False)],
)
def test_gpu_kernels_are_used_and_as_exact_as_xla(length: int, head_dim: int, packed: bool) -> None:
  """cuDNN's attention has no packed documents and no head size above 128."""
  shapes = [(2, length, heads, head_dim) for heads in (8, 2, 2)]
  keys = jax.random.split(jax.random.key(0), 3)
  qkv = [jax.random.normal(*pair, jnp.bfloat16) for pair in zip(keys, shapes, strict=True)]
  position = jnp.arange(length)[None]
  ids = jnp.where(position < jnp.array([[length], [200]]), position // 150, -1)
  rows = {"segment_ids": ids} if packed else {"lengths": jnp.array([length, length // 2])}

  def attend(kind: DenseAttention, *qkv: jax.Array) -> jax.Array:
    return kind(*qkv, **rows).astype(jnp.float32)

  def values_and_gradients(kind: DenseAttention, qkv: list[jax.Array]) -> list[jax.Array]:
    loss = lambda *qkv: (attend(kind, *qkv) ** 2).sum()  # noqa: E731
    return [attend(kind, *qkv), *jax.grad(loss, argnums=(0, 1, 2))(*qkv)]

  program = jax.jit(lambda *qkv: attend(DenseAttention(), *qkv)).lower(*qkv).as_text()
  assert ("grouped_attention" if packed or head_dim > 128 else "cudnn") in program
  with jax.default_matmul_precision("highest"):
    exact = values_and_gradients(DenseAttention("xla"), [x.astype(jnp.float32) for x in qkv])
  xla = values_and_gradients(DenseAttention("xla"), qkv)
  fused = values_and_gradients(DenseAttention(), qkv)
  for want, plain, got, bound in zip(exact, xla, fused, (2, 3, 3, 3), strict=True):
    error = np.abs(got.astype(jnp.float32) - want).max()
    assert error <= bound * np.abs(plain.astype(jnp.float32) - want).max()


@pytest.mark.parametrize(("length", "head_dim"), [(256, 128), (200, 64)])
def test_splash_attention_equals_dense_attention(length: int, head_dim: int) -> None:
  """Compares values and gradients with two query heads per KV head and two documents per row.

  A length that is no multiple of a tile is padded.
  """
  q, k, v, t = arrays(0, 1, length, 2, 1, head_dim)
  ids = jnp.asarray(np.repeat([[1, 2]], [100, length - 100], axis=1).astype(np.int32))

  def run(attend: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
    out, pull = jax.vjp(attend, q, k, v)
    return (out, *pull(t))

  got = run(lambda q, k, v: splash_causal(q, k, v, ids, interpret=True))
  want = run(lambda q, k, v: DenseAttention("xla")(q, k, v, segment_ids=ids))
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_tiles_of_splash_attention() -> None:
  tiles = [padded_length(length) for length in (1, 384, 512, 513, 1500, 2304, 8192)]
  assert tiles == [
    (128, 128), (384, 384), (512, 512), (1024, 1024), (1536, 512), (2560, 512), (8192, 1024)
  ]  # fmt: skip


def test_calls_that_splash_attention_does_not_support() -> None:
  q = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.float16)
  with (
    jax.sharding.use_abstract_mesh(abstract_mesh()),
    pytest.raises(NotImplementedError, match="query is float16; splash attention needs bfloat16"),
  ):
    jax.eval_shape(DenseAttention("splash"), q, q, q)
  on_cpu = jnp.zeros(q.shape)
  with pytest.raises(NotImplementedError, match="splash: runs on a TPU, and this call is for cpu"):
    DenseAttention("splash")(on_cpu, on_cpu, on_cpu)


@pytest.mark.parametrize(("length", "head_dim"), [(256, 128), (256, 64), (200, 80)])
def test_a_mesh_of_tpus_uses_splash_attention(length: int, head_dim: int) -> None:
  device = AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
  axes = {"axis_types": (AxisType.Auto,), "abstract_device": device}
  q = jax.ShapeDtypeStruct((1, length, 2, head_dim), jnp.bfloat16)
  kv = jax.ShapeDtypeStruct((1, length, 1, head_dim), jnp.bfloat16)

  def program(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return DenseAttention()(q, k, v)

  with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), **axes)):
    assert "splash_mha" in str(jax.make_jaxpr(program)(q, kv, kv))
  assert "splash_mha" not in str(jax.make_jaxpr(program)(q, kv, kv))

"""Products with float32 sums: exact products of 16-bit numbers, on CPUs as on other devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax.model.attention_kinds.sink_window import SinkWindowAttention
from pallas_kernels.products import einsum_float32
from pallas_kernels.target import assume_target, Target


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sums_are_float32(dtype: str) -> None:
  a, b = jnp.array([[256.0, 1.0]], dtype), jnp.array([[256.0, 1.0]], dtype)
  product = einsum_float32("ij,kj->ik", a, b)
  assert product.dtype == jnp.float32
  assert product.item() == 65537  # 17 bits


def test_other_devices_multiply_in_16_bits() -> None:
  """Tensor cores and matrix units multiply 16-bit numbers faster than float32."""
  a = jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)
  for platform, number in (("cpu", "f32"), ("gpu", "bf16"), ("tpu", "bf16")):
    with assume_target(Target(platform, platform, None, None)):
      program = jax.jit(lambda a: einsum_float32("ij,jk->ik", a, a)).lower(a).as_text()
    product = next(line for line in program.splitlines() if "dot_general" in line)
    assert f"(tensor<4x4x{number}>, tensor<4x4x{number}>) -> tensor<4x4xf32>" in product


def test_windows_decode_several_sequences_in_bfloat16() -> None:
  """XLA compiles these products with non-adjacent batch axes, and refused them on CPUs."""
  B, H, N, D = 3, 9, 3, 64
  kind = SinkWindowAttention("sink_window", 40, 4)
  rng = np.random.default_rng(0)
  tokens = [jnp.asarray(rng.normal(size=(5, B, n, D)), jnp.bfloat16) for n in (H, N, N)]

  def decode(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    cache = kind.init_caches(1, B, 64, N, D, q.dtype)

    def step(cache: object, token: tuple[jax.Array, ...]) -> tuple[object, jax.Array]:
      return kind.decode(*token, cache, jnp.int32(0))[::-1]  # type: ignore[arg-type]

    return jax.lax.scan(step, cache, (q, k, v))[1]

  out = jax.jit(decode)(*tokens)
  want = jax.jit(decode)(*(x.astype(jnp.float32) for x in tokens))
  np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.02)

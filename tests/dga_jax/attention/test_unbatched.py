"""Arrays without a batch axis, and arguments that DGA does not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax import DGAConfig, dynamic_group_attention

CONFIG = DGAConfig(group_size=4, min_focal_tokens=0)
Q = jax.random.normal(jax.random.key(0), (12, 4, 8))
K, V = jax.random.normal(jax.random.key(1), (2, 12, 2, 8))


def test_one_sequence_is_a_batch_of_one() -> None:
  op = jax.jit(lambda q, k, v: dynamic_group_attention(q, k, v, config=CONFIG))
  out = op(Q, K, V)
  assert out.shape == Q.shape
  np.testing.assert_array_equal(out, op(Q[None], K[None], V[None])[0])


def test_segment_ids_of_one_sequence() -> None:
  ids = [0] * 5 + [1] * 7
  out = dynamic_group_attention(Q, K, V, config=CONFIG, segment_ids=ids)
  alone = dynamic_group_attention(Q[5:], K[5:], V[5:], config=CONFIG)
  np.testing.assert_allclose(out[5:], alone, atol=1e-6)


@pytest.mark.invalid_arguments
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"key": K[None]}, r"query has shape \(12, 4, 8\) and key has shape \(1, 12, 2, 8\)"),
    ({"lengths": [3]}, "lengths is given, and query has no batch axis"),
    ({"bias": jnp.zeros((12, 12))}, "bias is given, which dynamic_group_attention does not have"),
    ({"mask": jnp.ones((12, 12), bool)}, "mask is given.*pass lengths for right padding"),
    ({"logits_soft_cap": 30.0}, "logits_soft_cap is given"),
    ({"is_causal": True}, "is_causal is given.*DGAConfig\\(causal=...\\)"),
    ({"key": K[:6], "value": V[:6]}, "Cross-attention, with keys of other tokens, is not"),
  ],
)
def test_what_is_not_supported_is_named(changes: dict, message: str) -> None:
  arguments = {"query": Q, "key": K, "value": V, "config": CONFIG} | changes
  with pytest.raises(ValueError, match=message):
    dynamic_group_attention(**arguments)

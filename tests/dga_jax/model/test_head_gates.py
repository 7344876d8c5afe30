"""Gates mix full and compact attention head by head; hardened gates are head budgets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from dga_jax.calibration.candidates import head_costs
from dga_jax.calibration.hardening import compact_setting, count_full_heads, harden
from dga_jax.checkpoint import abstract_decoder
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, HeadBudgets, SinkWindow
from dga_jax.model import apply_budgets, Decoder, ModelConfig
from dga_jax.model.head_gates import mix_with_full
from tests.dga_jax.model.random_decoder import random_decoder

COMPACT = DGAConfig(
  selection="streaming", group_size=3, focal_per_block=1, sink_tokens=1, local_window=1
)
GATED = ModelConfig(
  vocab_size=64,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
  attention="dga",
  dga=COMPACT,
  dtype="float32",
  head_gates=True,
)
TOKENS = np.random.default_rng(1).integers(0, 64, (2, 40)).astype(np.int32)
LENGTHS = np.array([40, 31], np.int32)


def states(config: ModelConfig, gates_KxN: Array | None = None) -> Array:
  """Final states of the decoder with the same weights under a config; gates by the argument."""
  model = random_decoder(GATED)
  params = {name: value for name, value in model_params(model).items() if name != "head_gates"}
  if gates_KxN is not None:
    params["head_gates"] = gates_KxN
  return merged(config, params).hidden(TOKENS, lengths=LENGTHS)


def model_params(model: Decoder) -> dict[str, Array]:
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def merged(config: ModelConfig, params: dict[str, Array]) -> Decoder:
  return nnx.merge(abstract_decoder(config)[0], params)


def without_gates(**changes: object) -> ModelConfig:
  return dataclasses.replace(GATED, head_gates=False, **changes)


def test_gates_of_0_are_the_compact_kind_and_gates_of_1_are_dense_attention() -> None:
  zeros = jnp.zeros((2, 2))
  np.testing.assert_array_equal(states(GATED, zeros), states(without_gates()))
  np.testing.assert_array_equal(states(GATED, zeros + 1), states(without_gates(attention="dense")))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_query_heads_are_mixed_by_the_gate_of_their_kv_head(dtype: jnp.dtype) -> None:
  full, compact = jax.random.normal(jax.random.key(0), (2, 1, 3, 4, 8), dtype)
  gates = jnp.array([[0.0, 0.0], [0.25, 1.0]])
  attend = mix_with_full(lambda *_: (compact, None), lambda *_: (full, None), gates)
  mixed = attend(full, full, full, None, jnp.int32(1))[0]
  assert mixed.dtype == dtype
  expected = 0.25 * np.float64(full[:, :, :2]) + 0.75 * np.float64(compact[:, :, :2])
  np.testing.assert_allclose(np.float64(mixed[:, :, :2]), expected, atol=0.03, rtol=0)
  np.testing.assert_array_equal(mixed[:, :, 2:], full[:, :, 2:])


@pytest.mark.parametrize("compact", [COMPACT, SinkWindow(window=6, sinks=2)])
def test_hardened_gates_equal_a_decoder_with_these_budgets(
  compact: DGAConfig | SinkWindow,
) -> None:
  gated = GATED
  if isinstance(compact, SinkWindow):
    everywhere = HeadBudgets((compact,), ((0, 0), (0, 0)))
    gated = dataclasses.replace(GATED, attention="head_budgets", head_budgets=everywhere)
  assert compact_setting(gated) == compact
  learned = np.array([[0.1, 0.9], [0.8, 0.8]], np.float32)
  budgets = harden(learned, {FULL: 2, compact: 2})
  assert budgets.settings == (FULL, compact)
  assert budgets.assignment == ((1, 0), (0, 1))  # Of the two equal gates the earlier head's.
  ours = states(gated, jnp.array([[0.0, 1.0], [1.0, 0.0]]))
  params = model_params(random_decoder(GATED))
  del params["head_gates"]
  # Applying budgets permutes the heads of layer 0.
  model = apply_budgets(merged(without_gates(), params), budgets)
  assert model.config.head_budgets != budgets
  for row, length in enumerate(LENGTHS):
    theirs = model.hidden(TOKENS, lengths=LENGTHS)[row, :length]
    np.testing.assert_allclose(ours[row, :length], theirs, rtol=2e-5, atol=2e-5)


def test_larger_gates_get_earlier_settings() -> None:
  small = SinkWindow(window=2, sinks=1)
  gates = np.array([[0.3, 0.0], [0.2, 0.9], [0.0, 0.3]], np.float32)
  budgets = harden(gates, {FULL: 1, COMPACT: 2, small: 3})
  assert budgets.settings == (FULL, COMPACT, small)
  assert budgets.assignment == ((1, 2), (2, 0), (2, 1))
  with pytest.raises(ValueError, match=r"1 \+ 2 heads; the model has 6 gates"):
    harden(gates, {FULL: 1, COMPACT: 2})


def test_gates_have_gradients() -> None:
  gradient = jax.grad(lambda gates: jnp.square(states(GATED, gates)).mean())(jnp.full((2, 2), 0.3))
  assert (np.abs(gradient) > 1e-6).all()


@pytest.mark.parametrize("share", [0.6, 0.8, 0.99, 1.0])
def test_the_budget_holds_and_one_full_head_more_would_exceed_it(share: float) -> None:
  length = 512
  num_full = count_full_heads(share, length, COMPACT, GATED)
  full, compact = head_costs("bytes", (FULL, COMPACT), GATED, length)
  dense, heads = 4 * full, 4
  assert num_full * full + (heads - num_full) * compact <= share * dense
  more = num_full + 1
  assert more > heads or more * full + (heads - more) * compact > share * dense
  assert count_full_heads(compact / full, length, COMPACT, GATED) == 0


@pytest.mark.invalid_arguments
def test_errors_name_the_argument_and_the_remedy() -> None:
  with pytest.raises(ValueError, match=r"the share is 0\.1; it must be from 0\.\d+.*Change --keys"):
    count_full_heads(0.1, 512, COMPACT, GATED)
  with pytest.raises(ValueError, match=r"the share is 1\.5"):
    count_full_heads(1.5, 512, COMPACT, GATED)
  with pytest.raises(ValueError, match="no less than a full head: lower its window"):
    count_full_heads(0.5, 16, SinkWindow(window=64), GATED)
  with pytest.raises(ValueError, match="head_gates is True; it must be False with attention='den"):
    dataclasses.replace(GATED, attention="dense")
  with pytest.raises(ValueError, match="the model has no gates"):
    compact_setting(without_gates())
  with pytest.raises(ValueError, match="the model has attention='sliding_window'"):
    compact_setting(dataclasses.replace(GATED, attention="sliding_window"))
  model = random_decoder(GATED)
  for use in (
    lambda: model.init_cache(1, 64),
    lambda: model.prefill(TOKENS, max_length=64),
    model.unstack_layers,
  ):
    with pytest.raises(ValueError, match=r"no cache\. Make head budgets of its gates"):
      use()
  with pytest.raises(ValueError, match="model has a gate for each KV head"):
    apply_budgets(model, harden(np.zeros((2, 2), np.float32), {FULL: 1, COMPACT: 3}))

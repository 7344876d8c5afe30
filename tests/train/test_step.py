"""The training step: gradient accumulation, weight decay, clipping, schedule, a falling loss."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dga_jax.checkpoint import abstract_decoder
from dga_jax.sharding import make_mesh, MeshConfig
from train.config import OptimizerConfig, TrainConfig
from train.optimizer import decay_mask, make_schedule
from train.step import Batch, make_functions, mean_gradient, step_options


@pytest.fixture
def batch(config: TrainConfig) -> Batch:
  """A batch whose rows have very different numbers of loss tokens. One row has none."""
  B, L = config.batch_size, config.data.sequence_length
  keys = jax.random.split(jax.random.key(0), 2)
  lengths_Bx1 = jnp.array([L, 3, 0, L // 2])[:, None]
  mask_BxL = jnp.arange(L)[None, :] < lengths_Bx1
  return {
    "inputs": jax.random.randint(keys[0], (B, L), 0, 257),
    "targets": jax.random.randint(keys[1], (B, L), 0, 257),
    "segment_ids": jnp.where(mask_BxL, 1, -1),
    "loss_mask": mask_BxL,
  }


def test_micro_batches_give_the_gradient_of_the_whole_batch(
  config: TrainConfig, batch: Batch
) -> None:
  functions = make_functions(config)
  params = functions.init().params
  whole, *others = [
    mean_gradient(
      dataclasses.replace(config, grad_accumulation=pieces), functions.graphdef, params, batch
    )
    for pieces in (1, 2, 4)
  ]
  for other in others:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other, whole)


def test_rows_of_one_document_need_no_mask_of_documents(config: TrainConfig, batch: Batch) -> None:
  one = dataclasses.replace(config, data=dataclasses.replace(config.data, max_documents=1))
  functions = make_functions(config)
  params = functions.init().params
  ours, masked = (
    mean_gradient(either, functions.graphdef, params, batch) for either in (one, config)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, masked)


def test_a_batch_without_loss_tokens_applies_only_weight_decay(
  config: TrainConfig, batch: Batch
) -> None:
  batch = batch | {"loss_mask": jnp.zeros_like(batch["loss_mask"])}
  functions = make_functions(config)
  loss, accuracy, grads = mean_gradient(config, functions.graphdef, functions.init().params, batch)
  assert loss == accuracy == 0
  assert optax.tree.norm(grads) == 0


def test_the_loss_of_a_repeated_batch_falls(config: TrainConfig, batch: Batch) -> None:
  functions = make_functions(config)
  state = functions.init()
  losses = []
  for _ in range(config.num_steps):
    state, scalars = functions.step(state, batch)
    losses.append(float(scalars["loss"]))
  assert losses[0] == pytest.approx(np.log(257), rel=0.1)
  assert losses[-1] < 0.8 * losses[0]
  assert int(state.step) == config.num_steps
  assert scalars["tokens"] == batch["loss_mask"].sum()


def test_the_state_is_donated(config: TrainConfig, batch: Batch) -> None:
  functions = make_functions(config)
  state = functions.init()
  functions.step(state, batch)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_matrices_decay_and_scales_and_biases_do_not(config: TrainConfig) -> None:
  model = dataclasses.replace(config.model, qkv_bias=True, qk_norm=True)
  mask = decay_mask(abstract_decoder(model)[1])
  assert mask["embedding"]
  assert not mask["norm"]["scale"]
  assert not mask["layers"]["attention_norm"]["scale"]
  matrices = {"query", "key", "value", "out"}
  for name, decays in mask["layers"]["attention"].items():
    assert set(jax.tree.leaves(decays)) == {name in matrices}
  assert all(jax.tree.leaves(mask["layers"]["mlp"]))


def test_clipping_bounds_the_gradient_and_reports_it_unclipped(
  config: TrainConfig, batch: Batch
) -> None:
  # Adam's updates do not depend on the scale of the gradient, except far below epsilon, where they
  # are proportional to the gradient. A large epsilon therefore makes clipping visible.
  clip = 1e-3
  norms = []
  for clip_norm in (clip, 2 * clip):
    optimizer = OptimizerConfig(clip_norm=clip_norm, eps=1.0, weight_decay=0.0)
    functions = make_functions(dataclasses.replace(config, optimizer=optimizer))
    before = functions.init().params
    state, scalars = functions.step(functions.init(), batch)
    assert scalars["grad_norm"] > 2 * clip
    norms.append(float(optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before))))
  assert norms[1] == pytest.approx(2 * norms[0], rel=0.05)


def test_schedule(config: TrainConfig) -> None:
  config = dataclasses.replace(config, num_steps=100, warmup_steps=10, learning_rate=1.0)
  rates = np.array([make_schedule(config)(step) for step in range(100)])
  np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
  assert (np.diff(rates[9:]) < 0).all()
  assert rates[-1] == pytest.approx(config.optimizer.final_rate)


def test_moments_in_bfloat16_learn_as_well(config: TrainConfig, batch: Batch) -> None:
  """Moments in bfloat16 take half the bytes and lead to nearly the same loss."""
  losses = []
  for dtype in ("float32", "bfloat16"):
    optimizer = dataclasses.replace(config.optimizer, moment_dtype=dtype)
    functions = make_functions(dataclasses.replace(config, optimizer=optimizer))
    state = functions.init()
    for _ in range(config.num_steps):
      state, scalars = functions.step(state, batch)
    losses.append(float(scalars["loss"]))
    shapes = jax.tree.map(lambda x: x.shape, state.params)
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    assert {str(x.dtype) for x in moments} == {dtype}
    assert {x.shape for x in moments} == set(
      jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    )
  assert losses[1] == pytest.approx(losses[0], rel=0.02)
  with pytest.raises(ValueError, match=r"OptimizerConfig\.b2 is 0\.999"):
    OptimizerConfig(b2=0.999, moment_dtype="bfloat16")


def test_xla_accepts_the_options_of_a_step_on_gpus() -> None:
  """An unknown option is an error on every device."""
  assert step_options(make_mesh(MeshConfig(), jax.devices()[:1])) == {}
  gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
  options = step_options(gpu)
  assert options
  assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2

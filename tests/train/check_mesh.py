"""Checks of the train step on meshes of eight devices; test_mesh.py runs this module."""

import dataclasses
import itertools
import sys

import jax
import numpy as np

from dga_jax import DGAConfig
from dga_jax.model import ModelConfig
from dga_jax.sharding import make_mesh, MeshConfig
from train.config import TrainConfig
from train.data.config import DataConfig
from train.hlo_collectives import Collective, read_collectives
from train.step import Functions, make_functions, mean_gradient

L = 64
ROWS = 6  # Four and eight devices do not divide this number.
SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(shape) == 8]


def train_config(selection: str) -> TrainConfig:
  dga = DGAConfig(
    selection=selection, group_size=4, min_focal_tokens=0, n_recent=4, n_random=4, max_documents=2
  )
  model = ModelConfig(
    vocab_size=48,
    num_layers=2,
    embed_dim=16,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    mlp_dim=32,
    dtype="float32",
    remat="full",
    dga=dga,
  )
  return TrainConfig(
    model=model,
    data=DataConfig(sequence_length=L),
    batch_size=ROWS,
    num_steps=10,
    warmup_steps=1,
    loss_chunk=16,
  )


def make_batch() -> dict[str, np.ndarray]:
  """Two documents per row, with a boundary that differs by row, then padding."""
  rng = np.random.default_rng(0)
  segments_BxL = 1 + (np.arange(L)[None] >= 13 + 7 * np.arange(ROWS)[:, None]).astype(np.int32)
  segments_BxL[:, -5:] = -1
  return {
    "inputs": rng.integers(0, 48, (ROWS, L), dtype=np.int32),
    "targets": rng.integers(0, 48, (ROWS, L), dtype=np.int32),
    "segment_ids": segments_BxL,
    "loss_mask": (segments_BxL > 0) & (rng.random((ROWS, L)) < 0.8),
  }


def gradient(config: TrainConfig, functions: Functions, params) -> tuple:
  @jax.jit
  def run(params, batch):
    with jax.sharding.use_abstract_mesh(functions.mesh.abstract_mesh):
      loss, _, gradient = mean_gradient(config, functions.graphdef, params, batch)
    return loss, gradient

  return jax.device_get(run(params, functions.shard_batch(make_batch())))


def check(selection: str, shapes: list[tuple[int, ...]]) -> None:
  config = train_config(selection)
  one = make_functions(config, make_mesh(MeshConfig(), jax.devices()[:1]))
  state = one.init()
  want = gradient(config, one, state.params)
  assert np.isfinite(want[0])
  for shape in shapes:
    functions = make_functions(config, make_mesh(MeshConfig(*shape)))
    params = jax.device_put(state.params, functions.shardings.params)
    got = gradient(config, functions, params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=str(shape))


def check_step(shape: tuple[int, ...]) -> None:
  """The sharded state and its step equal those of one device, with the expected gathers only."""
  config = dataclasses.replace(train_config("streaming"), grad_accumulation=2)
  model = dataclasses.replace(config.model, vocab_size=56, embed_dim=24, mlp_dim=40)
  config = dataclasses.replace(config, model=model)
  functions = make_functions(config, make_mesh(MeshConfig(*shape)))
  state = functions.init()
  one = make_functions(config, make_mesh(MeshConfig(), jax.devices()[:1]))
  first = one.init()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(first))
  gate = state.params["layers"]["mlp"]["gate"]
  pieces = {shard.data.shape for shard in gate.addressable_shards}
  moments = [x for x in jax.tree.leaves(state.optimizer) if x.shape == gate.shape]
  assert len(moments) >= 2
  assert {x.sharding for x in moments} == {gate.sharding}
  _, fsdp, tensor, context = shape
  assert pieces == {(2, 24 // (fsdp * context), 40 // tensor)}

  batch = functions.shard_batch(make_batch())
  step = functions.step.lower(state, batch).compile()
  check_gathers(read_collectives(step.as_text()))
  state, scalars = step(state, batch)
  first, wanted = one.step(first, one.shard_batch(make_batch()))
  np.testing.assert_allclose(scalars["loss"], wanted["loss"], rtol=1e-6)
  np.testing.assert_allclose(scalars["grad_norm"], wanted["grad_norm"], rtol=1e-5)
  # Adam's first step is the learning rate times the gradient's sign. The sign depends on the order
  # of sums where the gradient is almost 0, so a few parameters may differ by two learning rates.
  params = (jax.tree.leaves(jax.device_get(x.params)) for x in (state, first))
  differences = np.concatenate([np.abs(a - b).ravel() for a, b in zip(*params, strict=True)])
  rate = float(scalars["learning_rate"])
  assert differences.max() < 3 * rate
  assert (differences > 0.01 * rate).mean() < 1e-3


def check_gathers(collectives: list[Collective]) -> None:
  """Asserts that a step gathers only weights, residual stream, summaries and argmax candidates.

  The shapes are those of the mesh (1, 2, 2, 2) and micro-batches of four rows.
  """
  weights = {(24,), (24, 4, 4), (4, 4, 24), (24, 20), (20, 24), (24, 28), (28, 24), (56, 24)}
  states = {(2, 32, 24), (2, 1, 32, 24)}
  # The most likely token of each half of the vocabulary, for a loss chunk of 16 tokens.
  best = {(2, 1, 16, 2)}
  # Summaries of the blocks of 5 tokens that end in a chunk of 16: a focal token and a group each.
  summaries = {(2, 4, 4, 2, 4, 4)}
  assert not any(one.kind == "all-to-all" for one in collectives)
  found = {
    dims[1:] if dims[0] == 1 else dims
    for one in collectives
    if one.kind == "all-gather"
    for _, dims in one.shapes
  }
  assert found <= weights | states | best | summaries, found
  assert found >= summaries | {(24, 4, 4), (20, 24)}


if __name__ == "__main__":
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_disable_most_optimizations", True)
  if sys.argv[1] == "step":
    check_step((1, 2, 2, 2))
  else:
    check(sys.argv[1], SHAPES if sys.argv[2] == "all" else eval(sys.argv[2]))

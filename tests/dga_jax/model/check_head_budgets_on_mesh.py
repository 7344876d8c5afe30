"""Heads with settings of their own on four devices; run by test_head_budgets.py."""

from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dga_jax import DGAConfig, HeadBudgets, SinkWindow
from dga_jax.attention import attend_heads
from dga_jax.attention.segments import find_documents
from dga_jax.attention.sink_window import attend_sink_window, prepare_sink_window
from dga_jax.sharding import make_mesh, MeshConfig
from tests.dga_jax.attention import cases, mesh_cases
from tests.dga_jax.model import decoder_on_mesh
from tests.dga_jax.model.check_decoder_on_mesh import equal, one_device, run_on

WINDOW = DGAConfig(
  selection="streaming",
  selector="fitted",
  group_size=2,
  sink_tokens=2,
  local_window=1,
  max_documents=2,
)
# Two devices that split heads have different settings.
BUDGETS = HeadBudgets(("full", WINDOW, SinkWindow(5, sinks=2)), ((0, 1, 2, 1), (1, 2, 0, 1)))


def config_of(budgets):
  return decoder_on_mesh.model_config(
    attention="head_budgets", head_budgets=budgets, focal_selector=True
  )


def check_decoder():
  """Rows, heads and sequences split: the logits and gradients of one device."""
  config = config_of(BUDGETS)
  params, want = one_device(config)
  for sizes in ({"data": 2, "tensor": 2}, {"data": 2, "context": 2}):
    _, got = run_on(make_mesh(MeshConfig(**sizes)), config, params, decoder_on_mesh.RULES["own"])
    equal(got, want, str(sizes))


def check_refusal():
  """Sequences are not split where devices of one sequence have different settings."""
  config = config_of(BUDGETS)
  params = nnx.to_pure_dict(nnx.state(decoder_on_mesh.abstract_decoder(config)))
  run = decoder_on_mesh.logits_and_gradient(config)
  with (
    jax.set_mesh(make_mesh(MeshConfig(data=1, context=2, tensor=2))),
    pytest.raises(ValueError, match=r"apply_budgets\(model, budgets, parts=2\)"),
  ):
    jax.eval_shape(run, params, decoder_on_mesh.draw_batch())


def check_op(*, joint: bool):
  """The op with rows and heads split over Explicit axes; with `joint` one call for all heads.

  The devices have different settings, and adjacent heads of each.
  """
  q, k, v, t = cases.arrays(0, B=4, L=24, H=8, N=4, D=4)
  ids = np.arange(24, dtype=np.int32)[None] // np.array([[12], [13], [24], [15]])
  budgets = BUDGETS.layer(0)
  scores = np.random.default_rng(1).normal(size=(4, 24, 4)).astype(np.float32)
  options = {"segment_ids": ids, "focal_scores": scores}
  mesh = mesh_cases.make_mesh("foreign", AxisType.Explicit)
  sharding = NamedSharding(mesh, P("x", None, "y"))
  run = mesh_cases.op(budgets, sharding, **options)
  want = cases.run(q, k, v, t, config=budgets, implementation=None, **options)
  rows = []

  def choose(query, classes, settings, implementation=None):
    rows.append(classes.row)
    return joint and classes.are_adjacent

  jax.clear_caches()
  with mock.patch.object(attend_heads, "attends_jointly", choose):
    got = jax.jit(run)(*jax.device_put((q, k, v, t), sharding))
  assert set(rows) == {(0, 1), (2, 1)}
  equal(got, want)


def check_empty_sources():
  """The gradient of windows without sinks in a loop on a mesh, which crashed XLA's compiler."""
  mesh = make_mesh(MeshConfig(data=4))
  ids = np.arange(24, dtype=np.int32)[None] // np.full((4, 1), 10)

  def layers(q, k, v, ids):
    metadata = prepare_sink_window(find_documents(*ids.shape, None, ids), sinks=0, window=5)
    return jax.lax.scan(lambda q, _: (attend_sink_window(q, k, v, metadata), None), q, length=2)[0]

  q, k, v, t = cases.arrays(0, B=4, L=24, H=4, N=4, D=4)
  rows = P("data")
  split = jax.shard_map(layers, mesh=mesh, in_specs=rows, out_specs=rows)
  results = []
  for run in (layers, split):
    out, pull = jax.jit(lambda *x, run=run: jax.vjp(lambda *x: run(*x, ids), *x))(q, k, v)
    results.append((out, *jax.jit(pull)(t)))
  equal(*results)


if __name__ == "__main__":
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_disable_most_optimizations", True)
  check_empty_sources()
  check_op(joint=False)
  check_op(joint=True)
  check_decoder()
  check_refusal()

"""Checks of the op on meshes of four devices; test_mesh.py runs this module."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dga_jax import dynamic_group_attention, GroupPlan, plan_groups
from tests.dga_jax.attention import cases, mesh_cases
from train.hlo_collectives import read_collectives

ARRAYS = cases.arrays(0, B=4, L=24, H=8, N=4, D=4)
ROWS = {
  "lengths": np.array([24, 3, 0, 20], np.int32),
  "segment_ids": np.arange(24, dtype=np.int32)[None] // np.array([[12], [2], [24], [9]]),
}
SPEC = P("x", None, "y")


def equal(got, want, message=""):
  """Asserts equality up to rounding: the order of sums in gradients depends on the mesh."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6, err_msg=message)


def check_matrix(meshes):
  """Outputs and gradients equal one device's, without collectives, on every mesh and split."""
  want = {
    selection: cases.run(*ARRAYS, config=cases.CONFIGS[selection], implementation=None)
    for selection in mesh_cases.SELECTIONS
  }
  for names, axis_type in meshes:
    mesh = mesh_cases.make_mesh(names, axis_type)
    run, shardings = mesh_cases.make_run(names, mesh, mesh_cases.CASES)
    arrays = {split: jax.device_put(ARRAYS, sharding) for split, sharding in shardings.items()}
    program = jax.jit(run).lower(arrays).compile()
    assert not read_collectives(program.as_text()), (names, axis_type)
    for (split, selection), outputs in program(arrays).items():
      case = f"{names} {axis_type} {split} {selection}"
      equal(outputs, want[selection], case)
      assert all(x.sharding.is_equivalent_to(shardings[split], 4) for x in outputs), case


def foreign(axis_type):
  """A mesh with foreign axis names, arrays on it, and the `sharding` argument for Auto axes."""
  mesh = mesh_cases.make_mesh("foreign", axis_type)
  sharding = NamedSharding(mesh, SPEC)
  given = {"sharding": sharding} if axis_type == AxisType.Auto else {}
  return mesh, jax.device_put(ARRAYS, sharding), given


def check_outside_jit(axis_type):
  """Outside jit the op reads the sharding of its arrays, and shards rows and plans alike."""
  mesh, (q, k, v, _), given = foreign(axis_type)
  config = dataclasses.replace(cases.CONFIGS["global"], max_documents=None)
  want_plan = plan_groups(*ARRAYS[:2], config=config, **ROWS)
  want = dynamic_group_attention(*ARRAYS[:3], config=config, plan=want_plan)
  equal(dynamic_group_attention(q, k, v, config=config, **ROWS), want)
  replicated = jax.device_put(ROWS, NamedSharding(mesh, P()))
  plan = plan_groups(q, k, config=config, **replicated)
  assert plan.focal_mask.sharding.is_equivalent_to(NamedSharding(mesh, P("x", "y")), 3)
  assert plan.config == config
  np.testing.assert_array_equal(plan.focal_mask, want_plan.focal_mask)
  equal(dynamic_group_attention(q, k, v, config=config, plan=plan, **ROWS), want)
  planned = jax.jit(
    lambda q, k, v, plan: dynamic_group_attention(q, k, v, config=config, plan=plan, **given)
  )
  equal(planned(q, k, v, plan), want)
  equal(planned(q, k, v, want_plan), want)
  mask = GroupPlan.from_focal_mask(np.asarray(plan.focal_mask), config=config, **ROWS)
  equal(dynamic_group_attention(q, k, v, config=config, plan=mask), want)


def check_streaming_plan(axis_type):
  """A streaming plan made on a mesh equals one device's; ranges shared by heads stay size 1."""
  _, (q, k, v, _), given = foreign(axis_type)
  config = cases.CONFIGS["streaming-sinks-window"]
  want_plan = plan_groups(*ARRAYS[:2], config=config, **ROWS)
  plan = jax.jit(lambda q, k: plan_groups(q, k, config=config, **ROWS, **given))(q, k)
  for got, want in zip(
    jax.tree.leaves(plan),
    jax.tree.leaves(dataclasses.replace(want_plan, invalid=plan.invalid)),
    strict=True,
  ):
    np.testing.assert_array_equal(got, want)
  want = dynamic_group_attention(*ARRAYS[:3], config=config, plan=want_plan)
  equal(dynamic_group_attention(q, k, v, config=config, plan=plan), want)


def check_random_selection(axis_type):
  """Random selection draws the same focal tokens for a head on any device."""
  _, (q, k, v, _), given = foreign(axis_type)
  config = cases.CONFIGS["random-sinks-bias"]
  for options in ({}, {"implementation": "reference"}, {"scale": 0.5}):
    want = dynamic_group_attention(*ARRAYS[:3], config=config, **options)
    op = jax.jit(
      lambda q, k, v, o=options: dynamic_group_attention(q, k, v, config=config, **given, **o)
    )
    equal(op(q, k, v), want)


def check_bidirectional(axis_type):
  """The op and its plan, whose ranges differ between heads under every selection."""
  _, (q, k, v, _), given = foreign(axis_type)
  config = cases.CONFIGS["bidirectional-streaming-sinks-window"]
  want = dynamic_group_attention(*ARRAYS[:3], config=config, **ROWS)
  equal(dynamic_group_attention(q, k, v, config=config, **ROWS, **given), want)
  plan = plan_groups(q, k, config=config, **ROWS, **given)
  equal(dynamic_group_attention(q, k, v, config=config, plan=plan, **given), want)


def check_transformations(axis_type):
  """The op under vmap, checkpoint, grad outside jit, and a shard_map over all or some mesh axes."""
  mesh, (q, k, v, t), given = foreign(axis_type)
  config = cases.CONFIGS["global"]
  want, *gradients = cases.run(*ARRAYS, config=config, implementation=None)

  def op(q, k, v, **given):
    return dynamic_group_attention(q, k, v, config=config, **given)

  def loss(q, k, v):
    return (jax.checkpoint(lambda *x: op(*x, **given))(q, k, v) * t).sum()

  with jax.set_mesh(mesh):
    equal(jax.grad(loss, argnums=(0, 1, 2))(q, k, v), gradients)
  stacked = (jnp.stack([x, x]) for x in (q, k, v))
  equal(jax.jit(jax.vmap(lambda *x: op(*x, **given)))(*stacked), jnp.stack([want, want]))

  everywhere = jax.shard_map(op, mesh=mesh, in_specs=(SPEC,) * 3, out_specs=SPEC)
  equal(jax.jit(everywhere)(q, k, v), want)
  heads = {"sharding": NamedSharding(mesh, P(None, None, "y"))} if given else {}
  rows = jax.shard_map(
    lambda *x: op(*x, **heads),
    mesh=mesh,
    in_specs=(P("x"),) * 3,
    out_specs=P("x"),
    axis_names={"x"},
  )
  equal(jax.jit(rows)(q, k, v), want)


def check_unknown_and_mixed_axes():
  """Without kernels XLA partitions Auto axes of unknown sharding, and mixed Auto/Explicit axes."""
  config = cases.CONFIGS["streaming"]
  op = jax.jit(lambda q, k, v: dynamic_group_attention(q, k, v, config=config))
  want = op(*ARRAYS[:3])
  _, (q, k, v, _), _ = foreign(AxisType.Auto)
  equal(op(q, k, v), want)
  mixed = jax.make_mesh((2, 2), ("x", "y"), axis_types=mesh_cases.AXIS_TYPES)
  equal(op(*jax.device_put(ARRAYS[:3], NamedSharding(mixed, SPEC))), want)


if __name__ == "__main__":
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_disable_most_optimizations", True)
  if sys.argv[1] in ("matrix", "diagonal"):
    check_matrix(mesh_cases.MESHES if sys.argv[1] == "matrix" else mesh_cases.DIAGONAL)
  else:
    axis_type = AxisType[sys.argv[1]]
    check_outside_jit(axis_type)
    check_streaming_plan(axis_type)
    check_random_selection(axis_type)
    check_bidirectional(axis_type)
    check_transformations(axis_type)
    if axis_type == AxisType.Auto:
      check_unknown_and_mixed_axes()

"""The decoder on four devices; run by test_decoder_on_mesh.py in a process that has four."""

import contextlib
import sys

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dga_jax.sharding import ShardingRules, use_rules
from tests.dga_jax.attention import mesh_cases
from tests.dga_jax.model import decoder_on_mesh as cases
from tests.dga_jax.model.random_decoder import random_decoder
from train.hlo_collectives import read_collectives


def equal(got, want, message=""):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=message)


def run_on(mesh, config, params, rules, *, stored=None, in_force=True, tokens=None):
  """The compiled program, and its results.

  Args:
    rules: of the computation, on Auto axes.
    stored: rules by which parameters and the batch are put on the mesh, if others.
    in_force: whether jax.set_mesh is used.
    tokens: how tokens are split, if not like the batch.
  """
  run = cases.logits_and_gradient(config)
  arguments = jax.device_put(
    (params, cases.draw_batch()), cases.shardings(config, mesh, stored or rules)
  )
  if tokens is not None:
    arguments[1]["tokens"] = jax.device_put(arguments[1]["tokens"], NamedSharding(mesh, tokens))
  with contextlib.ExitStack() as stack:
    if in_force:
      stack.enter_context(jax.set_mesh(mesh))
    if mesh.abstract_mesh.auto_axes:
      stack.enter_context(use_rules(rules))
    program = jax.jit(run).lower(*arguments).compile()
  return program, program(*arguments)


def one_device(config):
  """Parameters, and the results of one device."""
  params = nnx.to_pure_dict(nnx.state(random_decoder(config)))
  return params, jax.jit(cases.logits_and_gradient(config))(params, cases.draw_batch())


def gathered(program):
  """Shapes of what is gathered, without axes of size 1."""
  collectives = read_collectives(program.as_text())
  assert not any(one.kind in ("all-to-all", "collective-permute") for one in collectives)
  gathers = [one for one in collectives if one.kind == "all-gather"]
  return {tuple(n for n in dims if n > 1) for one in gathers for _, dims in one.shapes}


def check_matrix(selection, meshes):
  """Weights and the residual stream are gathered, queries, keys and values are not."""
  config = cases.model_config(selection)
  params, want = one_device(config)
  # Weights are stored in parts along embed, and stay split along heads, MLP and vocabulary.
  weights = {(16,), (16, 4, 4), (4, 4, 16), (16, 2, 4), (16, 16), (16, 24), (24, 16)}
  # The residual stream between layers, by the rules of the own mesh, and the table to look up in.
  residual = {(2, 24, 16), (48, 16), (16, 48)}
  for names, axis_type in meshes:
    mesh, rules = mesh_cases.make_mesh(names, axis_type), cases.RULES[names]
    program, got = run_on(mesh, config, params, rules)
    equal(got, want, f"{names} {axis_type}")
    if axis_type == AxisType.Explicit:
      split = NamedSharding(mesh, P(rules.batch, None, rules.vocab))
      assert got[0].sharding.is_equivalent_to(split, 3), got[0].sharding
    assert gathered(program) <= weights | residual, (names, axis_type, gathered(program))


def check_without_rules():
  """The compiler splits what no rule splits; attention computes on whole arrays."""
  config = cases.model_config()
  params, want = one_device(config)
  mesh = mesh_cases.make_mesh("foreign", AxisType.Auto)
  stored = cases.RULES["foreign"]
  _, got = run_on(mesh, config, params, ShardingRules(), stored=stored, in_force=False)
  equal(got, want)


def check_context_parallel():
  """Sequences are split over a mesh axis of any name."""
  config = cases.model_config("global")
  params, want = one_device(config)
  rules = ShardingRules(batch=("x",), length=("y",), residual_length=("y",), stored_embed=("x",))
  for axis_type, tokens in ((AxisType.Auto, None), (AxisType.Explicit, P("x", "y"))):
    mesh = mesh_cases.make_mesh("foreign", axis_type)
    _, got = run_on(mesh, config, params, rules, in_force=False, tokens=tokens)
    equal(got, want, str(axis_type))


def check_other_kinds():
  """Kinds of attention without a mesh of their own."""
  for attention in ("dense", "streaming_llm"):
    config = cases.model_config(attention=attention)
    params, want = one_device(config)
    mesh = mesh_cases.make_mesh("foreign", AxisType.Explicit)
    equal(run_on(mesh, config, params, cases.RULES["foreign"])[1], want, attention)


if __name__ == "__main__":
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_disable_most_optimizations", True)
  if sys.argv[1] == "matrix":
    check_matrix("streaming", mesh_cases.MESHES)
    check_matrix("global", [("foreign", AxisType.Explicit)])
  else:
    check_without_rules()
    check_context_parallel()
    check_other_kinds()

"""Checks of the decoder on four devices; test_decoder_on_mesh.py runs this module."""

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
  """Compiles and runs logits and gradient on a mesh; returns the program and its results.

  Args:
    mesh: a mesh of four devices.
    config: the model's config.
    params: the parameters, on one device.
    rules: sharding rules of the computation, which only Auto axes need.
    stored: sharding rules of the stored parameters and of the batch; None takes `rules`.
    in_force: whether to set the mesh with jax.set_mesh.
    tokens: PartitionSpec of the tokens; None takes that of the batch.
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
  """The parameters, and the logits and gradient on one device."""
  params = nnx.to_pure_dict(nnx.state(random_decoder(config)))
  return params, jax.jit(cases.logits_and_gradient(config))(params, cases.draw_batch())


def gathered(program):
  """Shapes of the arrays that the program gathers, without axes of size 1."""
  collectives = read_collectives(program.as_text())
  assert not any(op.kind in ("all-to-all", "collective-permute") for op in collectives)
  gathers = [op for op in collectives if op.kind == "all-gather"]
  return {tuple(n for n in dims if n > 1) for op in gathers for _, dims in op.shapes}


def check_matrix(selection, meshes):
  """Results equal one device's; the program gathers only weights and the residual stream."""
  config = cases.model_config(selection)
  params, want = one_device(config)
  # Weights are stored split along embed. Gathered weights stay split along heads, MLP, vocabulary.
  weights = {(16,), (16, 4, 4), (4, 4, 16), (16, 2, 4), (16, 16), (16, 24), (24, 16)}
  # The residual stream between layers under the default rules, and the embedding table.
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
  """Without rules XLA partitions the computation, and the results are unchanged."""
  config = cases.model_config()
  params, want = one_device(config)
  mesh = mesh_cases.make_mesh("foreign", AxisType.Auto)
  stored = cases.RULES["foreign"]
  _, got = run_on(mesh, config, params, ShardingRules(), stored=stored, in_force=False)
  equal(got, want)


def check_context_parallel():
  """Context parallelism works on a mesh axis with a foreign name."""
  config = cases.model_config("global")
  params, want = one_device(config)
  rules = ShardingRules(batch=("x",), length=("y",), residual_length=("y",), stored_embed=("x",))
  for axis_type, tokens in ((AxisType.Auto, None), (AxisType.Explicit, P("x", "y"))):
    mesh = mesh_cases.make_mesh("foreign", axis_type)
    _, got = run_on(mesh, config, params, rules, in_force=False, tokens=tokens)
    equal(got, want, str(axis_type))


def check_other_kinds():
  """Attention kinds without a partitioning of their own give one device's results."""
  for attention in ("dense", "streaming_llm"):
    config = cases.model_config(attention=attention)
    params, want = one_device(config)
    mesh = mesh_cases.make_mesh("foreign", AxisType.Explicit)
    equal(run_on(mesh, config, params, cases.RULES["foreign"])[1], want, attention)


if __name__ == "__main__":
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_disable_most_optimizations", True)
  if sys.argv[1] == "diagonal":
    check_matrix("streaming", mesh_cases.DIAGONAL[:1])
    check_matrix("global", mesh_cases.DIAGONAL[1:])
  elif sys.argv[1] == "matrix":
    check_matrix("streaming", mesh_cases.MESHES)
    check_matrix("global", [("foreign", AxisType.Explicit)])
  else:
    check_without_rules()
    check_context_parallel()
    check_other_kinds()

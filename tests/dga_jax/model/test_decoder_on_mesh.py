"""The decoder on meshes: values on four devices, H100 lowering, TPU programs, invalid rules."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import _aot_gpu, _aot_tpu
from dga_jax.sharding import (
  constrain,
  current_rules,
  fsdp_all_gather,
  ShardingRules,
  use_rules,
)
from tests.dga_jax.attention import mesh_cases
from tests.dga_jax.model import decoder_on_mesh as cases
from tests.nightly import nightly
from train.hlo_collectives import read_collectives

ROOT = Path(__file__).parents[3]
H100 = _aot_gpu.abstract_mesh().abstract_device


@pytest.mark.parametrize("check", ["diagonal", *nightly("matrix", "others")])
def test_logits_and_gradients_equal_those_of_one_device(check: str) -> None:
  """Runs in a subprocess, because JAX fixes the number of devices when it starts."""
  flags = "--xla_force_host_platform_device_count=4"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "tests.dga_jax.model.check_decoder_on_mesh", check]
  done = subprocess.run(
    command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]


def traced(mesh):
  """Traces logits and gradient of a model whose shapes the accelerators' kernels support."""
  rules = cases.RULES["foreign"]
  config = cases.model_config(head_dim=64, embed_dim=128, mlp_dim=128, dtype="bfloat16")
  run = cases.logits_and_gradient(config)
  shapes = cases.shapes_on(config, mesh, rules, B=4, L=256)
  with use_rules(rules):  # Only Auto axes need rules.
    return jax.jit(run).trace(*shapes)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("axis_type", mesh_cases.AXIS_TYPES, ids=str)
def test_h100_kernels_receive_one_devices_rows_and_heads(axis_type) -> None:
  mesh = mesh_cases.abstract_mesh("foreign", axis_type, H100)
  text = traced(mesh).lower(lowering_platforms=("cuda",)).as_text()
  kernels = re.findall(r"custom_call @mosaic_gpu_v2\(.*", text)
  found = {array for line in kernels for array in re.findall(r"tensor<([\dx]+)xbf16>", line)}
  assert "2x256x4x64" in found  # 2 of 4 rows and 4 of 8 heads.
  assert "4x256x8x64" not in found


@pytest.mark.aot
def test_a_tpu_program_gathers_only_weights() -> None:
  mesh = mesh_cases.make_mesh("foreign", AxisType.Explicit, _aot_tpu.topology_devices())
  program = traced(mesh).lower(lowering_platforms=("tpu",)).compile()
  gathers = [x for x in read_collectives(program.as_text()) if x.kind == "all-gather"]
  # Sequences have 256 tokens, and no axis of a weight has 256 entries.
  assert gathers
  assert not any(256 in dims for op in gathers for _, dims in op.shapes)


def test_heads_that_the_mesh_does_not_divide_are_an_error() -> None:
  mesh = mesh_cases.abstract_mesh("foreign", AxisType.Auto)
  config = cases.model_config(num_kv_heads=2)
  shapes = cases.shapes_on(config, mesh, ShardingRules(batch=()), B=4, L=24)
  rules = ShardingRules(batch=(), heads=("x", "y"))
  with use_rules(rules), pytest.raises(ValueError, match=r"2 KV heads .* split heads into 4 parts"):
    jax.jit(cases.logits_and_gradient(config)).trace(*shapes)


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ({"batch": "data"}, r"ShardingRules.batch is 'data'; it must be a tuple"),
    ({"heads": (1,)}, r"ShardingRules.heads is \(1,\); it must be a tuple"),
    ({"length": ("x", "y")}, "may name one mesh axis at most"),
  ],
)
def test_invalid_rules_are_errors(rules, message) -> None:
  with pytest.raises(ValueError, match=message):
    ShardingRules(**rules)


def test_other_rules_retrace_a_jitted_function() -> None:
  mesh = mesh_cases.abstract_mesh("foreign", AxisType.Auto)
  traces = []

  @jax.jit
  def gather(table):
    traces.append(current_rules())
    return fsdp_all_gather(table, ("vocab", "embed"))

  table = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P()))
  for rules in (ShardingRules(), ShardingRules(vocab=("x",)), ShardingRules()):
    with jax.sharding.use_abstract_mesh(mesh), use_rules(rules):
      gather.trace(table)
  assert traces == [ShardingRules(), ShardingRules(vocab=("x",))]


def test_array_axes_without_rules_are_unconstrained() -> None:
  names, shape = ("batch", "heads", None), (4, 8, 16)
  mesh = mesh_cases.abstract_mesh("foreign", AxisType.Auto)
  for rules, expected in (
    (cases.RULES["foreign"], P("x", "y", None)),
    (ShardingRules(batch=("x",)), P("x", P.UNCONSTRAINED, P.UNCONSTRAINED)),
  ):
    with jax.sharding.use_abstract_mesh(mesh), use_rules(rules):
      jaxpr = jax.make_jaxpr(lambda x: constrain(x, *names))(jnp.zeros(shape))
    (equation,) = jaxpr.eqns
    spec = equation.params["sharding"].spec
    unconstrained = equation.params["unconstrained_dims"]
    found = P(*(P.UNCONSTRAINED if i in unconstrained else entry for i, entry in enumerate(spec)))
    assert found == expected

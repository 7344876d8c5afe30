"""The op on meshes: values on four simulated devices, lowering for H100s, TPU programs, errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import _aot_gpu, _aot_tpu
from dga_jax import dynamic_group_attention, plan_groups
from tests.dga_jax.attention import mesh_cases
from tests.dga_jax.attention.cases import CONFIGS
from tests.nightly import nightly, nightly_except
from train.hlo_collectives import read_collectives

ROOT = Path(__file__).parents[3]
H100 = _aot_gpu.abstract_mesh().abstract_device


@pytest.mark.parametrize("check", ["diagonal", "Explicit", *nightly("matrix", "Auto")])
def test_values_equal_those_of_one_device(check: str) -> None:
  """Runs in a subprocess, because JAX fixes the number of devices when it starts."""
  flags = "--xla_force_host_platform_device_count=4"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "tests.dga_jax.attention.check_mesh", check]
  done = subprocess.run(
    command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
  ("names", "axis_type"), nightly_except(mesh_cases.MESHES, *mesh_cases.DIAGONAL), ids=str
)
def test_h100_kernels_receive_one_devices_rows_and_heads(names, axis_type) -> None:
  mesh = mesh_cases.abstract_mesh(names, axis_type, H100)
  cases = mesh_cases.kernel_cases(names, axis_type)
  run, shardings = mesh_cases.make_run(names, mesh, cases)
  arguments = mesh_cases.shapes(shardings, H=24)
  text = jax.jit(run).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()
  kernels = re.findall(r"custom_call @(?:mosaic_gpu_v2|__gpu\$xla\.gpu\.triton)\(.*", text)
  assert len(kernels) >= 5 * len(cases)
  found = {array for line in kernels for array in re.findall(r"tensor<([\dx]+)xbf16>", line)}
  for split, (query, key, *_) in arguments.items():
    for x in (query, key):
      assert dims(x.shape) not in found
      assert dims(shardings[split].shard_shape(x.shape)) in found


def dims(shape: tuple[int, ...]) -> str:
  return "x".join(map(str, shape))


@pytest.mark.aot
@pytest.mark.parametrize(
  ("names", "axis_type"), nightly_except(mesh_cases.MESHES, *mesh_cases.DIAGONAL), ids=str
)
def test_tpu_programs_contain_no_collectives(names, axis_type) -> None:
  mesh = mesh_cases.make_mesh(names, axis_type, _aot_tpu.topology_devices())
  run, shardings = mesh_cases.make_run(names, mesh, mesh_cases.kernel_cases(names, axis_type))
  traced = jax.jit(run).trace(mesh_cases.shapes(shardings))
  text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
  for kernel in ("grouped_attention_forward", "grouped_attention_dq", "group_merge"):
    assert kernel in text
  assert not read_collectives(text)


def typed(mesh, spec, *, H=8, N=4, kv_spec=None, B=4):
  """Shapes of query, key and value with shardings on a mesh."""
  kv_spec = spec if kv_spec is None else kv_spec
  return tuple(
    jax.ShapeDtypeStruct((B, 24, heads, 16), jnp.float32, sharding=NamedSharding(mesh, s))
    for heads, s in ((H, spec), (N, kv_spec), (N, kv_spec))
  )


def call(arrays, **options):
  """Traces the op without running it."""
  config = CONFIGS["streaming"]
  jax.eval_shape(lambda *x: dynamic_group_attention(*x, config=config, **options), *arrays)


EXPLICIT = mesh_cases.abstract_mesh("foreign", AxisType.Explicit)
AUTO = mesh_cases.abstract_mesh("foreign", AxisType.Auto)


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    (typed(EXPLICIT, P("x", "y")), r"query \[4, 24, 8, 16\] is split along its length .*'y'.*"),
    (typed(EXPLICIT, P(None, None, None, "x")), "query .* is split along head_dim .*'x'"),
    (
      typed(EXPLICIT, P("x", None, "y"), kv_spec=P("x")),
      r"query has rows split over \('x',\) and heads over \('y',\), and key .*reshard",
    ),
    (
      typed(EXPLICIT, P(None, None, ("x", "y")), N=2, kv_spec=P(None, None, "x")),
      "size divides the number of KV heads",
    ),
  ],
)
def test_unsupported_shardings_are_errors(arrays, message) -> None:
  with pytest.raises(ValueError, match=message):
    call(arrays)
  plan = lambda q, k: plan_groups(q, k, config=CONFIGS["streaming"])  # noqa: E731
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(plan, *arrays[:2])


@pytest.mark.parametrize(
  ("arrays", "spec", "message"),
  [
    (typed(AUTO, P(), B=3), P("x"), "The batch has 3 rows .* split them into 2 .*padding"),
    (
      typed(AUTO, P(), N=2),
      P(None, None, ("x", "y")),
      "2 KV heads .* split heads into 4 parts, .*fewer devices",
    ),
    (typed(AUTO, P()), P("x", "y"), "along its length"),
    (typed(AUTO, P()), P(P.UNCONSTRAINED), "it must name the mesh axes"),
    (typed(EXPLICIT, P("x")), P("y"), "type of query says .*leave it out"),
  ],
)
def test_invalid_sharding_arguments_are_errors(arrays, spec, message) -> None:
  mesh = arrays[0].sharding.mesh
  with pytest.raises(ValueError, match=message):
    call(arrays, sharding=NamedSharding(mesh, spec))


def test_kernels_on_auto_axes_need_the_sharding_argument() -> None:
  mesh = mesh_cases.abstract_mesh("foreign", AxisType.Auto, H100)
  arrays = typed(mesh, P("x"))
  with pytest.raises(ValueError, match=r"mesh axes \('x', 'y'\) split query is unknown.*sharding="):
    call(arrays)
  call(arrays, sharding=NamedSharding(mesh, P("x")))
  with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match="is unknown"):
    call(typed(mesh, P()))


@pytest.mark.invalid_arguments
def test_sharding_and_arrays_must_have_one_mesh() -> None:
  other = AbstractMesh((4,), ("x",), axis_types=(AxisType.Auto,))
  with pytest.raises(ValueError, match=r"query has the mesh axes .* and sharding .*same mesh"):
    call(typed(AUTO, P()), sharding=NamedSharding(other, P("x")))
  with jax.sharding.use_abstract_mesh(other), pytest.raises(ValueError, match="the mesh in force"):
    call(typed(AUTO, P()), sharding=NamedSharding(AUTO, P("x")))
  with pytest.raises(ValueError, match=r"must be a jax\.sharding\.NamedSharding"):
    call(typed(AUTO, P()), sharding=P("x"))


def test_sharding_must_not_name_manual_axes_of_a_shard_map() -> None:
  sharded = jax.shard_map(
    lambda *x: dynamic_group_attention(
      *x, config=CONFIGS["streaming"], sharding=NamedSharding(AUTO, P("x"))
    ),
    mesh=AUTO,
    in_specs=(P("x"),) * 3,
    out_specs=P("x"),
    axis_names={"x"},
  )
  with pytest.raises(ValueError, match=r"split already over \('x',\)"):
    jax.eval_shape(sharded, *typed(AUTO, P()))


def test_vmap_over_a_dimension_sharded_on_explicit_axes_is_an_error() -> None:
  rows = tuple(
    jax.ShapeDtypeStruct((2, *x.shape), x.dtype, sharding=NamedSharding(EXPLICIT, P("x")))
    for x in typed(EXPLICIT, P())
  )
  op = jax.vmap(lambda *x: dynamic_group_attention(*x, config=CONFIGS["streaming"]))
  with pytest.raises(ValueError, match=r"Explicit mesh axes \('x',\) split"):
    jax.eval_shape(op, *rows)

"""The table of backends, the selection of a backend, and the target device of a call."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dga_jax import DGAConfig, dynamic_group_attention
from pallas_kernels import dispatch
from pallas_kernels.dispatch import find_target
from tests.pallas_kernels import h100, tpu

SCORES = jnp.zeros((1, 1, 8))
SHAPE = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)


def _chosen(config: DGAConfig, mesh: AbstractMesh) -> dict[str, str]:
  """The backend of each kernel op in one call of `dynamic_group_attention`."""
  with jax.sharding.use_abstract_mesh(mesh), dispatch.collect_reports() as reports:
    jax.eval_shape(lambda *x: dynamic_group_attention(*x, config=config), *[SHAPE] * 3)
  return {report.op: report.chosen for report in reports}


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_backend_exists_and_the_last_runs_on_any_device(op: str):
  names = [backend.name for backend in dispatch.OPS[op]]
  assert len(set(names)) == len(names)
  for backend in dispatch.OPS[op]:
    if backend.name == "jax_triton":
      continue  # Its packages are optional.
    assert callable(dispatch._load(backend.function)) or op in ("attend_heads", "decode_heads")
    if backend.refusal is not None:
      assert inspect.isfunction(dispatch._load(backend.refusal))
  last = dispatch.OPS[op][-1]
  # Without a kernel for all heads of a layer, other ops run the heads of each setting.
  name = "each_setting" if op in ("attend_heads", "decode_heads") else "xla"
  assert (last.name, last.requirement.device) == (name, "any device")
  assert last.refusal is last.only_by_name is None


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("implementation", ["fast", ("xla", "fast"), ()])
def test_an_unknown_name_is_an_error_that_lists_the_names(op: str, implementation):
  last = dispatch.OPS[op][-1].name
  with pytest.raises(ValueError, match=rf"for {op} it must be None, one of \(.*'{last}',?\)"):
    dispatch.check_implementation(op, implementation)


def test_the_first_name_that_supports_the_call_is_used():
  def choose(implementation):
    return dispatch.choose("segmented_top_k", implementation, SCORES, None)

  assert choose(None) == choose("xla") == choose(("mosaic_tpu", "xla")) == "xla"
  with pytest.raises(NotImplementedError, match=r"triton: runs on .* this call is for cpu"):
    choose("triton")
  with pytest.raises(NotImplementedError, match=r"mosaic_tpu: runs on a TPU.*; triton: runs on an"):
    choose(("mosaic_tpu", "triton"))
  with jax.sharding.use_abstract_mesh(h100.abstract_mesh()):
    assert choose(None) == choose(("mosaic_tpu", "triton", "xla")) == "triton"
    assert choose(("xla", "triton")) == "xla"


def test_a_report_gives_every_reason_and_runs_nothing():
  with jax.sharding.use_abstract_mesh(tpu.abstract_mesh()):
    long = jax.ShapeDtypeStruct((1, 1, 2**19 + 1), jnp.float32)
    report = dispatch.report("segmented_top_k", None, long, None)
  assert report.chosen == "xla"
  assert list(report.reasons) == ["triton", "mosaic_tpu", "xla"]
  assert "TPU v5 lite" in report.reasons["triton"]
  assert "524289 scores; at most 524288" in report.reasons["mosaic_tpu"]
  assert report.reasons["xla"] is None


def test_only_by_name_backends_are_not_selected_automatically():
  query, sources = SHAPE, None
  options = {"scale": 1.0, "group_bias": 0.0, "max_window": 1}
  report = dispatch.report("grouped_attention", None, query, sources, **options)
  assert report.chosen == "xla"
  assert "only if it is named: it is the slow oracle" in report.reasons["reference"]
  named = dispatch.report("grouped_attention", "reference", query, sources, **options)
  assert (named.chosen, named.reasons["reference"]) == ("reference", None)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_reports_cover_every_op_of_a_call():
  streaming = DGAConfig(selection="streaming", min_focal_tokens=0)
  selected = DGAConfig(selection="global", min_focal_tokens=0)
  gpu, chip = h100.abstract_mesh(), tpu.abstract_mesh()
  assert _chosen(streaming, gpu)["merge_blocks"] == "triton"
  assert _chosen(streaming, gpu)["grouped_attention"] == "mosaic_gpu"
  assert _chosen(streaming, chip)["merge_blocks"] == "mosaic_tpu"
  assert _chosen(selected, gpu) == {
    "sampled_importance": "triton",
    "segmented_top_k": "triton",
    "compact_indices": "xla",
    "merge_groups": "triton",
    "grouped_attention": "mosaic_gpu",
  }
  assert _chosen(selected, chip) == {
    "sampled_importance": "mosaic_tpu",
    "segmented_top_k": "mosaic_tpu",
    "compact_indices": "mosaic_tpu",
    "merge_groups": "mosaic_tpu",
    "grouped_attention": "mosaic_tpu",
  }


def test_reports_are_for_the_given_target():
  with jax.sharding.use_abstract_mesh(h100.abstract_mesh()):
    target = find_target()
  with dispatch.collect_reports(target) as reports:
    jax.eval_shape(
      lambda *x: dynamic_group_attention(*x, config=DGAConfig(min_focal_tokens=0)), *[SHAPE] * 3
    )
  assert {report.target for report in reports} == {target}
  assert reports[-1].chosen == "mosaic_gpu"


def test_the_current_mesh_determines_the_target():
  with jax.sharding.use_abstract_mesh(h100.abstract_mesh()):
    target = find_target(SCORES)
  assert (target.platform, target.capability, target.num_cores) == ("gpu", 9.0, 132)
  assert str(target) == "NVIDIA H100 80GB HBM3 (gpu)"


def test_the_mesh_of_an_array_determines_the_target():
  device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
  mesh = AbstractMesh((1,), ("x",), abstract_device=device)
  sharded = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
  assert find_target({"unsharded": SHAPE, "sharded": sharded}).platform == "tpu"


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_under_jit_the_mesh_of_an_argument_determines_the_target(axis_type):
  seen = []
  mesh = jax.make_mesh((1,), ("x",), axis_types=(axis_type,))
  x = jax.device_put(SCORES, NamedSharding(mesh, PartitionSpec()))
  jax.jit(lambda x: seen.append(find_target(x)) or x)(x)
  assert seen[0].kind == jax.devices()[0].device_kind


@pytest.mark.parametrize(
  ("kind", "capability"), [("NVIDIA A100-SXM4-40GB", 8.0), ("NVIDIA A10G", 8.6), ("MI300X", None)]
)
def test_the_device_kind_gives_the_compute_capability(kind: str, capability: float | None):
  device = AbstractDevice(device_kind=kind, num_cores=108, platform="cuda")
  with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
    target = find_target()
  assert (target.platform, target.capability) == ("gpu", capability)
  assert target.runs_triton == (capability is not None)

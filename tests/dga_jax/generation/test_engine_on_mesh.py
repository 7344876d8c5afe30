"""The engine on a mesh of four simulated devices, in a process that has them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dga_jax import DGAConfig, HeadBudgets
from dga_jax.checkpoint import abstract_decoder
from dga_jax.model import ModelConfig
from dga_jax.serving.launch import parse_mesh

ROOT = Path(__file__).parents[3]


def test_four_devices_give_the_tokens_of_one():
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
  command = [sys.executable, "-m", "tests.dga_jax.generation.check_engine_on_mesh"]
  done = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["4", "tensor=0", "tensor=2,data=2", "tensor=99"])
def test_other_meshes_are_refused(text):
  with pytest.raises(ValueError, match=r"mesh is .*; (it must be tensor=N|use at most tensor=)"):
    parse_mesh(text)


@pytest.mark.parametrize(
  ("method", "assignment"),
  [("decode", None), ("extend", None), ("decode", ((0, 1, 0, 1),))],
)
def test_kernels_of_a_gpu_get_the_heads_of_their_device(
  method: str, assignment: tuple[tuple[int, ...], ...] | None
):
  device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
  axes = ("data", "fsdp", "tensor", "context")
  mesh = AbstractMesh((1, 1, 2, 1), axes, axis_types=(AxisType.Auto,) * 4, abstract_device=device)
  dga = DGAConfig(selection="streaming", group_size=16, focal_per_block=2)
  config = ModelConfig(
    vocab_size=64,
    num_layers=1,
    embed_dim=128,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    mlp_dim=128,
    attention="head_budgets" if assignment else "dga",
    dga=dga,
    head_budgets=HeadBudgets(("full", dga), assignment) if assignment else None,
    dtype="bfloat16",
  )
  structure, params = abstract_decoder(config)

  def run(params, cache, *tokens):
    model = nnx.merge(structure, params)
    if method == "decode":
      return model.decode(*tokens, cache)
    return model.extend(tokens[0], cache, tokens[1])

  one = jax.ShapeDtypeStruct((1,), jnp.int32)
  tokens = (one,) if method == "decode" else (jax.ShapeDtypeStruct((1, 256), jnp.int32), one)
  with jax.sharding.use_abstract_mesh(mesh):
    cache = jax.eval_shape(lambda: nnx.merge(structure, params).init_cache(1, 4096))
    traced = jax.jit(run).trace(params, cache, *tokens)
  (shard_map,) = [eqn for eqn in equations(traced.jaxpr) if eqn.primitive.name == "shard_map"]
  inside = [eqn.primitive.name for eqn in equations(shard_map.params["jaxpr"])]
  kernels = {"pallas_call", "mpmd_map"}
  assert kernels & set(inside)
  outside = [eqn.primitive.name for eqn in equations(traced.jaxpr)]
  assert len([x for x in inside if x in kernels]) == len([x for x in outside if x in kernels])
  # Two of the four KV heads, in the keys and values of one layer; with budgets one of each setting.
  heads = {x.aval.shape[2] for x in shard_map.params["jaxpr"].invars if len(x.aval.shape) == 5}
  assert heads == ({1} if assignment else {2})


def equations(jaxpr) -> list:
  """All equations, with those of inner functions."""
  found = []
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    found.append(eqn)
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        found += equations(inner)
  return found

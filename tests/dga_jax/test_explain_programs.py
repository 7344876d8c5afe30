"""What `explain` lists are the kernels of the traced program, for every kind of head and target."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from dga_jax import DGAConfig, dynamic_group_attention, explain, HeadBudgets, SinkWindow
from dga_jax.explanation import Explanation
from dga_jax.model.attention_kinds.head_budgets import HeadBudgetsAttention, kind_of_setting
from pallas_kernels import dispatch
from tests.pallas_kernels import h100, tpu

L, R = 256, 2
STREAMING = DGAConfig(selection="streaming")
GLOBAL = DGAConfig(min_focal_tokens=0)
SETTINGS = ("full", STREAMING, SinkWindow(64))
CONFIGS = {
  "global": GLOBAL,
  "streaming": STREAMING,
  "mixed": HeadBudgets(SETTINGS, ((0, 1, 2),)),
  "scattered": HeadBudgets(SETTINGS, ((0, 1, 0),)),
  "full": HeadBudgets(SETTINGS, ((0, 0, 0),)),
  "windows": HeadBudgets(SETTINGS, ((2, 2, 2),)),
}
TARGETS = {"cpu": None, "h100": h100.abstract_mesh(), "tpu": tpu.abstract_mesh()}

# The start of the names of the kernels of each op. Ops that are not here run no kernel, or those of
# another op that is listed too.
KERNELS = {
  ("dense_attention", "splash"): "splash_mha",
  ("dense_attention", "cudnn"): "dot_product_attention",
  ("grouped_attention", None): "grouped_attention",
  ("merge_blocks", None): "group_merge",
  ("merge_groups", None): "group_merge",
  ("sampled_importance", None): "importance",
  ("segmented_top_k", None): "segmented_top_k",
  ("compact_indices", None): "compact_indices",
  ("decode_step", "triton"): "decode_step",
  ("decode_attention", None): "decode_attention",
  ("dense_decode_step", None): "decode_dense",
  ("decode_heads", None): "decode_heads",
}
NO_KERNEL = ("xla", "each_setting")


def listed_kernels(explanation: Explanation) -> set[tuple[str, str]]:
  """(start of the name, compiler) of the kernels that an explanation lists."""
  found = set()
  for choice in explanation.ops:
    name = KERNELS.get((choice.op, choice.runs)) or KERNELS.get((choice.op, None))
    if name is not None and choice.runs not in NO_KERNEL:
      found.add((name, "mosaic_tpu" if choice.runs == "splash" else choice.runs))
  return found


def traced_kernels(function: Any, *args: Any) -> set[tuple[str, str]]:
  """(start of the name, compiler) of the kernels in a traced function."""
  found = set()

  def visit(jaxpr: Any) -> None:
    for equation in jaxpr.eqns:
      kind, params = equation.primitive.name, equation.params
      if kind.startswith("dot_product_attention"):
        found.add(("dot_product_attention", "cudnn"))
      elif kind in ("pallas_call", "mpmd_map"):
        options = str(params["compiler_params"])
        is_triton = kind == "pallas_call" and "num_warps" in options
        compiler = "mosaic_gpu" if kind == "mpmd_map" else "triton" if is_triton else "mosaic_tpu"
        found.update(
          (name, compiler) for name in KERNELS.values() if params["name"].startswith(name)
        )
      else:
        for leaf in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "jaxpr")):
          if hasattr(leaf, "jaxpr") or hasattr(leaf, "eqns"):
            visit(getattr(leaf, "jaxpr", leaf))

  visit(jax.make_jaxpr(function)(*args).jaxpr)
  return found


@contextlib.contextmanager
def on(target: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
  """For a GPU this machine traces cuDNN's attention as a machine with CUDA does."""
  if TARGETS[target] is None:
    yield
    return
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
  with jax.sharding.use_abstract_mesh(TARGETS[target]):
    yield


@pytest.mark.parametrize(
  ("name", "target", "head_dim"),
  [
    *((name, target, 64) for name in CONFIGS for target in ("h100", "tpu")),
    ("mixed", "cpu", 64),
    ("mixed", "tpu", 128),
    ("full", "tpu", 128),
    ("full", "h100", 256),
  ],
)
def test_explain_lists_the_kernels_of_the_traced_program(
  name: str, target: str, head_dim: int, monkeypatch: pytest.MonkeyPatch
):
  config = CONFIGS[name]
  N = config.num_kv_heads if isinstance(config, HeadBudgets) else 3
  q = jax.ShapeDtypeStruct((1, L, N * R, head_dim), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, L, N, head_dim), jnp.bfloat16)
  is_mixed = isinstance(config, HeadBudgets)
  kind = HeadBudgetsAttention(config) if is_mixed else kind_of_setting(config)

  def program(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    caches = kind.init_caches(1, 1, L + 1, N, head_dim, jnp.bfloat16)
    token = (q[:, 0], k[:, 0], v[:, 0])
    attended = dynamic_group_attention(q, k, v, config=config)
    return attended, kind.decode(*token, caches, kind.layer_index(0))

  with on(target, monkeypatch):
    found = explain(q, k, k, config=config)
    backends = dispatch.OPS["dense_attention"]
    everywhere = tuple(backend._replace(host_refusal=None) for backend in backends)
    monkeypatch.setitem(dispatch.OPS, "dense_attention", everywhere)
    traced = traced_kernels(program, q, k, k)
  assert listed_kernels(found) == traced
  assert bool(traced) == (target != "cpu")


def test_decoding_is_listed_for_the_settings_that_heads_follow():
  q, k = (jax.ShapeDtypeStruct((1, L, heads, 64), jnp.bfloat16) for heads in (6, 3))

  def ops(name: str) -> dict[str, str]:
    return {choice.op: choice.runs for choice in explain(q, k, k, config=CONFIGS[name]).ops}

  with jax.sharding.use_abstract_mesh(tpu.abstract_mesh()):
    assert ops("mixed").keys() >= {"dense_decode_step", "decode_step", "window_decode_step"}
    assert ops("windows")["decode_heads"] == "each_setting"
    assert not {"dense_decode_step", "decode_step", "dense_attention"} & ops("windows").keys()
    assert ops("full")["dense_attention"] == "splash"
  with jax.sharding.use_abstract_mesh(h100.abstract_mesh()):
    assert ops("mixed")["decode_heads"] == "triton"
    assert ops("mixed")["attend_heads"] == "one_call"
    assert ops("mixed")["dense_attention"] == "cudnn"
    assert not {"dense_decode_step", "decode_step"} & ops("mixed").keys()
    scattered = explain(q, k, k, config=CONFIGS["scattered"])
  assert "not adjacent" in scattered["decode_heads"].reason("triton")
  assert "not adjacent" in scattered["attend_heads"].reason("one_call")
  assert scattered["dense_decode_step"].runs == "triton"

"""`explain` names the backend of every kernel op of a call and of a decode step."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dga_jax import DGAConfig, explain
from tests.pallas_kernels import h100, tpu

QUERY = jax.ShapeDtypeStruct((1, 512, 4, 64), jnp.bfloat16)
KEY = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)
GLOBAL = DGAConfig(min_focal_tokens=0)
STREAMING = DGAConfig(selection="streaming")
SINKS = dataclasses.replace(STREAMING, sink_tokens=2)


@pytest.mark.parametrize(
  ("config", "device", "runs"),
  [
    (
      GLOBAL,
      h100,
      {
        "sampled_importance": "triton",
        "segmented_top_k": "triton",
        "compact_indices": "xla",
        "merge_groups": "triton",
        "grouped_attention": "mosaic_gpu",
        "decode_step": "triton",
      },
    ),
    (
      GLOBAL,
      tpu,
      {
        "sampled_importance": "mosaic_tpu",
        "segmented_top_k": "mosaic_tpu",
        "compact_indices": "mosaic_tpu",
        "merge_groups": "mosaic_tpu",
        "grouped_attention": "mosaic_tpu",
        "decode_step": "mosaic_tpu",
        "decode_attention": "mosaic_tpu",
      },
    ),
    *(
      (
        config,
        h100,
        {"merge_blocks": "triton", "grouped_attention": "mosaic_gpu", "decode_step": "triton"},
      )
      for config in (STREAMING, SINKS)
    ),
  ],
)
def test_every_op_of_a_call_is_listed(config, device, runs):
  with jax.sharding.use_abstract_mesh(device.abstract_mesh()):
    found = explain(QUERY, KEY, KEY, config=config)
  assert {choice.op: choice.runs for choice in found.ops} == runs


def test_explain_reports_the_implementation_argument():
  with jax.sharding.use_abstract_mesh(h100.abstract_mesh()):
    found = explain(QUERY, KEY, KEY, config=GLOBAL, implementation=("mosaic_tpu", "triton"))
    with pytest.raises(NotImplementedError, match="mosaic_tpu: runs on a TPU"):
      explain(QUERY, KEY, KEY, config=GLOBAL, implementation="mosaic_tpu")
  attention = found["grouped_attention"]
  assert attention.runs == "triton"
  assert attention.reason("mosaic_gpu") is None
  assert "runs on a TPU" in attention.reason("mosaic_tpu")
  with pytest.raises(KeyError, match="merge_blocks"):
    found["merge_blocks"]


def test_an_explanation_prints_as_a_short_table():
  with jax.sharding.use_abstract_mesh(h100.abstract_mesh()):
    found = explain(QUERY, KEY, KEY, config=STREAMING)
  lines = str(found).splitlines()
  assert lines[0] == "for NVIDIA H100 80GB HBM3 (gpu); explanation.details() has the reasons"
  assert lines[1] == "op                 runs        cannot run"
  assert lines[2] == "merge_blocks       triton      mosaic_tpu"
  assert len(lines) == 2 + len(found.ops)
  assert max(map(len, lines)) <= 100
  details = found.details().splitlines()
  assert details[0].startswith("merge_blocks: mosaic_tpu: runs on a TPU")
  assert details[1] == "merge_blocks: xla: could run the call, and comes later in the order"

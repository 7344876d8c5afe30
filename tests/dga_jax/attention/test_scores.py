"""Sampled queries, focal quotas of packed documents, and the kernels of a plan on an H100."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dga_jax import DGAConfig, plan_groups
from dga_jax.attention.scores import sample_queries
from dga_jax.attention.segments import find_documents
from dga_jax.attention.selection import document_quotas, select_by_score
from tests.dga_jax.attention.cases import arrays
from tests.pallas_kernels.h100 import lower_for_h100

CONFIG = DGAConfig(
  group_size=4, min_focal_tokens=0, n_recent=3, n_random=4, seed=5, max_documents=3
)


def test_whole_and_padded_rows_sample_the_same_queries():
  """Whole rows sample queries while tracing, padded rows at run time; the order is equal too."""
  whole, padded = find_documents(2, 33, None, None), find_documents(2, 33, np.array([33, 33]), None)
  assert (whole.rows, padded.rows) == ("whole", "padded")
  run = jax.jit(functools.partial(sample_queries, max_documents=1, config=CONFIG))
  for fixed, drawn in zip(run(whole), run(padded), strict=True):
    np.testing.assert_array_equal(fixed, drawn)


def test_document_fields_of_whole_rows_equal_those_of_padded_rows():
  whole, padded = find_documents(2, 33, None, None), find_documents(2, 33, np.array([33, 33]), None)
  for name in ("index", "start", "length", "is_token", "position", "is_last"):
    np.testing.assert_array_equal(getattr(whole, name), getattr(padded, name), err_msg=name)


def test_extents_of_packed_and_whole_rows():
  ids = np.array([[-1, 0, 0, 7, 7, 7, -1, 2], [-1] * 8])
  start, length = find_documents(2, 8, None, ids).extents(4)
  np.testing.assert_array_equal(length, [[2, 3, 1, 0], [0] * 4])
  np.testing.assert_array_equal(start[0, :3], [1, 3, 7])
  start, length = find_documents(2, 8, None, None).extents(1)
  np.testing.assert_array_equal([start[:, 0], length[:, 0]], [[0, 0], [8, 8]])


def test_each_document_selects_its_quota_and_its_sinks():
  config = DGAConfig(group_size=4, min_focal_tokens=0, sink_tokens=2, importance_rate=0.25)
  lengths = [17, 1, 30]
  ids = np.repeat([0, 1, 2, -1], [*lengths, 4])[None]
  documents = find_documents(1, 52, None, ids)
  scores = jax.random.normal(jax.random.key(0), (1, 2, 52))
  quotas = document_quotas(documents, 3, config)
  mask = np.asarray(select_by_score(scores, documents, quotas, config).focal_mask)
  quota = config.focal_quota(52)
  for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
    part = slice(start, start + length)
    kept, row = mask[0, :, part], np.array(scores[0, :, part])
    row[:, :2] = np.inf
    np.testing.assert_array_equal(kept.sum(axis=-1), quota[length])
    for n in range(2):
      np.testing.assert_array_equal(
        np.flatnonzero(kept[n]), np.sort(np.argsort(-row[n], kind="stable")[: quota[length]])
      )
  assert not mask[..., 48:].any()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("rows", ["whole", "packed"])
def test_a_plan_for_an_h100_runs_the_kernels_and_sorts_nothing(rows):
  query, key = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
  ids = None if rows == "whole" else np.repeat([0, 1], 128)[None].repeat(2, axis=0)

  def run(query, key):
    return plan_groups(query, key, config=CONFIG, segment_ids=ids).focal_mask

  program = lower_for_h100(run, query, key)
  for kernel in ("importance_logsumexp", "importance_scores", "segmented_top_k"):
    assert kernel in program
  assert "stablehlo.sort" not in program
  # Only packed rows draw and rank sampled queries at run time, because ids decide the documents.
  assert ("chlo.top_k" in program) == (rows == "packed")


def test_plans_inside_a_shard_map_over_rows():
  query, key, *_ = arrays(0, 2, 24, 2, 1, 4)
  ids = np.repeat([0, 1], [10, 14])[None].repeat(2, axis=0)

  def run(query, key, ids):
    return plan_groups(query, key, config=CONFIG, segment_ids=ids).focal_mask

  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = PartitionSpec("data")
  sharded = jax.shard_map(run, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows)
  np.testing.assert_array_equal(jax.jit(sharded)(query, key, ids), run(query, key, ids))

"""One source for focal tokens and groups gives the output and gradients of two sources."""

import dataclasses

import jax
import numpy as np
import pytest

from dga_jax import DGAConfig
from dga_jax.attention.attend import attend_merged, merge_tokens
from dga_jax.attention.block_entries import for_kernel, in_block_order
from dga_jax.attention.metadata import prepare
from dga_jax.attention.segments import find_documents
from tests.pallas_kernels import h100, tpu
from tests.rounding import assert_same

CONFIG = DGAConfig(
  group_size=5, focal_per_block=2, selection="streaming", sink_tokens=3, local_window=1
)


def _merged(config: DGAConfig, lengths=None, segment_ids=None):
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (2, 90, n, 16)) for key, n in zip(keys, (4, 2, 2), strict=True))
  metadata = prepare(find_documents(2, 90, lengths, segment_ids), config)
  return merge_tokens(q, k, v, metadata), metadata


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("lengths", [None, (90, 2), (41, 90)])
def test_one_source_equals_two(sinks: int, lengths: tuple[int, int] | None):
  config = dataclasses.replace(CONFIG, sink_tokens=sinks)
  lengths = None if lengths is None else np.array(lengths)
  merged, metadata = _merged(config, lengths)
  joint = in_block_order(merged.sources, metadata)
  assert joint.group.key.shape[1] == 0
  assert joint.focal.key.shape[1] == sinks + 3 * ((90 - sinks) // 7)
  assert all((np.diff(x) >= 0).all() for x in (joint.focal.start, joint.focal.end))

  def attend(query, kv, change):
    sources = merged.sources.with_kv(kv)
    if change:
      sources = in_block_order(sources, metadata)
    return attend_merged(merged._replace(query=query, sources=sources), None, config)

  results = []
  for change in (True, False):
    out, pull = jax.vjp(lambda q, kv, c=change: attend(q, kv, c), merged.query, merged.sources.kv)
    results.append(jax.tree.leaves((out, pull(out))))
  for one, two in zip(*results, strict=True):
    assert_same(one, two, terms=90, sums=4)


def test_sources_that_are_no_single_range_stay_as_they_are():
  segment_ids = np.repeat([[0] * 40 + [1] * 50], 2, axis=0)
  bias = dataclasses.replace(CONFIG, group_logit_bias="log_size")
  both_ways = dataclasses.replace(CONFIG, causal=False)
  ranked = DGAConfig(min_focal_tokens=4)
  for config, ids in ((CONFIG, segment_ids), (bias, None), (both_ways, None), (ranked, None)):
    merged, metadata = _merged(config, segment_ids=ids)
    assert in_block_order(merged.sources, metadata) is merged.sources


def test_the_order_is_for_gpus_alone():
  merged, metadata = _merged(CONFIG)
  for device, is_joint in ((h100, True), (tpu, False)):
    with jax.sharding.use_abstract_mesh(device.abstract_mesh()):
      sources = jax.eval_shape(
        lambda q, s: for_kernel(q, s, metadata), merged.query, merged.sources
      )
    assert (sources.group.key.shape[1] == 0) == is_joint

"""Checks of context parallelism on eight devices; test_context_parallel.py runs this module."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dga_jax import DGAConfig, dynamic_group_attention
from dga_jax.attention.context_parallel.attend import attend_sharded
from dga_jax.attention.context_parallel.ragged_all_gather import exchange_sizes
from dga_jax.attention.metadata import prepare
from dga_jax.attention.segments import find_documents
from dga_jax.sharding import make_mesh, MeshConfig, zigzag_order
from tests.dga_jax.attention.cases import arrays, CONFIGS
from train.hlo_collectives import Collective, read_collectives


def sharded_op(config, devices, length):
  """A function of whole arrays that computes the op on sequence shards in zigzag order."""
  mesh = make_mesh(MeshConfig(data=1, context=devices), jax.devices()[:devices])
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    order = zigzag_order(length)
  shards = PartitionSpec(None, "context")

  def op(q, k, v, rows):
    metadata = prepare_rows(config, q.shape[0], q.shape[1], **rows)
    attend = jax.shard_map(
      functools.partial(attend_sharded, axis_name="context"),
      mesh=mesh,
      in_specs=(shards, shards, shards, PartitionSpec()),
      out_specs=shards,
    )
    return attend(q[:, order], k[:, order], v[:, order], metadata)[:, np.argsort(order)]

  return op


def prepare_rows(config, B, L, lengths=None, segment_ids=None):
  """The attention metadata for whole sequences."""
  return prepare(find_documents(B, L, lengths, segment_ids), config)


def packed_rows(B, L):
  """Segment ids of four documents per row. The last row has padding in place of one document."""
  rng = np.random.default_rng(0)
  cuts = np.sort(rng.integers(0, L - 3, (B, 3)), axis=1)
  ids = (np.arange(L)[None, :, None] >= cuts[:, None]).sum(axis=-1).astype(np.int32)
  ids[-1, ids[-1] == 2] = -1
  ids[:, -3:] = -1
  return {"segment_ids": ids}


def compare(config, devices, q, k, v, t, rows):
  """Asserts that outputs and gradients on shards equal those on whole sequences."""

  def whole(q, k, v, rows):
    return dynamic_group_attention(q, k, v, config=config, **rows)

  def run(op):
    def outputs(q, k, v):
      out, pull = jax.vjp(lambda q, k, v: op(q, k, v, rows), q, k, v)
      return (out, *pull(t))

    return jax.jit(outputs)(q, k, v)

  for got, want in zip(run(sharded_op(config, devices, q.shape[1])), run(whole), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


def check_equal(name, rows):
  """Compares one config of cases.py. Documents and blocks cross the boundaries of shards."""
  B, L = 2, 112
  compare(
    CONFIGS[name], 4, *arrays(0, B, L, 4, 2, 4), packed_rows(B, L) if rows == "packed" else {}
  )


def check_crowded():
  """Puts all focal keys into one chunk, so that the ragged all-gather needs several exchanges."""
  B, L, config = (
    1,
    128,
    DGAConfig(group_size=4, min_focal_tokens=0, importance_rate=0.2, n_random=0),
  )
  q, k, v, t = arrays(0, B, L, 2, 1, 4)
  k = jnp.where(jnp.arange(L)[None, :, None, None] < 27, 4 * jnp.abs(q[:, -1:, :1]) + k, k)
  q = jnp.abs(q)

  first, _ = exchange_sizes(27 + 25, 8)
  assert first < 16, "one exchange is enough for these inputs, so the test does not cover several"
  compare(config, 8, q, k, v, t, {})


def received_bytes(collectives: list[Collective]) -> float:
  """Bytes that one device receives, without exchanges whose number depends on the data."""
  return sum(x.times * x.sent_bytes for x in collectives if not x.open_ended)


def check_bytes(selection):
  """Asserts that a device receives at most 0.18 of the bytes that ring attention sends it."""
  devices, L, N, D = 8, 131072, 1, 128
  config = DGAConfig(selection=selection, min_focal_tokens=0)
  shape = jax.ShapeDtypeStruct((1, L, N, D), jnp.float32)
  mesh = make_mesh(MeshConfig(data=1, context=devices))
  sharded = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "context"))

  def attend(q, k, v):
    shards = PartitionSpec(None, "context")
    return jax.shard_map(
      functools.partial(attend_sharded, axis_name="context"),
      mesh=mesh,
      in_specs=(shards, shards, shards, PartitionSpec()),
      out_specs=shards,
    )(q, k, v, prepare_rows(config, 1, L))

  def both(q, k, v, t):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(t)

  def count(f, arguments):
    program = jax.jit(f, in_shardings=sharded, out_shardings=sharded).lower(*[shape] * arguments)
    return received_bytes(read_collectives(program.compile().as_text()))

  # Ring attention receives the keys and values of every other device in the forward pass, and
  # keys, values and their gradients in the backward pass.
  ring = 2 * L * N * D * 4 * (devices - 1) / devices
  forward, total = count(attend, 3), count(both, 4)
  print(selection, forward / ring, (total - forward) / (2 * ring))
  assert forward <= 0.18 * ring
  assert total - forward <= 0.18 * 2 * ring
  assert forward > 0.15 * ring, "read_collectives missed a collective"


if __name__ == "__main__":
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_disable_most_optimizations", True)
  if sys.argv[1] == "bytes":
    check_bytes("streaming")
    check_bytes("global")
  elif sys.argv[1] == "crowded":
    check_crowded()
  else:
    for case in sys.argv[2:]:
      check_equal(*case.split(":"))

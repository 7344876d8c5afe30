"""The TPU kernels equal the oracle, interpreted with checks; they lower for a TPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax import DGAConfig, explain
from pallas_kernels.grouped_attention import grouped_attention, KVSource, KVSources
from pallas_kernels.grouped_attention.mosaic_tpu_attention import grouped_attention_mosaic_tpu
from pallas_kernels.grouped_attention.mosaic_tpu_blocks import KeyTile, TpuBlocks
from pallas_kernels.mosaic_tpu_common import CHECKED
from tests.pallas_kernels.grouped_attention.kernel_cases import (
  Case,
  CASES,
  check_against_reference,
  lower_over_heads,
  output_and_gradients,
  structs_and_options,
)
from tests.pallas_kernels.tpu import abstract_mesh, lower_for_tpu

# Small blocks, so that short rows have several of each kind, with one summary tile per block.
_BLOCKS = TpuBlocks(
  rows=256,
  edge_rows=128,
  block_k=128,
  summaries=0,
  summary_grad=KeyTile(block_k=128, rows=256, tiles=2),
  window_grad=KeyTile(block_k=128, rows=256, tiles=1),
  vmem=2**24,
)
_interpreted = functools.partial(grouped_attention_mosaic_tpu, blocks=_BLOCKS, interpret=CHECKED)
_gradients = functools.partial(output_and_gradients, grouped_attention_mosaic_tpu)


@dataclasses.dataclass(frozen=True)
class SpacedCase(Case):
  """Documents with `gap` unused window entries after each of them."""

  gap: int = 0

  def _pad(self, columns: list[np.ndarray], base: np.ndarray) -> np.ndarray:
    moved = [
      c + np.array([0, 0, 0, 0, 1, 1])[:, None] * self.gap * i for i, c in enumerate(columns)
    ]
    return super()._pad(moved, base + np.array([0, 0, self.gap * max(len(columns) - 1, 0)]))


# Together the cases contain several blocks of summaries, tiles that all queries see, tiles with the
# ends of two documents, a window longer than one piece, padded queries, every head dim, both
# dtypes, and heads in one stack and in two.
_COVERING_CASES = {
  "documents": Case(
    documents=((260, 1, 60),), length=330, head_dim=128, group_size=2, focal_rate=0.6
  ),
  "spaced": SpacedCase(
    documents=((30,) * 5,), length=150, query_heads=4, group_size=16, gap=60, group_bias=1.4
  ),
  "streaming": Case(
    documents=((101, 44), ()),
    length=150,
    streaming=True,
    shared_bounds=True,
    query_heads=4,
    kv_heads=2,
    head_dim=256,
    dtype="bfloat16",
  ),
}


@pytest.mark.parametrize("name", _COVERING_CASES)
def test_interpreted_kernels_equal_reference_without_races(
  name: str, capfd: pytest.CaptureFixture[str]
):
  check_against_reference(_interpreted, _COVERING_CASES[name])
  assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.aot
@pytest.mark.parametrize(
  "name",
  [
    *"exact_tiles ragged packed fully_masked_row all_focal no_focal wide_window".split(),
    "streaming",
    "bidirectional",
  ],
)
def test_interpreted_kernels_equal_reference_in_further_cases(
  name: str, capfd: pytest.CaptureFixture[str]
):
  check_against_reference(_interpreted, CASES[name])
  assert "RACE DETECTED" not in capfd.readouterr().out


def test_nan_in_invisible_entries_does_not_reach_a_tile():
  """The output of the first tile ignores entries that only later queries see."""
  case = Case(documents=((400,),), length=400, group_size=2, focal_rate=0.7, head_dim=64)
  query, sources, options = case.inputs()
  first_tile = slice(0, 128)

  def poisoned(source: KVSource, *, whole_tiles: bool) -> KVSource:
    after = 256
    if whole_tiles:
      after = -(-int(source.end[..., first_tile].max()) // 128) * 128
    return source._replace(
      key=source.key.at[:, after:].set(jnp.nan), value=source.value.at[:, after:].set(jnp.nan)
    )

  assert sources.focal.key.shape[1] > 256
  unseen = KVSources(
    poisoned(sources.focal, whole_tiles=True),
    poisoned(sources.group, whole_tiles=True),
    poisoned(sources.window, whole_tiles=False),
  )
  run = jax.jit(functools.partial(_interpreted, **options))
  expected, got = run(query, sources), run(query, unseen)
  np.testing.assert_array_equal(got[:, first_tile], expected[:, first_tile])
  assert np.isnan(got[:, 256:]).any()


@pytest.mark.parametrize(
  ("kind", "head_dim", "dtype"),
  [
    ("TPU v5 lite", 64, "bfloat16"),
    ("TPU v6 lite", 128, "float32"),
    ("TPU7x", 256, "bfloat16"),
    ("TPU v4", 128, "bfloat16"),
  ],
)
def test_lowers_for_a_tpu(kind: str, head_dim: int, dtype: str):
  args, options = structs_and_options(head_dim=head_dim, dtype=dtype)
  program = lower_for_tpu(_gradients(options), *args, device_kind=kind)
  for name in ("forward", "dq", "dkdv_summaries", "dkdv_window"):
    assert f"grouped_attention_{name}" in program


def test_lowers_inside_a_shard_map_over_heads():
  mesh = abstract_mesh(devices=2)
  sharded, args = lower_over_heads(grouped_attention_mosaic_tpu, mesh)
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(sharded).trace(*args).lower(lowering_platforms=("tpu",))
  assert "grouped_attention_dq" in lowered.as_text()


def test_exports_for_a_tpu():
  args, options = structs_and_options(head_dim=128, dtype="bfloat16")
  with jax.sharding.use_abstract_mesh(abstract_mesh()):
    exported = jax.export.export(jax.jit(_gradients(options)), platforms=["tpu"])(*args)
  assert exported.platforms == ("tpu",)
  assert "grouped_attention_forward" in exported.mlir_module()


def test_tpu_targets_use_their_kernels():
  shape = jax.ShapeDtypeStruct((1, 512, 4, 64), jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(abstract_mesh()):
    choice = explain(shape, shape, shape, config=DGAConfig(min_focal_tokens=0))["grouped_attention"]
  assert choice.runs == "mosaic_tpu"
  assert "TPU v5 lite" in choice.reason("triton")
  assert choice.reason("xla") is None


@pytest.mark.parametrize(
  ("head_dim", "dtype", "message"),
  [(96, "bfloat16", "head_dim is 96"), (64, "float16", "dtype is float16")],
)
def test_unsupported_calls_name_the_reason(head_dim: int, dtype: str, message: str):
  args, options = structs_and_options(head_dim=head_dim, dtype=dtype)
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(_gradients(options), *args)


def test_sequences_beyond_scalar_memory_are_unsupported():
  args, options = structs_and_options(head_dim=64, dtype="bfloat16")
  query, sources, _ = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((4000, *x.shape[1:]), x.dtype), args
  )
  with pytest.raises(NotImplementedError, match="query has 4000 rows of 1000 tokens"):
    jax.eval_shape(functools.partial(grouped_attention_mosaic_tpu, **options), query, sources)


def test_other_devices_do_not_run_the_tpu_kernels():
  args, options = structs_and_options(head_dim=64, dtype="bfloat16")
  query, sources, _ = args
  run = functools.partial(grouped_attention, implementation="mosaic_tpu", **options)
  with pytest.raises(NotImplementedError, match="mosaic_tpu: runs on a TPU"):
    jax.eval_shape(run, query, sources)

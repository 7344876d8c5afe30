"""Tests of the totals of TPU kernels: the parser of programs, and counts by hand."""

import numpy as np
import pytest

from benchmarks._bundles import Schedule
from benchmarks._tpu_global_counts import further_runs, importance_count
from benchmarks._tpu_kernel_counts import KernelCount
from benchmarks._tpu_programs import Compiled, read_program, totals
from dga_jax import DGAConfig
from pallas_kernels.group_merge.mosaic_tpu_row_gather import RowSizes

PROGRAM = """
ENTRY %main {
  %k = bf16[1,8,4096,128]{3,2,1,0} parameter(0)
  %copy.9 = bf16[1,4096,8,128]{3,1,2,0} copy(%k), backend_config={"estimated_cycles":"30"}
  %index = s32[1,8,3,1,128]{4,3,2,1,0} parameter(1)
  %rows.4 = (bf16[1,8,300,128]{3,2,1,0}, bf16[1,8,300,128]{3,2,1,0}) custom-call(%index, %k), \
custom_call_target="tpu_custom_call", backend_config={"estimated_cycles":"18446744073709551615"}
  %rows.5.q_ref = bf16[1,32,200,128]{3,2,1,0} custom-call(%index, %k), \
custom_call_target="tpu_custom_call"
  ROOT %fusion = (bf16[1,8]{1,0}, bf16[8]{0}) fusion(%k), backend_config={"estimated_cycles":"12"}
}
"""
EMPTY = Schedule(prologue=[], loops=[], epilogue=[], small=0)


def _compiled(**small: int) -> Compiled:
  schedules = {name.replace("__", "."): EMPTY._replace(small=n) for name, n in small.items()}
  return Compiled(schedules, **read_program(PROGRAM))


def _count(direction: str, rows: int | None, *, is_merge: bool = False) -> KernelCount:
  return KernelCount("rows", direction, lambda schedule: 10 * schedule.small, is_merge, rows)


def test_a_program_is_split_into_kernels_copies_and_the_rest():
  found = read_program(PROGRAM)
  assert found == {
    "rows": {"rows.4": [300, 4096], "rows.5.q_ref": [200, 4096]},
    "rest": 42.0,
    "copies": 30.0,
  }


def test_kernels_of_one_name_are_told_apart_by_their_rows():
  compiled = _compiled(rows__4__refs_0_=3, rows__5__q_ref=5)
  counts = [_count("forward", 300, is_merge=True), _count("backward", 200)]
  assert totals(compiled, counts) == {
    "forward": 30.0,
    "forward merging": 30.0,
    "backward": 50.0,
    "backward merging": 0.0,
  }


def test_a_kernel_without_a_count_and_a_count_without_a_kernel_are_errors():
  compiled = _compiled(rows__4=3, rows__5__q_ref=5)
  with pytest.raises(ValueError, match=r"kernels without a KernelCount: \['rows.5.q_ref'\]"):
    totals(compiled, [_count("forward", 300)])
  with pytest.raises(ValueError, match="is 'rows', rows 7"):
    totals(compiled, [_count("forward", 7)])


@pytest.mark.parametrize("unrolled", [True, False])
def test_importance_has_two_passes_over_the_keys(unrolled: bool):
  """4096 keys are 4 tiles. 64 queries of 4 heads are one block of rows, of 16 heads 4 blocks."""
  config = DGAConfig(n_recent=32, n_random=32)
  if unrolled:
    bundles = importance_count(4096, 8, 2, config).bundles
    schedule = Schedule(prologue=[70, 800, 200, 700], loops=[], epilogue=[], small=100)
    assert bundles(schedule) == 2 * (4 * (800 + 700) + 200 + 8 * (70 + 100))
  else:
    bundles = importance_count(4096, 32, 2, config).bundles
    schedule = Schedule(prologue=[70], loops=[800, 200, 700], epilogue=[], small=100)
    assert bundles(schedule) == 2 * (4 * 4 * (800 + 700) + 4 * 200 + 8 * (70 + 100))


def test_further_runs_of_units_that_point_far():
  sizes = RowSizes(unit=32, run=512, tile=128, chunk=2048)
  near, far = np.arange(32), 100 + 40 * np.arange(32)  # The second spans 1241 positions: 3 runs.
  crossing = 1600 + 32 * np.arange(32)  # 448 positions of one chunk and 544 of the next: 1, 2 runs
  empty = np.full(32, 4096)
  index = np.concatenate([near, far, crossing, empty])[None, None]
  assert further_runs(index, 4096, sizes) == 2 + 1

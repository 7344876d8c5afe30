"""Tests of the parser of kernel schedules, on a synthetic dump, and of the bundle counts."""

import pathlib

from benchmarks._bundles import read_schedules, Schedule
from benchmarks._tpu_kernel_counts import splash_counts


def _bundles(*parts: tuple[int, str, int]) -> str:
  """The text of a dump. Each part is its number of bundles, first label and loop depth."""
  lines = ["= control target key start", "LB: loop body"]
  address = 0
  for count, label, depth in parts:
    for i in range(count):
      marks = "> " * depth
      lines.append(f" {address:#x} {label if i == 0 else '  '} : {marks}{{ %1 = nop }}")
      address += 1
  return "\n".join(lines)


def test_a_dump_is_split_into_prologue_loops_and_epilogue(tmp_path: pathlib.Path):
  text = _bundles((5, "  ", 0), (70, "LB", 1), (100, "PF", 1), (200, "LB", 2), (80, "PF", 1))
  (tmp_path / "17-some_kernel.1-72-final_bundles.txt").write_text(text)
  (tmp_path / "17-some_kernel.1-71-schedule-analysis_final_bundles.txt").write_text(
    "total scheduled bundles: 455 ... custom_call_target=tpu_custom_call"
  )
  (tmp_path / "18-fusion-72-final_bundles.txt").write_text(text)
  (tmp_path / "18-fusion-71-schedule-analysis_final_bundles.txt").write_text("a fusion")
  expected = Schedule(prologue=[70, 100], loops=[200], epilogue=[80], small=5)
  assert read_schedules(tmp_path) == {"some_kernel.1": expected}
  assert expected.outside_loops == 255


def test_splash_attention_counts_visited_tiles_and_every_step():
  schedule = Schedule(prologue=[100, 70, 1000, 90], loops=[], epilogue=[], small=10)
  forward, dq, dkdv = splash_counts(L=4096, heads=4, kv_heads=2, tiles=(1024, 2048, 512))
  # The first two of four query tiles see one key tile each; the last two see both key tiles.
  by_hand = 4 * ((2 * 1 + 2 * 2) * 1000 + 4 * (70 + 90) + 8 * 110)
  assert forward.bundles(schedule) == dq.bundles(schedule) == by_hand
  # dkv initializes and stores once for each of 2 KV heads and 2 key tiles, not 4 heads and 4 tiles.
  assert dkdv.bundles(schedule) == by_hand - (4 * 4 - 2 * 2) * 160

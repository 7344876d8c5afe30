"""Reading of schedules, on a text of their form."""

import pathlib

from benchmarks._bundles import read_schedules, Schedule
from benchmarks._tpu_visits import splash_counts


def _bundles(*parts: tuple[int, str, int]) -> str:
  """Bundles of parts: how many, the label of the first, and how deep in loops."""
  lines = ["= control target key start", "LB: loop body"]
  address = 0
  for count, label, depth in parts:
    for i in range(count):
      marks = "> " * depth
      lines.append(f" {address:#x} {label if i == 0 else '  '} : {marks}{{ %1 = nop }}")
      address += 1
  return "\n".join(lines)


def test_parts_of_a_kernel_are_told_apart(tmp_path: pathlib.Path):
  text = _bundles((5, "  ", 0), (70, "LB", 1), (100, "PF", 1), (200, "LB", 2), (80, "PF", 1))
  (tmp_path / "17-some_kernel.1-72-final_bundles.txt").write_text(text)
  (tmp_path / "17-some_kernel.1-71-schedule-analysis_final_bundles.txt").write_text(
    "total scheduled bundles: 455 ... custom_call_target=tpu_custom_call"
  )
  (tmp_path / "18-fusion-72-final_bundles.txt").write_text(text)
  (tmp_path / "18-fusion-71-schedule-analysis_final_bundles.txt").write_text("a fusion")
  expected = Schedule(before=[70, 100], loops=[200], after=[80], small=5)
  assert read_schedules(tmp_path) == {"some_kernel.1": expected}
  assert expected.straight == 255


def test_splash_attention_counts_visited_tiles_and_every_step():
  schedule = Schedule(before=[100, 70, 1000, 90], loops=[], after=[], small=10)
  forward, dq, dkdv = splash_counts(L=4096, heads=4, kv_heads=2, tiles=(1024, 2048, 512))
  # Of 4 x 2 pairs of tiles the last two queries' tiles see both of keys.
  by_hand = 4 * ((2 * 1 + 2 * 2) * 1000 + 4 * (70 + 90) + 8 * 110)
  assert forward.bundles(schedule) == dq.bundles(schedule) == by_hand
  assert dkdv.bundles(schedule) == by_hand - 4 * 3 * 160  # begins once a KV head and tile of keys

"""Collectives are parsed from HLO text, with loops, device groups and fusions."""

from pathlib import Path

from train.hlo_collectives import by_kind, Collective, read_collectives

PROGRAM = (Path(__file__).parents[1] / "golden" / "collectives.hlo").read_text()


def test_collectives_in_loops_are_counted_once_per_iteration() -> None:
  f32, bf16 = "f32", "bf16"
  assert sorted(read_collectives(PROGRAM), key=lambda one: one.kind) == [
    Collective("all-gather", ((f32, (8, 4)),), 4, 3, "", channel="3"),
    Collective("all-reduce", ((f32, (4,)), (f32, (2,))), 2, 1, "jit(step)/sum"),
    Collective("collective-permute", ((f32, (6,)),), 2, 1, "", open_ended=True),
    Collective("reduce-scatter", ((bf16, (8, 4)),), 8, 3, "", channel=""),
    Collective("reduce-scatter", ((f32, (2, 2)), (bf16, (1,))), 4, 1, ""),
  ]


def test_received_bytes_of_each_kind() -> None:
  assert by_kind(read_collectives(PROGRAM)) == {
    "all-gather": (3, 3 * 128 * 3 / 4),
    "all-reduce": (1, 2 * 24 / 2),
    "collective-permute": (1, 24),
    "reduce-scatter": (1 + 3, 18 * 3 + 3 * 64 * 7),
  }

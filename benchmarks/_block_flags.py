"""Flags for the blocks of Dynamic Group Attention, which several attention benchmarks share."""

from typing import Any

from absl import flags

from dga_jax import DGAConfig

GROUP_SIZE = flags.DEFINE_integer("group_size", 16, "m, tokens in a group")
FOCAL_PER_BLOCK = flags.DEFINE_integer(
  "focal_per_block", None, "f, focal tokens in a streaming block; default: m / 10"
)
SINKS = flags.DEFINE_integer("sink_tokens", 0, "first tokens that are always focal")
LOCAL_WINDOW = flags.DEFINE_integer(
  "local_window", 0, "blocks before the query's block that it sees unmerged (streaming)"
)


def block_config(selection: Any, min_focal_tokens: int = 0) -> DGAConfig:
  """The settings of the flags.

  Args:
    selection: "streaming", "global" or "random"; only streaming selection has a local window.
    min_focal_tokens: lower bound on the focal tokens of global and random selection.
  """
  return DGAConfig(
    group_size=GROUP_SIZE.value,
    focal_per_block=FOCAL_PER_BLOCK.value,
    min_focal_tokens=min_focal_tokens,
    sink_tokens=SINKS.value,
    local_window=LOCAL_WINDOW.value if selection == "streaming" else 0,
    selection=selection,
  )


def block_slug() -> str:
  """The settings of the flags as part of a file name."""
  values = (GROUP_SIZE.value, FOCAL_PER_BLOCK.value, SINKS.value, LOCAL_WINDOW.value)
  return "m{}_f{}_s{}_w{}".format(*values)

"""The table of measured tiles: every entry is valid, and has priority over the rule."""

import json

import pytest

from pallas_kernels.grouped_attention import block_sizes
from pallas_kernels.grouped_attention.block_sizes import (
  mosaic_blocks,
  MosaicBlocks,
  MosaicQueryTile,
  TABLE,
  table_key,
  triton_blocks,
  TritonBlocks,
)


def test_every_entry_of_the_table_is_used():
  for device_kind, entries in json.loads(TABLE.read_text()).items():
    for key in entries:
      backend, head_dim, itemsize = key.split(", ")
      dim, size = int(head_dim.split()[1]), int(itemsize.split()[0])
      assert key == table_key(backend, dim, size)
      if backend == "mosaic_gpu":
        assert isinstance(mosaic_blocks(device_kind, dim), MosaicBlocks)
      else:
        assert isinstance(triton_blocks(device_kind, dim, size), TritonBlocks)


def test_a_measured_tile_has_priority_over_the_rule(monkeypatch: pytest.MonkeyPatch):
  tiles = {
    "forward": {"block_k": 64, "stages": 4},
    "dq": {"block_k": 64, "stages": 2},
    "dkdv": {"block_q": 64, "stages": 4},
  }
  table = {"some GPU": {table_key("mosaic_gpu", 64, 2): tiles}}
  monkeypatch.setattr(block_sizes, "_table", lambda: table)
  assert mosaic_blocks("some GPU", 64).forward == MosaicQueryTile(block_k=64, stages=4)
  by_rule = MosaicQueryTile(block_k=128, stages=2)
  assert mosaic_blocks("some GPU", 128).forward == by_rule
  assert mosaic_blocks("another GPU", 64).forward == by_rule

"""A command: the Mosaic GPU kernels, interpreted on a CPU, against the oracle on named cases.

A process of its own, because the interpreter blocks a CPU thread of XLA for every warpgroup that
waits: on a small machine NPROC has to be raised before JAX starts.
"""

import dataclasses
import functools
import sys

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_attention.block_sizes import (
  MosaicBlocks,
  MosaicKeyTile,
  MosaicQueryTile,
)
from pallas_kernels.grouped_attention.mosaic_gpu_attention import grouped_attention_mosaic_gpu
from tests.pallas_kernels.grouped_attention.kernel_cases import CASES, check_against_reference

# One program is enough to see it go from one tile of work to the next, and its warpgroups wait
# for each other.
_BLOCKS = MosaicBlocks(
  forward=MosaicQueryTile(block_k=64, stages=2),
  dq=MosaicQueryTile(block_k=64, stages=2),
  dkdv=MosaicKeyTile(block_q=64, stages=2),
)

if __name__ == "__main__":
  attention = functools.partial(
    grouped_attention_mosaic_gpu,
    blocks=_BLOCKS,
    programs=1,
    interpret=plgpu.InterpretGPUParams(detect_races=True),
  )
  for name in sys.argv[1:]:
    check_against_reference(attention, dataclasses.replace(CASES[name], dtype="bfloat16"))

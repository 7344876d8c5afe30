"""A command that compares the Mosaic GPU kernels, interpreted on a CPU, with the oracle.

Its arguments are names of `kernel_cases.CASES`. It is a separate process, because the interpreter
blocks one CPU thread of XLA for each waiting warpgroup. A small machine must therefore raise NPROC
before JAX starts.
"""

import dataclasses
import functools
import sys

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_attention import mosaic_gpu_attention
from pallas_kernels.grouped_attention.block_sizes import (
  MosaicBlocks,
  MosaicKeyTile,
  MosaicQueryTile,
)
from tests.pallas_kernels.grouped_attention.kernel_cases import CASES, check_against_reference

# Blocks for one program (`programs=1`), which processes several work tiles and whose warpgroups
# wait for one another.
_BLOCKS = MosaicBlocks(
  forward=MosaicQueryTile(block_k=128, stages=2),
  dq=MosaicQueryTile(block_k=64, stages=2),
  dkdv=MosaicKeyTile(block_q=64, stages=2),
)

if __name__ == "__main__":
  # The short sequences of the cases then have several chunks of queries.
  mosaic_gpu_attention.query_chunks = lambda *_: 2
  attention = functools.partial(
    mosaic_gpu_attention.grouped_attention_mosaic_gpu,
    blocks=_BLOCKS,
    programs=1,
    interpret=plgpu.InterpretGPUParams(detect_races=True),
  )
  for name in sys.argv[1:]:
    check_against_reference(attention, dataclasses.replace(CASES[name], dtype="bfloat16"))

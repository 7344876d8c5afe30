"""Sparse attention of other packages, in PyTorch, as programs of `benchmarks._paired_timing`.

PyTorch and JAX share the GPU in one process, so JAX must not reserve the memory: set
XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import importlib
import importlib.metadata
from typing import Any

import jax

from benchmarks._inputs import Shape
from benchmarks._paired_timing import TimedProgram

_BLOCK, _BLOCKS = 64, 16  # of the NSA paper: 16 selected blocks of 64 tokens


class _Pending:
  """Work that PyTorch has queued on the GPU, with the method that `jax.block_until_ready` calls."""

  def __init__(self, results: Any) -> None:
    self.results = results

  def block_until_ready(self) -> "_Pending":
    """Waits for the GPU."""
    importlib.import_module("torch").cuda.synchronize()
    return self


def native_sparse_attention(shape: Shape, *, backward: bool) -> dict[str, TimedProgram]:
  """Native Sparse Attention (arXiv 2502.11089) of the package flash-linear-attention.

  The compressed and the selected branch, whose gates are inputs. The package runs the branch of the
  sliding window with flash-attn, so it is left out, and a query attends to fewer tokens.

  Raises:
    ModuleNotFoundError: torch, triton or flash-linear-attention is not installed.
  """
  torch: Any = importlib.import_module("torch")
  parallel_nsa = importlib.import_module("fla.ops.nsa.parallel").parallel_nsa
  dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[shape.dtype]

  def make_inputs(key: jax.Array) -> tuple[Any, ...]:
    generator = torch.Generator("cuda").manual_seed(int(jax.random.bits(key)))

    def draw(*sizes: int) -> Any:
      x = torch.randn(*sizes, generator=generator, device="cuda", dtype=dtype)
      return x.requires_grad_(backward)

    q = draw(1, shape.L, shape.H, shape.D)
    k, v = draw(1, shape.L, shape.N, shape.D), draw(1, shape.L, shape.N, shape.D)
    return q, k, v, draw(1, shape.L, shape.H), draw(1, shape.L, shape.H)

  def run(q: Any, k: Any, v: Any, compressed: Any, selected: Any) -> _Pending:
    with torch.set_grad_enabled(backward):
      out = parallel_nsa(q, k, v, compressed, selected, block_size=_BLOCK, block_counts=_BLOCKS)
      if not backward:
        return _Pending(out)
      return _Pending((out, torch.autograd.grad(out, (q, k, v), out.detach())))

  version = importlib.metadata.version("fla-core")
  name = f"NSA of fla {version}, {_BLOCKS} blocks of {_BLOCK}"
  return {name: TimedProgram(run, make_inputs)}

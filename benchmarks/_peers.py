"""Sparse attention of other packages, as programs of `benchmarks._paired_timing`.

With a package in PyTorch, PyTorch and JAX share the GPU in one process, so JAX must not reserve the
memory: set XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import importlib
import importlib.metadata
from typing import Any

import jax

from benchmarks._inputs import Shape
from benchmarks._paired_timing import TimedProgram

_BLOCK, _BLOCKS = 64, 16  # of the NSA paper
# Of DeepSeek-V3.2: keys of a query; heads and head dim of the indexer, which selects the keys.
_DSA_KEYS, _INDEX_HEADS, _INDEX_DIM = 2048, 64, 128


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


def deepseek_sparse_attention(shape: Shape, *, backward: bool) -> dict[str, TimedProgram]:
  """DeepSeek Sparse Attention of the package jax-linear-attention, whose module is `jla`.

  The indexer scores all keys, each query attends to the 2048 keys of the highest scores. The
  queries, keys and weights of the indexer are inputs. Both passes exclude the gradient of the
  indexer, which its own loss trains.

  Raises:
    ModuleNotFoundError: jax-linear-attention is not installed.
  """
  dsa: Any = importlib.import_module("jla.ops.mosaic_gpu.dsa")

  def make_inputs(key: jax.Array) -> tuple[Any, ...]:
    tokens_key, *keys = jax.random.split(key, 4)
    sizes = [(_INDEX_HEADS, _INDEX_DIM), (_INDEX_DIM,), (_INDEX_HEADS,)]
    index = (
      jax.random.normal(k, (1, shape.L, *size), shape.dtype)
      for k, size in zip(keys, sizes, strict=True)
    )
    return (*shape.tokens(tokens_key), *index)

  def run(q: Any, k: Any, v: Any, *index: Any) -> Any:
    selected = dsa.index_topk(*index, min(_DSA_KEYS, shape.L), method="radix")
    if not backward:
      return dsa.dsa_attention(q, k, v, selected)
    out, pull = jax.vjp(lambda *qkv: dsa.dsa_attention(*qkv, selected), q, k, v)
    return out, pull(out)

  version = importlib.metadata.version("jax-linear-attention")
  name = f"DSA of jla {version}, {_DSA_KEYS} keys"
  return {name: TimedProgram(jax.jit(run), jax.jit(make_inputs))}

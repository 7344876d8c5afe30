"""Dynamic Group Attention against the fastest dense attention: the kernel alone and the whole op.

    ./workspace bench attention --lengths=8192,16384,32768,131072
    ./workspace bench attention --lengths=32768 --kv_heads=32 --backward

Batch 1. Prints one row a contender: milliseconds (median, lowest, highest of the rounds), how many
times faster than cuDNN's dense causal attention in the same process, and for the kernel alone its
rate: 4·D·H·L·(mean number of entries that a query sees), times 7/2 more with the backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import Array

from benchmarks._inputs import attention_flops, grouped_inputs, Shape
from benchmarks._queued import compare, Contender
from benchmarks.timing import environment, Times
from dga_jax import DGAConfig, dynamic_group_attention
from pallas_kernels.grouped_attention import Bounds, grouped_attention

_LENGTHS = flags.DEFINE_list("lengths", ["8192", "16384", "32768"], "sequence lengths")
_HEADS = flags.DEFINE_integer("heads", 32, "query heads")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "KV heads")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "head dim")
_MIN_FOCAL = flags.DEFINE_integer("min_focal_tokens", 0, "floor on focal tokens (global selection)")
_BACKWARD = flags.DEFINE_bool("backward", False, "time forward and backward instead of forward")
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations", ["mosaic_gpu", "triton"], "implementations of grouped attention"
)
_ROUNDS = flags.DEFINE_integer("rounds", 11, "samples of each contender")
_REPEATS = flags.DEFINE_integer("repeats", 5, "calls in a sample")
_SEED = flags.DEFINE_integer("seed", 0, "of the random inputs")

_PEER = "cuDNN dense"


def main(argv: list[str]) -> None:
  """Prints a table for every length."""
  del argv
  print(environment())
  passes = "forward + backward" if _BACKWARD.value else "forward"
  print(f"{passes}; m = 16, importance rate 0.1, min_focal_tokens {_MIN_FOCAL.value}")
  for length in map(int, _LENGTHS.value):
    shape = Shape(length, _HEADS.value, _KV_HEADS.value, _HEAD_DIM.value)
    print(f"\n{shape}\n| contender | ms | lowest to highest | times cuDNN | TFLOP/s |")
    print("| --- | --- | --- | --- | --- |")
    flops: dict[str, float] = {}
    timings, refused = compare(
      _contenders(shape, flops), rounds=_ROUNDS.value, repeats=_REPEATS.value, seed=_SEED.value
    )
    for name, times in timings.items():
      print(_row(name, times, timings.get(_PEER), flops.get(name)))
    for name, reason in refused.items():
      print(f"| {name} | does not run: {reason} | | | |")


def _contenders(shape: Shape, flops: dict[str, float]) -> dict[str, Contender]:
  """Everything that is compared at one shape; notes the kernels' work in `flops`."""
  dense = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
  contenders = {_PEER: Contender(_timed(dense), shape.tokens)}
  if not _BACKWARD.value:  # it has no causal backward
    contenders["JAX's Mosaic GPU example"] = Contender(
      jax.jit(_mosaic_gpu_example), lambda key: _half(shape.tokens(key))
    )
  selections: tuple[Literal["streaming", "global"], ...] = ("streaming", "global")
  for selection in selections:
    config = DGAConfig(selection=selection, min_focal_tokens=_MIN_FOCAL.value)
    draw = functools.partial(grouped_inputs, shape, config)
    work = attention_flops(shape, draw(jax.random.key(_SEED.value))[1])
    for name in _IMPLEMENTATIONS.value:
      kernel = functools.partial(_kernel, config=config, implementation=name)
      contenders[f"kernel, {selection}, {name}"] = Contender(_timed(kernel), draw)
      flops[f"kernel, {selection}, {name}"] = work * (4.5 if _BACKWARD.value else 1)
      op = functools.partial(dynamic_group_attention, config=config, implementation=name)
      contenders[f"op, {selection}, {name}"] = Contender(_timed(op), shape.tokens)
  return contenders


def _kernel(
  arrays: tuple[Array, ...], bounds: Bounds, *, config: DGAConfig, implementation: str
) -> Array:
  window = config.block_size if config.selection == "streaming" else config.group_size
  call: Any = functools.partial(
    grouped_attention,
    scale=arrays[0].shape[-1] ** -0.5,
    max_window=window,
    implementation=implementation,
  )
  return call(*arrays, bounds)


def _timed(attention: Callable[..., Array]) -> Callable[..., Any]:
  """The attention itself, or with its gradient in all float inputs."""
  if not _BACKWARD.value:
    return jax.jit(attention)

  def with_gradient(*inputs: Any) -> Any:
    out, vjp = jax.vjp(attention, *inputs)
    return out, vjp(jax.lax.stop_gradient(out))

  return jax.jit(with_gradient)


def _mosaic_gpu_example(q: Array, k: Array, v: Array) -> Array:
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  config = attention_mgpu.TuningConfig(
    block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
  )
  return attention_mgpu.attention(q, k, v, config)


def _half(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
  """The example's buffers are float16."""
  return tuple(x.astype(jnp.float16) for x in arrays)


def _row(name: str, times: Times, peer: Times | None, flops: float | None) -> str:
  ms = [f"{1e3 * x:.3f}" for x in times]
  faster = f"{peer.median / times.median:.2f}" if peer else ""
  rate = f"{flops / times.median / 1e12:.0f}" if flops else ""
  return f"| {name} | {ms[0]} | {ms[1]} to {ms[2]} | {faster} | {rate} |"


if __name__ == "__main__":
  app.run(main)

r"""Dynamic Group Attention and cuDNN's dense causal attention on a GPU.

    ./workspace bench attention --lengths=8192,16384,32768,131072
    ./workspace bench attention --lengths=32768 --kv_heads=32 --backward

    ./workspace bench attention --selection=streaming --group_size=126 --focal_per_block=2 \
      --sink_tokens=4 --local_window=8 --lengths=32768,131072

Batch 1. Each table row shows one program: the median, minimum and maximum milliseconds over the
rounds, each on new random inputs, and the speed-up over cuDNN's dense causal attention in the same
process.

"op" is the whole op. "summaries" is the part before attention: importance, selection, reordering
and merging. "kernel" is attention alone. The rate of "kernel" counts 4·D·H·L·(mean number of keys
that a query attends to) operations, and 9/2 of that for both passes.

--nsa adds Native Sparse Attention, a peer in PyTorch, for 16 or more query heads for each KV head:

    XLA_PYTHON_CLIENT_PREALLOCATE=false ./workspace bench attention --heads=64 --kv_heads=4 --nsa

--dsa adds DeepSeek Sparse Attention of the package jax-linear-attention.

On random inputs global selection prefers the first keys of a row. --inputs adds programs on the
queries, keys and values of a model, repeated to each length; the heads and the head dim are those
of the file, which `benchmarks.model_inputs` writes:

    ./workspace bench attention --inputs=runs/inputs.npz --lengths=8192,32768

Compilation takes longer than measurement. It also runs on a machine without a GPU:

    ./workspace bench attention --lengths=32768 --compile_to=runs/programs
    ./workspace bench attention --lengths=32768 --compiled=runs/programs    # on the GPU
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array
from tqdm import tqdm

from benchmarks import _aot_gpu
from benchmarks._attention_parts import cudnn_dense, summaries, whole_op
from benchmarks._block_flags import block_config, block_slug
from benchmarks._inputs import (
  load_inputs,
  mean_visible,
  merge,
  repeat_to,
  Shape,
  with_gradients,
)
from benchmarks._paired_timing import compare, TimedProgram
from benchmarks._peers import deepseek_sparse_attention, native_sparse_attention
from benchmarks.timing import environment, Times
from dga_jax import DGAConfig
from dga_jax.attention.attend import attention_kwargs
from dga_jax.files.path_flags import define_path
from pallas_kernels.grouped_attention import grouped_attention, KVSources

_LENGTHS = flags.DEFINE_list("lengths", ["8192", "16384", "32768"], "sequence lengths")
_HEADS = flags.DEFINE_integer("heads", 32, "query heads")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "KV heads")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "head dim")
_MIN_FOCAL = flags.DEFINE_integer(
  "min_focal_tokens", 0, "minimum number of focal tokens (global selection)"
)
_SELECTIONS = flags.DEFINE_multi_enum(
  "selection",
  ["streaming", "global"],
  ["streaming", "global", "random"],
  "selection modes; random spreads focal tokens evenly",
)
_BACKWARD = flags.DEFINE_bool("backward", False, "time both passes instead of the forward pass")
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations",
  ["mosaic_gpu"],
  "implementations of grouped attention: mosaic_gpu, triton",
)
_PARTS = flags.DEFINE_list(
  "parts", ["op", "summaries", "kernel"], "parts to time: op, summaries, kernel"
)
_EXAMPLE = flags.DEFINE_bool(
  "example", True, "also time the attention example of JAX's Mosaic GPU (forward pass only)"
)
_NSA = flags.DEFINE_bool(
  "nsa", False, "also time Native Sparse Attention of flash-linear-attention, if it is installed"
)
_INPUTS = define_path("inputs", None, "file of queries, keys and values beside random ones")
_DSA = flags.DEFINE_bool(
  "dsa", False, "also time DeepSeek Sparse Attention of jax-linear-attention, if it is installed"
)
_ROUNDS = flags.DEFINE_integer("rounds", 11, "samples of each program")
_REPEATS = flags.DEFINE_integer("repeats", 20, "queued calls in one sample")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the random inputs")

_BASELINE = "cuDNN dense"
_EXAMPLE_NAME = "JAX's Mosaic GPU example"


def main(argv: list[str]) -> None:
  """Prints one table for each length."""
  del argv
  passes = "forward + backward" if _BACKWARD.value else "forward"
  given = None if _INPUTS.value is None else load_inputs(_INPUTS.value)
  shapes = _shapes(given)
  if _aot_gpu.COMPILE_TO.value is not None:
    for shape in shapes:
      for name, (run, make_inputs) in tqdm(
        _functions(shape).items(), desc=str(shape), disable=None
      ):
        _jit_or_load(shape, name, run, make_inputs)
    return
  print(environment())
  print(passes)
  for selection in _SELECTIONS.value:
    print(_config(selection))
  for shape in shapes:
    print(f"\n{shape}\n| program | ms | minimum to maximum | times cuDNN | TFLOP/s |")
    print("| --- | --- | --- | --- | --- |")
    programs = {
      name: TimedProgram(*_jit_or_load(shape, name, run, make_inputs))
      for name, (run, make_inputs) in _functions(shape).items()
    }
    programs[_BASELINE] = TimedProgram(
      jax.jit(_with_passes(cudnn_dense)), jax.jit(functools.partial(_tokens, shape))
    )
    if given is not None:
      programs |= _on_given_inputs(repeat_to(shape, given), programs)
    for wanted, peer in ((_NSA, native_sparse_attention), (_DSA, deepseek_sparse_attention)):
      programs |= peer(shape, backward=_BACKWARD.value) if wanted.value else {}
    timings, refused = compare(
      programs, rounds=_ROUNDS.value, repeats=_REPEATS.value, seed=_SEED.value
    )
    baseline = timings.get(_BASELINE)
    for name, times in timings.items():
      print(_row(shape, name, times, baseline, programs[name].make_inputs), flush=True)
    for name, reason in refused.items():
      print(f"| {name} | does not run: {reason} | | | |")


def _on_given_inputs(
  arrays: tuple[Array, Array, Array], programs: dict[str, TimedProgram]
) -> dict[str, TimedProgram]:
  """The ops and kernels among the programs, with the same query, key and value in every round."""
  timed = {}
  for name, program in programs.items():
    part, _, rest = name.partition(", ")
    if part == "op":
      timed[f"{name}, given inputs"] = TimedProgram(program.run, lambda _: (arrays,))
    elif part == "kernel":
      merged = jax.jit(functools.partial(merge, _config(rest.partition(", ")[0])))
      timed[f"{name}, given inputs"] = TimedProgram(program.run, _constant(merged, arrays))
  return timed


def _shapes(given: tuple[np.ndarray, np.ndarray, np.ndarray] | None) -> list[Shape]:
  heads, kv_heads, head_dim = _HEADS.value, _KV_HEADS.value, _HEAD_DIM.value
  if given is not None:
    (_, heads, head_dim), kv_heads = given[0].shape, given[1].shape[1]
  return [Shape(int(L), heads, kv_heads, head_dim) for L in _LENGTHS.value]


def _constant(function: Callable[..., Any], arrays: tuple[Array, ...]) -> Callable[..., Any]:
  return lambda _: tuple(function(*arrays))


def _jit_or_load(shape: Shape, name: str, run: Any, make_inputs: Any) -> Any:
  """`_aot_gpu.jit_or_load` with file names that contain every setting of the program."""
  inputs_name = "tokens"
  if name == _EXAMPLE_NAME:
    inputs_name = "half_tokens"
  elif name.startswith("kernel"):
    inputs_name = f"sources_{name.split(', ')[1]}"
  slug = "".join(c if c.isalnum() else "_" for c in name) + "_both" * _BACKWARD.value
  sizes = f"L{shape.L}_H{shape.H}_N{shape.N}_D{shape.D}_floor{_MIN_FOCAL.value}_{block_slug()}"
  return _aot_gpu.jit_or_load(
    f"{sizes}/{slug}", run, make_inputs, inputs_name=f"{sizes}/{inputs_name}"
  )


def _functions(shape: Shape) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
  """The functions to time, without the baseline, and the function that makes the inputs of each."""
  tokens = functools.partial(_tokens, shape)
  functions: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
  if _EXAMPLE.value and not _BACKWARD.value:  # The example has no causal backward pass.
    functions[_EXAMPLE_NAME] = (_mosaic_gpu_example, functools.partial(_half_tokens, shape))
  for selection in _SELECTIONS.value:
    config = _config(selection)
    if "summaries" in _PARTS.value and not _BACKWARD.value:
      functions[f"summaries, {selection}"] = (functools.partial(summaries, config), tokens)
    for name in _IMPLEMENTATIONS.value:
      op = _with_passes(functools.partial(whole_op, config, name))
      kernel = functools.partial(_kernel, config, name)
      if "op" in _PARTS.value:
        functions[f"op, {selection}, {name}"] = (op, tokens)
      if "kernel" in _PARTS.value:
        make_sources = functools.partial(shape.sources, config)
        functions[f"kernel, {selection}, {name}"] = (kernel, make_sources)
  return functions


def _config(selection: str) -> DGAConfig:
  return block_config(selection, _MIN_FOCAL.value)


def _tokens(shape: Shape, key: Array) -> tuple[Any]:
  return (shape.tokens(key),)


def _half_tokens(shape: Shape, key: Array) -> tuple[Any]:
  """Query, key and value in float16, the only dtype of the Mosaic GPU example."""
  return (tuple(x.astype(jnp.float16) for x in shape.tokens(key)),)


def _mosaic_gpu_example(arrays: tuple[Array, Array, Array]) -> Array:
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  config = attention_mgpu.TuningConfig(
    block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
  )
  return attention_mgpu.attention(*arrays, config)


def _kernel(config: DGAConfig, implementation: str, query: Array, sources: KVSources) -> Any:
  call: Any = functools.partial(
    grouped_attention, implementation=implementation, **attention_kwargs(query, config, None)
  )
  return with_gradients(call, query, sources) if _BACKWARD.value else call(query, sources)


def _with_passes(function: Callable[..., Array]) -> Callable[..., Any]:
  """The function, with gradients under --backward. The output serves as its own cotangent."""
  if not _BACKWARD.value:
    return function

  def with_gradient(arrays: tuple[Array, ...]) -> Any:
    out, pull = jax.vjp(function, arrays)
    return out, pull(out)

  return with_gradient


def _row(shape: Shape, name: str, times: Times, baseline: Times | None, make_inputs: Any) -> str:
  ms = [f"{1e3 * x:.3f}" for x in times]
  speed_up = f"{baseline.median / times.median:.2f}" if baseline else ""
  rate = ""
  if name.startswith("kernel"):
    visible = mean_visible(make_inputs(jax.random.key(_SEED.value))[1])
    flops = 4.0 * shape.D * shape.H * shape.L * visible * (4.5 if _BACKWARD.value else 1)
    rate = f"{flops / times.median / 1e12:.0f} ({visible:.0f} keys per query)"
  return f"| {name} | {ms[0]} | {ms[1]} to {ms[2]} | {speed_up} | {rate} |"


if __name__ == "__main__":
  app.run(main)

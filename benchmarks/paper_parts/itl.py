"""Inter-token latency, ITL (Tables 1 and 3, and the authors' answer on m): LLaMA2-7B, batch 1.

The decoder has LLaMA2-7B's shapes and random weights in bfloat16. The times are those of
`./workspace bench decode`: steps of a whole model with a full cache, all settings of a context in
alternating rounds. DGA uses streaming selection with f = max(1, m / 10) focal tokens in a block.
StreamingLLM and LM-Infinite have the caches of their papers. The floor is the time to read the
weights and the visible entries of the cache once, at the read rate of the same run. The programs of
all contexts are compiled at the same time, before the first is timed.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks._decode_steps import (
  alternate_chunks,
  DecodeChunk,
  READ_BYTES,
  read_rate,
  StepModel,
  weight_bytes,
)
from benchmarks._decoder_inputs import LLAMA2_7B, random_params
from benchmarks.paper_parts.devices import has_gpu
from benchmarks.paper_parts.inputs import Inputs
from benchmarks.paper_parts.published import DEFAULT_M
from dga_jax import DGAConfig
from dga_jax.evaluation.jobs import Job
from dga_jax.model import ModelConfig

TASK = "itl"
_NEEDS = (
  "a GPU with 26 GB of free memory for LLaMA2-7B in bfloat16 (13.5 GB), a dense cache of 16384"
  " tokens (8.6 GB) and temporary arrays"
)
_THREADS = 16  # Threads that compile. The default sizes have 15 programs.

# The compiled program of each context length and setting, or the error of its compilation.
type _Compiled = Mapping[tuple[int, str], concurrent.futures.Future[DecodeChunk]]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What the part measures.

  Attributes:
    model: sizes of the decoder, as arguments of `ModelConfig`.
    lengths: context lengths, in the order in which they are measured.
    group_sizes: values of m at the longest context. The other contexts have m = 16.
    chunk: decode steps in one program.
    rounds: timed chunks of each setting.
    read_bytes: size of the array by which the read rate is measured.
  """

  model: Mapping[str, Any] = dataclasses.field(default_factory=lambda: LLAMA2_7B)
  lengths: tuple[int, ...] = (16384, 4096, 8192)
  group_sizes: tuple[int, ...] = (2, 4, 8, DEFAULT_M)
  chunk: int = 32
  rounds: int = 7
  read_bytes: int = READ_BYTES


def make_jobs(inputs: Inputs, sizes: Sizes | None = None) -> Iterator[Job]:
  """One job for each context length; without a GPU none, unless `sizes` are given.

  Args:
    inputs: not used.
    sizes: for tests.
  """
  del inputs
  if sizes is None and not has_gpu(TASK, _NEEDS):
    return
  sizes = sizes or Sizes()
  compile_all = functools.cache(functools.partial(_compile, sizes))
  for length in sizes.lengths:
    models = models_at(sizes, length)
    yield Job(
      fields={"task": TASK, "batch": 1, "length": length},
      depends_on={
        "model": dict(sizes.model),
        "settings": {name: _settings(config) for name, config in models.items()},
        "chunk": sizes.chunk,
        "rounds": sizes.rounds,
        "seed": 0,
      },
      ticks=1,
      run=functools.partial(_run, sizes, length, models, compile_all),
      origin="shapes of LLaMA2-7B, random weights",
    )


def dga_name(m: int) -> str:
  """The name of DGA's setting in the results."""
  return f"DGA, m = {m}"


def models_at(sizes: Sizes, length: int) -> dict[str, ModelConfig]:
  """The configs by name: dense, DGA, and two windows with sinks."""
  group_sizes = sizes.group_sizes if length == max(sizes.lengths) else (DEFAULT_M,)

  def config(attention: Any, m: int = DEFAULT_M) -> ModelConfig:
    dga = DGAConfig(group_size=m, selection="streaming")
    return ModelConfig(**sizes.model, attention=attention, dga=dga, param_dtype="bfloat16")

  return {
    "dense": config("dense"),
    **{dga_name(m): config("dga", m) for m in group_sizes},
    "StreamingLLM": config("streaming_llm"),
    "LM-Infinite": config("lm_infinite"),
  }


def _settings(config: ModelConfig) -> dict[str, Any]:
  """The attention kind, and the settings of that kind."""
  kind = config.attention
  settings = None if kind == "dense" else dataclasses.asdict(getattr(config, kind))
  return {"attention": kind, "settings": settings}


def _compile(sizes: Sizes) -> _Compiled:
  """The programs of all contexts. Waits until none is being compiled."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return {
      (length, name): pool.submit(_compile_chunk, sizes, length, config)
      for length in sizes.lengths
      for name, config in models_at(sizes, length).items()
    }


def _compile_chunk(sizes: Sizes, length: int, config: ModelConfig) -> DecodeChunk:
  model = StepModel.from_config(config)
  return DecodeChunk.compile(model, model.params, 1, length, sizes.chunk)


def _run(
  sizes: Sizes,
  length: int,
  configs: Mapping[str, ModelConfig],
  compile_all: Callable[[], _Compiled],
  tick: Callable[[], Any],
) -> dict[str, Any]:
  """Seconds per token (median, minimum, maximum) and the floor of each setting.

  Raises:
    jax.errors.JaxRuntimeError: the device cannot compile or run a program.
  """
  compiled = compile_all()
  chunks = {name: compiled[length, name].result() for name in configs}
  models = {name: StepModel.from_config(config) for name, config in configs.items()}
  params = random_params(models["dense"].params)  # The kinds share the weights.
  rate = read_rate(sizes.read_bytes)
  timings = alternate_chunks(chunks, dict.fromkeys(chunks, params), rounds=sizes.rounds)
  read = weight_bytes(params)
  tick()
  return {
    "read_rate": rate,
    "weight_bytes": read,
    "kinds": {
      name: {
        "seconds": list(times),
        "floor_seconds": (read + models[name].live_bytes(length)) / rate,
        "live_bytes": models[name].live_bytes(length),
        "allocated_bytes": models[name].allocated_bytes(1, length),
      }
      for name, times in timings.items()
    },
  }

"""Share of the time of attention before the attention kernel (authors' Table I on reordering).

The parts are those of `./workspace bench attention --parts=op,summaries`: forward pass, batch 1,
LLaMA2-7B's 32 query heads with 32 and with 8 KV heads, D = 128, bfloat16, random inputs, γ = 0.1,
m = 16 and no floor on focal tokens. The steps before the kernel are importance, selection,
reordering and merging. For global selection importance and selection are timed apart too; the rest
is reordering and merging. Streaming selection chooses and merges in one kernel.

The times are those of the GPU's kernels in profiles. At short contexts the host takes longer to
start the kernels than the GPU takes to run them. The programs of all shapes are compiled at the
same time, before the first is timed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks._attention_parts import choice, summaries, whole_op
from benchmarks._collectives import take_profile
from benchmarks._inputs import Shape
from benchmarks._paired_timing import compile_in_threads, TimedProgram
from benchmarks.paper_parts.devices import has_gpu
from benchmarks.paper_parts.inputs import Inputs
from benchmarks.paper_parts.plots import label, make_figure, save
from benchmarks.paper_parts.published import REORDERING_SHARE
from benchmarks.timing import Times
from dga_jax import DGAConfig
from dga_jax.evaluation.jobs import Job
from dga_jax.evaluation.report import markdown

TASK = "reordering"
_NEEDS = "a GPU with 8 GB of free memory for 32 heads of 32768 tokens"
_SEED = 0

type _Name = tuple[Shape, str, str]  # The shape, the selection, and the part of the op.
type _Compiled = tuple[Mapping[_Name, TimedProgram], Mapping[_Name, str]]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What the part measures.

  Attributes:
    shapes: of the inputs, in the order in which they are measured.
    rounds: profiles of each program, each on new random inputs.
    repeats: calls in one profile.
  """

  shapes: tuple[Shape, ...] = tuple(
    Shape(length, 32, kv_heads, 128)
    for kv_heads in (32, 8)
    for length in (16384, 8192, 4096, 32768)
  )
  rounds: int = 3
  repeats: int = 10


def make_jobs(inputs: Inputs, sizes: Sizes | None = None) -> Iterator[Job]:
  """One job for each shape; without a GPU none, unless `sizes` are given.

  Args:
    inputs: not used.
    sizes: for tests.
  """
  del inputs
  if sizes is None and not has_gpu(TASK, _NEEDS):
    return
  sizes = sizes or Sizes()
  compile_all = functools.cache(functools.partial(_compile, sizes.shapes))
  for shape in sizes.shapes:
    yield Job(
      fields={"task": TASK, "kv_heads": shape.N, "length": shape.L},
      depends_on={
        "shape": dataclasses.asdict(shape),
        "settings": {name: dataclasses.asdict(config) for name, config in _configs().items()},
        "rounds": sizes.rounds,
        "repeats": sizes.repeats,
        "clock": "kernels of a profile",
        "seed": _SEED,
      },
      ticks=1,
      run=functools.partial(_run, sizes, shape, compile_all),
      origin="shapes of LLaMA2-7B, random inputs",
    )


def _configs() -> dict[str, DGAConfig]:
  """The settings by selection."""
  return {
    "global": DGAConfig(selection="global", min_focal_tokens=0),
    "streaming": DGAConfig(selection="streaming", min_focal_tokens=0),
  }


def programs_of(shape: Shape) -> dict[tuple[str, str], TimedProgram]:
  """The jitted parts of the op by selection and name of the part."""

  def make_inputs(key: jax.Array) -> tuple[Any, ...]:
    return (shape.tokens(key),)

  programs = {}
  for name, config in _configs().items():
    parts: dict[str, Callable[..., Any]] = {
      "op": functools.partial(whole_op, config, None),
      "summaries": functools.partial(summaries, config),
    }
    if name == "global":
      parts["choice"] = functools.partial(choice, config)
    for part, function in parts.items():
      programs[name, part] = TimedProgram(jax.jit(function), jax.jit(make_inputs))
  return programs


def _compile(shapes: Sequence[Shape]) -> _Compiled:
  """The programs of all shapes, and what the device says of those that it does not compile."""
  return compile_in_threads(
    {(shape, *name): one for shape in shapes for name, one in programs_of(shape).items()}
  )


def _run(
  sizes: Sizes, shape: Shape, compile_all: Callable[[], _Compiled], tick: Callable[[], Any]
) -> dict[str, Any]:
  """GPU seconds (median, minimum, maximum) of each part, by selection.

  Raises:
    jax.errors.JaxRuntimeError: the device cannot compile or run a program.
  """
  every, not_compiled = compile_all()
  refused = {name[1:]: reason for name, reason in not_compiled.items() if name[0] == shape}
  if refused:
    raise jax.errors.JaxRuntimeError(f"The device does not run {refused}.")
  programs = {name[1:]: program for name, program in every.items() if name[0] == shape}
  samples: dict[tuple[str, str], list[float]] = {name: [] for name in programs}
  for number in range(sizes.rounds + 1):
    for name, program in programs.items():
      inputs = jax.block_until_ready(program.make_inputs(jax.random.key(_SEED + number)))
      if not number:  # The first call of a program is not measured.
        jax.block_until_ready(program.run(*inputs))
        continue
      profile = take_profile(functools.partial(_repeat, program.run, inputs, sizes.repeats))
      samples[name].append(profile.busy / sizes.repeats)
  timings = {name: Times.from_samples(values) for name, values in samples.items()}
  tick()
  return {
    "parts": {
      name: {part: list(timings[name, part]) for own, part in timings if own == name}
      for name in _configs()
    }
  }


def _repeat(function: Callable[..., Any], arguments: tuple[Any, ...], times: int) -> Any:
  """Calls a function several times; returns what the last call returns."""
  for _ in range(times):
    result = function(*arguments)
  return result


def write(results: Sequence[Mapping[str, Any]], out: Path) -> str:
  """Writes reordering.png to a folder; returns the table."""
  results = sorted(results, key=lambda one: (-one["kv_heads"], one["length"]))
  rows = []
  for result in results:
    theirs = REORDERING_SHARE.get(result["length"])
    parts = result["parts"]
    rows.append(
      [
        str(result["length"]),
        str(result["kv_heads"]),
        "" if theirs is None else f"{theirs}%",
        *(text for own in parts.values() for text in (_milliseconds(own), f"{share(own):.1%}")),
        f"{_reordering_share(parts['global']):.1%}",
      ]
    )
  _plot(results, out / "reordering.png")
  header = ["context", "KV heads", "authors: reordering"]
  for name in _configs():
    header += [f"{name}: before the kernel, of ms", "share"]
  return markdown([*header, "global: reordering and merging alone"], rows)


def share(seconds: Mapping[str, Sequence[float]]) -> float:
  """The share of the op's median time that the steps before the attention kernel take."""
  return seconds["summaries"][0] / seconds["op"][0]


def _reordering_share(seconds: Mapping[str, Sequence[float]]) -> float:
  """As `share`, without importance and selection."""
  return (seconds["summaries"][0] - seconds["choice"][0]) / seconds["op"][0]


def _milliseconds(seconds: Mapping[str, Sequence[float]]) -> str:
  return f"{1e3 * seconds['summaries'][0]:.3f} of {1e3 * seconds['op'][0]:.3f}"


def _plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
  """The shares over the context length, beside the authors'."""
  figure, (axes,) = make_figure(1, "Steps before the attention kernel", height=4.6)
  for style, kv_heads in zip(("o-", "s:"), (32, 8), strict=True):
    own = [one for one in results if one["kv_heads"] == kv_heads]
    lengths = [one["length"] for one in own]
    for index, name in enumerate(_configs()):
      shares = [100 * share(one["parts"][name]) for one in own]
      if own:
        text = f"{name} selection, {kv_heads} KV heads"
        axes.plot(lengths, shares, style, color=f"C{index}", ms=4, label=text)
  theirs = REORDERING_SHARE
  axes.plot(list(theirs), list(theirs.values()), "k^--", mfc="none", label="authors: reordering")
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}K")
  axes.set_ylim(bottom=0)
  axes.legend(fontsize=8)
  label(axes, "", "context", "% of the time of attention, forward pass")
  save(figure, path)

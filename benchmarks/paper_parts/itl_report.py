"""Tables and picture of inter-token latency."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.paper_parts.itl import dga_name
from benchmarks.paper_parts.plots import label, make_figure, save
from benchmarks.paper_parts.published import DEFAULT_M, ITL_BY_M, ITL_MS
from dga_jax import DGAConfig
from dga_jax.cache import cache_size
from dga_jax.evaluation.report import markdown

type ByLength = Mapping[int, Mapping[str, Any]]

# Rows of Table 3, and the settings that are measured here; None where the table alone has the row.
_ROWS: dict[str, str | None] = {
  "dense": "dense",
  "DGA": dga_name(DEFAULT_M),
  "StreamingLLM": "StreamingLLM",
  "StreamingLLM, its authors' code": None,
  "LM-Infinite": "LM-Infinite",
  "MInference": None,
}


def write(results: Sequence[Mapping[str, Any]], out: Path) -> str:
  """Writes itl.png to a folder; returns the tables."""
  by_length = {one["length"]: one for one in sorted(results, key=lambda one: one["length"])}
  _plot(by_length, out / "itl.png")
  return f"{_by_context(by_length)}\n\n{_by_m(by_length[max(by_length)])}"


def _by_context(by_length: ByLength) -> str:
  """Milliseconds a token of each kind at each context, beside Table 3."""
  rows = []
  for name, own in _ROWS.items():
    paper = [f"{ITL_MS[name][n]:.2f}" if n in ITL_MS[name] else "" for n in by_length]
    here = [_milliseconds(one, own) for one in by_length.values()]
    rows.append([name, *paper, *here])
  contexts = [f"{length // 1024}K" if length >= 1024 else str(length) for length in by_length]
  header = ["attention", *(f"paper, {text}" for text in contexts)]
  return markdown([*header, *(f"here, {text}: ms (times the floor)" for text in contexts)], rows)


def _milliseconds(result: Mapping[str, Any], name: str | None) -> str:
  own = result["kinds"].get(name)
  if own is None:
    return ""
  seconds = own["seconds"][0]
  return f"{1e3 * seconds:.3f} ({seconds / own['floor_seconds']:.2f})"


def _by_m(result: Mapping[str, Any]) -> str:
  """ITL at one context by m, and the authors' scores of LongBench-E."""
  rows = []
  kinds = result["kinds"]
  theirs_over_dense = _over_dense({m: one.milliseconds for m, one in ITL_BY_M.items()})
  for m, theirs in ITL_BY_M.items():
    own = kinds.get(_name_of(m))
    if own is None:
      continue
    rows.append(
      [
        "1 (dense)" if m == 1 else str(m),
        f"{own['live_bytes'] / kinds['dense']['live_bytes']:.1%}",
        f"{_share_of_paper(m, result['length']):.1%}",
        _milliseconds(result, _name_of(m)),
        f"{kinds['dense']['seconds'][0] / own['seconds'][0]:.2f}",
        f"{theirs.milliseconds:.1f}",
        f"{theirs_over_dense[m]:.2f}",
        *(f"{score:.2f}" for score in theirs[1:]),
      ]
    )
  header = [f"m, {result['length']} tokens", "cache here", "cache by the paper's rule"]
  header += ["here: ms (times the floor)", "over dense", "authors: ms", "over dense"]
  header += ["authors: summary", "one document", "several documents"]
  return markdown(header, rows)


def _share_of_paper(m: int, length: int) -> float:
  """The share of a dense cache under global selection with γ = 0.1 and no floor."""
  if m == 1:
    return 1.0
  config = DGAConfig(group_size=m, min_focal_tokens=0)
  return cache_size(config=config, max_length=length, prompt=length).total / length


def _name_of(m: int) -> str:
  """The setting of a group size; m = 1 is dense attention."""
  return "dense" if m == 1 else dga_name(m)


def _plot(by_length: ByLength, path: Path) -> None:
  """Milliseconds over the context, the speed-up over dense attention, and the speed-up by m.

  The last panel is left out where m = 1 and m = 16 alone are measured.
  """
  longest = max(by_length)
  kinds = by_length[longest]["kinds"]
  own_m = {m: kinds[_name_of(m)]["seconds"][0] for m in ITL_BY_M if _name_of(m) in kinds}
  title = "Time of a token, LLaMA2-7B, batch 1. Solid: here. Dashed: the paper's A800"
  figure, (times, ratios, *rest) = make_figure(3 if len(own_m) > 2 else 2, title, height=4.8)
  for index, (name, own) in enumerate(_ROWS.items()):
    color = f"C{index}"
    here = _measured(by_length, own)
    _draw(times, here, ITL_MS[name], color)
    times.plot([], [], color=color, label=name)
    if name != "dense":
      speed_up = _speed_up(_measured(by_length, "dense"), here)
      _draw(ratios, speed_up, _speed_up(ITL_MS["dense"], ITL_MS[name]), color)
  times.set_yscale("log")
  times.set_yticks([2, 3, 5, 10, 20, 30, 50, 100])
  times.yaxis.set_major_formatter("{x:g}")
  times.minorticks_off()
  label(times, "", "context", "ms a token")
  label(ratios, "", "context", "speed-up over dense attention")
  for axes in (times, ratios):
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}K")
  for axes in rest:
    theirs_m = {m: one.milliseconds for m, one in ITL_BY_M.items()}
    _draw(axes, _over_dense(own_m), _over_dense(theirs_m), "C1")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    label(axes, "DGA at the longest context", "m; 1 is dense", "speed-up over dense attention")
  for axes in (ratios, *rest):
    axes.axhline(1, color="black", lw=0.8)
    axes.set_ylim(bottom=0)
  figure.legend(loc="outside lower center", ncols=3 if not rest else 6, fontsize=8)
  save(figure, path)


def _measured(by_length: ByLength, name: str | None) -> dict[int, float]:
  """Milliseconds a token of a setting, by context."""
  return {
    length: 1e3 * one["kinds"][name]["seconds"][0]
    for length, one in by_length.items()
    if name in one["kinds"]
  }


def _speed_up(dense: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
  return {length: dense[length] / time for length, time in other.items()}


def _draw(axes: Axes, here: Mapping[int, float], paper: Mapping[int, float], color: str) -> None:
  """A solid line for what is measured here, and a dashed one for the paper."""
  axes.plot(list(here), list(here.values()), "o-", color=color, ms=4)
  axes.plot(list(paper), list(paper.values()), "s--", color=color, ms=4, mfc="none")


def _over_dense(by_m: Mapping[int, float]) -> dict[int, float]:
  """The speed-up of each m over m = 1."""
  return {m: by_m[1] / time for m, time in by_m.items()}

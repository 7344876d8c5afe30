"""Tables and pictures of continued pretraining."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper_parts import published_scores
from benchmarks.paper_parts.continued import UNTRAINED
from benchmarks.paper_parts.plots import label, make_figure, save
from dga_jax.evaluation.report import markdown

_LABELS = {
  UNTRAINED: "dense, before training",
  "dense": "dense",
  "global": "DGA global, m = 16, γ = 0.1",
  "streaming_quarter": "DGA streaming, a quarter of the keys",
  "streaming_eighth": "DGA streaming, an eighth of the keys",
  "window_quarter": "sinks and window, a quarter of the keys",
  "duo_quarter": "11 full heads, sinks and window in the others, a quarter",
  "budgets_quarter": "11 full heads, DGA in the others, a quarter",
  "gates_window_quarter": "11 full heads by gates, sinks and window in the others, a quarter",
  "gates_quarter": "11 full heads by gates, DGA with the fitted choice in the others, a quarter",
  "budgets_eighth": "budgets with four settings, an eighth",
}

type Results = Sequence[Mapping[str, Any]]  # One for each seed.
type ByRun = Mapping[str, Mapping[str, Results]]  # By run, and by measure.


def write(results: Results, out: Path) -> str:
  """Writes continued.png to a folder; returns the tables.

  Results of runs with another number of steps than the newest result are left out.
  """
  steps = results[-1]["depends_on"][0]["num_steps"]
  results = [one for one in results if one["depends_on"][0]["num_steps"] == steps]
  by_run: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
  for result in results:
    if result["run"] != "data":
      by_run.setdefault(result["run"], {}).setdefault(result["measure"], []).append(result)
  names = [name for name in _LABELS if name in by_run]
  names += sorted(set(by_run) - set(names))
  tables = [
    _losses({name: by_run[name] for name in names}),
    _summary({name: by_run[name]["recall"] for name in names if "recall" in by_run[name]}),
    _recall({name: by_run[name]["recall"] for name in names if "recall" in by_run[name]}),
    _questions({name: own["questions"] for name, own in by_run.items() if "questions" in own}),
    published_scores.table({name: _scores(by_run[name]) for name in names}),
    _trainings({name: by_run[name]["train"] for name in names if "train" in by_run[name]}),
  ]
  _plot({name: by_run[name] for name in names}, out / "continued.png")
  return "\n\n".join(table for table in tables if table)


def _losses(by_run: ByRun) -> str:
  """Held-out losses and the ratio of perplexities to dense attention that was trained alike.

  Whole rows, and the last tokens of each row in decoding. For global selection the loss of whole
  rows is lower than decoding can reach. A ratio compares the seeds that both runs have; ± is the
  standard error over rows of the mean difference of these seeds.
  """
  dense = by_run.get("dense", {}).get("loss", ())
  rows = []
  for name, measures in by_run.items():
    if "loss" not in measures:
      continue
    own = measures["loss"]
    whole, decoded = ([read(one) for one in own] for read in (_whole, _decoded))
    share = f"{own[0]['budget']['share']:.1%}"
    row = [_LABELS.get(name, name), str(len(own)), share, _with_spread(whole)]
    rows.append([*row, *_ratios(own, dense, with_seeds=name != "dense"), _with_spread(decoded)])
  if not rows:
    return ""
  header = ["attention", "seeds", "cache", "loss", "perplexity/dense", "of each seed"]
  return markdown([*header, "decoded: perplexity/dense", "decoded: loss"], rows)


def _ratios(own: Results, dense: Results, *, with_seeds: bool) -> list[str]:
  """The ratio with its error, that of each seed, and the ratio of the decoded tokens."""
  pairs = _pairs(own, dense)
  if not pairs:
    return ["", "", ""]
  differences = np.array(
    [np.subtract(one["loss_by_row"], base["loss_by_row"]) for one, base in pairs]
  )
  by_row = differences.mean(axis=0)
  ratio = np.exp(by_row.mean())
  error = by_row.std(ddof=1) / len(by_row) ** 0.5 if len(by_row) > 1 else 0.0
  decoded = np.exp(np.mean([_decoded(one) - _decoded(base) for one, base in pairs]))
  seeds = [f"{one:.4f}" for one in np.exp(differences.mean(axis=1))]
  return [
    f"{ratio:.4f} ± {ratio * error:.4f}",
    ", ".join(seeds) if with_seeds and len(seeds) > 1 else "",
    f"{decoded:.4f}",
  ]


def _pairs(own: Results, dense: Results) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
  """The results of a run and of dense attention with equal seeds.

  The model before training has one seed, which is compared with every seed of dense attention.
  """
  by_seed = {one["seed"]: one for one in own}
  if own[0]["run"] == UNTRAINED:
    by_seed = {one["seed"]: own[0] for one in dense}
  return [(by_seed[base["seed"]], base) for base in dense if base["seed"] in by_seed]


def _whole(result: Mapping[str, Any]) -> float:
  return float(result["loss"])


def _decoded(result: Mapping[str, Any]) -> float:
  return float(result["last"]["decoded_loss"])


def _by_position(result: Mapping[str, Any]) -> np.ndarray:
  return np.array([one["loss"] for one in result["by_position"]])


def _recall(by_run: Mapping[str, Results]) -> str:
  if not by_run:
    return ""
  shares = {name: [_shares(one) for one in results] for name, results in by_run.items()}
  every = [one for results in shares.values() for one in results]
  rows = []
  for task in every[0]:
    if all(task in one for one in every):
      means = [np.mean([one[task] for one in results]) for results in shares.values()]
      rows.append([task.replace("_", " "), *(f"{mean:.0%}" for mean in means)])
  return markdown(["task", *(_LABELS.get(name, name) for name in by_run)], rows)


def _summary(by_run: Mapping[str, Results]) -> str:
  """The mean over the retrieval tasks of each length, and over RULER's four needle tasks."""
  if not by_run:
    return ""
  lengths = list(dict.fromkeys(task.split()[1] for task in _first(by_run)["retrieval"]))
  rows = []
  for name, results in by_run.items():
    columns = [[_mean_of_length(one, length) for one in results] for length in lengths]
    columns.append([_mean_of_needles(one) for one in results])
    rows.append([_LABELS.get(name, name), *map(_percents, columns)])
  header = [f"retrieval, {length} tokens" for length in lengths]
  return markdown(["attention", *header, "RULER's needles"], rows)


def _mean_of_length(result: Mapping[str, Any], length: str) -> float:
  titles = result["retrieval"].items()
  return float(np.mean([one["share"] for title, one in titles if title.endswith(f" {length}")]))


def _mean_of_needles(result: Mapping[str, Any]) -> float:
  needles = ("single", "multi")
  tasks = result["ruler"].items()
  return float(np.mean([one["score"] for task, one in tasks if task.startswith(needles)]))


def _scores(measures: Mapping[str, Results]) -> dict[str, float]:
  """Percentages of right answers by measure, means over the seeds."""
  by_seed: dict[str, list[float]] = {}
  for one in measures.get("recall", ()):
    for length in dict.fromkeys(task.split()[1] for task in one["retrieval"]):
      by_seed.setdefault(f"retrieval, {length}", []).append(100 * _mean_of_length(one, length))
    by_seed.setdefault("RULER's needles", []).append(100 * _mean_of_needles(one))
  for one in measures.get("questions", ()):
    known = {name: score for name, score in one["scores"].items() if score is not None}
    if "many documents" in known:
      by_seed.setdefault("many documents", []).append(known.pop("many documents"))
    if known:
      by_seed.setdefault("LongBench-E", []).append(float(np.mean([*known.values()])))
  return {measure: float(np.mean(values)) for measure, values in by_seed.items()}


def _percents(values: Sequence[float]) -> str:
  """The mean over seeds, and each seed's value if there are several."""
  mean = f"{np.mean(values):.0%}"
  return mean if len(values) == 1 else f"{mean} ({', '.join(f'{one:.0%}' for one in values)})"


def _questions(by_run: Mapping[str, Results]) -> str:
  """Scores in percent of LongBench-E's data sets and of the questions about many documents."""
  if not by_run:
    return ""
  rows = []
  for task in _first(by_run)["scores"]:
    scores = [[one["scores"].get(task) for one in results] for results in by_run.values()]
    known = [[score for score in own if score is not None] for own in scores]
    rows.append([task, *(f"{np.mean(own):.1f}" if own else "" for own in known)])
  return markdown(["data set", *(_LABELS.get(name, name) for name in by_run)], rows)


def _first(by_run: Mapping[str, Results]) -> Mapping[str, Any]:
  return next(iter(by_run.values()))[0]


def _shares(result: Mapping[str, Any]) -> dict[str, float]:
  """The share of right answers by task."""
  shares = {task: one["share"] for task, one in result["retrieval"].items()}
  return shares | {f"RULER {task}": one["score"] for task, one in result["ruler"].items()}


def _trainings(by_run: Mapping[str, Results]) -> str:
  if not by_run:
    return ""
  rows = []
  for name, results in by_run.items():
    one = results[0]
    memory = one.get("device_memory_bytes")
    before, after = (_by_corpus(one["held_out"][at]) for at in (0, -1))
    rows.append(
      [
        _LABELS.get(name, name),
        str(one["steps"]),
        f"{one['tokens'] / 1e6:.1f} M",
        f"{one['tokens_per_second']:,.0f}",
        f"{one['mfu']:.1%}",
        "" if memory is None else f"{memory / 1e9:.1f} GB",
        f"{one['training_seconds']:.0f} s",
        before,
        after,
      ]
    )
  header = [
    "attention", "steps", "tokens", "tokens/s", "MFU", "memory", "time",
    "held-out loss before", "after",
  ]  # fmt: skip
  return markdown(header, rows)


def _by_corpus(evaluation: Mapping[str, Any]) -> str:
  """The held-out loss of each corpus, in the order of the training files."""
  return ", ".join(f"{Path(name).stem} {loss:.4f}" for name, loss in evaluation["losses"].items())


def _with_spread(values: Sequence[float]) -> str:
  if len(values) == 1:
    return f"{values[0]:.4f}"
  return f"{np.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def _plot(by_run: ByRun, path: Path) -> None:
  """Losses above dense attention's with the same seed: held-out by position, and of training.

  The two runs of a seed train on the same batches.
  """
  figure, (by_position, by_step) = make_figure(
    2, "Continued pretraining of SmolLM2-135M", height=5.0
  )
  dense = by_run.get("dense", {})
  for index, (name, measures) in enumerate(by_run.items()):
    if name == "dense":
      continue
    style: dict[str, Any] = {"color": f"C{index}", "label": _LABELS.get(name, name)}
    if name == UNTRAINED:
      style |= {"color": "black", "ls": ":"}
    pairs = _pairs(measures["loss"], dense.get("loss", ())) if "loss" in measures else []
    if pairs:
      places = pairs[0][0]["by_position"]
      excess = np.mean([_by_position(one) - _by_position(base) for one, base in pairs], axis=0)
      middles = [(one["from"] + one["to"]) / 2 for one in places]
      by_position.plot(middles, excess, marker="o", ms=3, **style)
    pairs = _pairs(measures["train"], dense.get("train", ())) if "train" in measures else []
    if pairs:
      excess = np.mean([np.subtract(one["losses"], base["losses"]) for one, base in pairs], axis=0)
      window = max(1, len(excess) // 20)
      smooth = np.convolve(excess, np.ones(window) / window, "valid")
      by_step.plot(np.arange(len(smooth)) + window, smooth, lw=1, **style)
  for axes in (by_position, by_step):
    axes.axhline(0, color="black", lw=0.8)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.yaxis.set_major_formatter("{x:g}")
  label(by_position, "held-out loss above dense", "position", "nats per token")
  label(by_step, "training loss above dense, moving average", "step", "nats per token")
  lines = {line.get_label(): line for axes in (by_step, by_position) for line in axes.get_lines()}
  named = {name: line for name, line in lines.items() if not str(name).startswith("_")}
  if named:
    figure.legend(
      named.values(), list(map(str, named)), loc="outside lower center", ncols=2, fontsize=8
    )
  save(figure, path)

"""LongBench-E (Bai et al., arXiv 2308.14508) from its own files, with its own metrics.

The folder must contain the files that the benchmark publishes: NAME_e.jsonl for each data set,
dataset2prompt.json with the prompts, and dataset2maxlen.json with the answer lengths. They are not
part of this project.
"""

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dga_jax.evaluation import scores
from dga_jax.evaluation.texts import read_jsonl
from dga_jax.tokenizer import Tokenizer

_METRICS: dict[str, Callable[..., float]] = {
  "qasper": scores.qa_f1,
  "multifieldqa_en": scores.qa_f1,
  "hotpotqa": scores.qa_f1,
  "2wikimqa": scores.qa_f1,
  "gov_report": scores.rouge_l,
  "multi_news": scores.rouge_l,
  "trec": scores.classification,
  "triviaqa": scores.qa_f1,
  "samsum": scores.rouge_l,
  "passage_count": scores.count,
  "passage_retrieval_en": scores.retrieval,
  "lcc": scores.code_similarity,
  "repobench-p": scores.code_similarity,
}
DATASETS = tuple(_METRICS)
# Few-shot tasks: only the first line of the answer counts.
_FIRST_LINE = frozenset({"trec", "triviaqa", "samsum"})
_BUCKETS = {"0-4k": 4000, "4-8k": 8000, "8k+": float("inf")}
_FIELDS = ("input", "context", "answers", "length", "all_classes")


@dataclasses.dataclass(frozen=True)
class LongBenchSet:
  """One data set.

  Attributes:
    name: of the data set.
    examples: the values of the file's lines.
    prompts: the prompt of each example.
    new_tokens: largest number of tokens of an answer.
  """

  name: str
  examples: list[dict[str, Any]]
  prompts: list[str]
  new_tokens: int


def read_sets(folder: str | Path, limit: int | None = None) -> list[LongBenchSet]:
  """The data sets whose files are in a folder, in the benchmark's order.

  Args:
    folder: the files of the benchmark.
    limit: largest number of examples of each data set; None for all.

  Raises:
    OSError: a file cannot be read.
    ValueError: the folder has no data set, or a line or prompt is not in the benchmark's format.
  """
  folder = Path(folder)
  sets = []
  for name in DATASETS:
    path = folder / f"{name}_e.jsonl"
    if path.is_file():
      sets.append(_read_set(folder, path, name, limit))
  if not sets:
    raise ValueError(f"longbench is {folder}; it must have files such as qasper_e.jsonl.")
  return sets


def score(one: LongBenchSet, predictions: Sequence[str]) -> dict[str, Any]:
  """The official score in percent, by bucket of length and over all examples, with counts.

  The score of an example is the best over its reference answers. Its length, in words, is the
  "length" of the file.

  Args:
    one: the data set.
    predictions: the model's answer to each example.

  Returns:
    "dataset", "score" and "examples"; the score of an empty bucket is None.
  """
  by_bucket: dict[str, list[float]] = {name: [] for name in _BUCKETS}
  for example, prediction in zip(one.examples, predictions, strict=True):
    bucket = next(name for name, end in _BUCKETS.items() if example["length"] < end)
    by_bucket[bucket].append(_score_one(one.name, example, prediction))
  everything = [value for values in by_bucket.values() for value in values]
  buckets = {name: _mean(values) for name, values in (by_bucket | {"all": everything}).items()}
  counts = {name: len(values) for name, values in by_bucket.items()}
  return {"dataset": one.name, "score": buckets, "examples": counts}


def fit(tokenizer: Tokenizer, prompt: str, most: int) -> list[int]:
  """A prompt's tokens; of a prompt with more than `most` tokens, the first and the last half.

  Raises:
    ValueError: `most` leaves no room for two tokens after those that start a document.
  """
  tokens = tokenizer.encode(prompt)
  room = most - len(tokenizer.start_ids)
  if room < 2:
    raise ValueError(f"most is {most}; a prompt needs room for at least 2 tokens.")
  if len(tokens) > room:
    tokens = tokens[: room // 2] + tokens[len(tokens) - room // 2 :]
  return [*tokenizer.start_ids, *tokens]


def _read_set(folder: Path, path: Path, name: str, limit: int | None) -> LongBenchSet:
  template = _entry(folder / "dataset2prompt.json", name)
  new_tokens = _entry(folder / "dataset2maxlen.json", name)
  examples = []
  for number, values in read_jsonl(path):
    lacks = [field for field in _FIELDS if not isinstance(values, Mapping) or field not in values]
    if lacks:
      raise ValueError(f"{path}, line {number}, lacks {', '.join(lacks)}.")
    examples.append(dict(values))
  examples = examples[:limit]
  return LongBenchSet(name, examples, [template.format(**one) for one in examples], new_tokens)


def _entry(path: Path, name: str) -> Any:
  try:
    values = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(values, dict) or name not in values:
    raise ValueError(f"{path} has no entry {name!r}.")
  return values[name]


def _score_one(name: str, example: Mapping[str, Any], prediction: str) -> float:
  if name in _FIRST_LINE:
    prediction = prediction.lstrip("\n").partition("\n")[0]
  metric = _METRICS[name]
  if metric is scores.classification:
    metric = functools.partial(metric, classes=example["all_classes"] or ())
  return max((metric(prediction, reference) for reference in example["answers"]), default=0)


def _mean(values: Sequence[float]) -> float | None:
  return round(100 * statistics.fmean(values), 2) if values else None

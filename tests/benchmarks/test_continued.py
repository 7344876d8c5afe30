"""Tests of the continued pretraining of benchmarks/paper.py on tiny models."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper_parts import continued, continued_report, recall
from benchmarks.paper_parts.inputs import Inputs
from benchmarks.paper_parts.pretraining import Pretraining
from benchmarks.paper_parts.question_sets import measure_question_sets, QuestionSets
from configs.smollm2_continued import DEFAULT_RUNS, get_config, RUNS
from dga_jax.evaluation.jobs import run_jobs
from dga_jax.evaluation.perplexity import PerplexitySettings
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.ruler import RulerTexts
from dga_jax.evaluation.variants import Variant
from dga_jax.head_budgets import read_head_budgets
from dga_jax.model.flops import cache_keys
from tests.dga_jax.evaluation.tiny import family, STORY, TOKENIZER, write_checkpoint
from train.config import make_config
from train.flags import with_defaults
from train.init_from import find_initial
from train.stop_signals import StopSignals


@pytest.mark.parametrize("run", RUNS)
def test_every_run_keeps_at_most_its_share_of_the_keys(run: str):
  config = make_config(with_defaults(get_config(run)))
  config = dataclasses.replace(
    config, model=dataclasses.replace(config.model, focal_selector=run not in DEFAULT_RUNS)
  )
  config = find_initial(config, None).config
  assert config.batch_size * config.data.sequence_length == 65_536
  shares = {"quarter": 2048, "eighth": 1024}
  most = next((keys for name, keys in shares.items() if run.endswith(name)), None)
  if most is not None:
    assert 0.96 * most <= cache_keys(config.model, 8192) <= most


def test_a_run_is_named_by_a_file_of_budgets(tmp_path: Path):
  budgets = read_head_budgets(str(get_config("duo_quarter").budgets))
  path = tmp_path / "found.json"
  path.write_text(json.dumps(budgets.to_dict() | {"calibration": {"keys": 0.25}}))
  config = make_config(with_defaults(get_config(str(path))))
  assert config.budgets == str(path)
  found = find_initial(config, None).config.model
  assert found == find_initial(make_config(get_config("duo_quarter")), None).config.model
  assert found.head_budgets.counts() == budgets.counts()
  # The heads of a setting are adjacent, so few rows are distinct.
  assert all(list(row) == sorted(row) for row in found.head_budgets.assignment)
  with pytest.raises(ValueError, match="run is 'unknown'; it must be a JSON file"):
    get_config("unknown")


def test_recall_scores_every_task(monkeypatch: pytest.MonkeyPatch):
  """Where every prediction holds the answers, every score is 1."""
  settings = recall.Recall(lengths=(1500, 3000), depths=(0.2, 0.8), samples=1, ruler_samples=2)
  texts = RulerTexts([STORY * 40], TOKENIZER)
  answers: dict[tuple[int, ...], str] = {}
  sample, make = RulerTexts.sample, type(texts.hay).sample

  def remember_ruler(self: RulerTexts, *args: Any, **kwargs: Any) -> Any:
    prompt = sample(self, *args, **kwargs)
    answers[tuple(prompt.tokens)] = " ".join(prompt.answers)
    return prompt

  def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
    one = make(self, *args, **kwargs)
    answers[tuple(one.tokens)] = one.answer
    return one

  monkeypatch.setattr(RulerTexts, "sample", remember_ruler)
  monkeypatch.setattr(type(texts.hay), "sample", remember)
  monkeypatch.setattr(
    recall, "greedy_answers",
    lambda graphdef, params, tokenizer, prompts, **_: [answers[tuple(one)] for one in prompts],
  )  # fmt: skip
  result = recall.measure_recall(family(), Variant("own"), TOKENIZER, texts, settings)
  assert {one["share"] for one in result["retrieval"].values()} == {1.0}
  assert {one["score"] for one in result["ruler"].values()} == {1.0}
  assert len(result["retrieval"]) == 10
  assert len(result["ruler"]) == 7


def test_questions_of_files_are_answered_and_reported(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  """Files in the formats of LongBench-E and of Liu et al., and a model that knows one answer."""
  (tmp_path / "dataset2prompt.json").write_text('{"qasper": "{context} {input}"}')
  (tmp_path / "dataset2maxlen.json").write_text('{"qasper": 5}')
  paper = {"context": STORY * 9, "answers": ["porch"], "length": 400, "all_classes": None}
  lines = [json.dumps(paper | {"input": place}) for place in ("Where?", "When?")]
  (tmp_path / "qasper_e.jsonl").write_text("\n".join(lines))
  documents = [
    {"title": str(number), "text": "Rain.", "isgold": number == 1} for number in range(3)
  ]
  question = {"question": "What fell?", "answers": ["rain"], "ctxs": documents}
  (tmp_path / "questions.jsonl").write_text(json.dumps(question))
  sets = QuestionSets(str(tmp_path), str(tmp_path / "questions.jsonl"))
  assert sets
  assert not QuestionSets()
  prompts: list[int] = []

  def answers(_: Any, __: Any, tokens: list[list[int]], *, new_tokens: int, **___: Any) -> Any:
    prompts.extend(len(one) + new_tokens for one in tokens)
    return ["porch", "rain"] if len(tokens) == 2 else ["some rain"]

  variant = Variant("own")
  real = measure_question_sets(family(), variant, TOKENIZER, 512, sets)
  assert set(real["scores"]) == {"qasper", "many documents"}
  assert len(real["results"]["qasper"]["answers"]) == 2
  monkeypatch.setattr("dga_jax.evaluation.jobs.answer", answers)
  result = measure_question_sets(family(), variant, TOKENIZER, 512, sets)
  assert result["scores"] == {"qasper": 50.0, "many documents": 100.0}
  assert max(prompts) <= 512
  table = continued_report._questions({"dense": [result], "other": [result]})
  assert "| qasper | 50.0 | 50.0 |" in table


def test_ratios_compare_equal_seeds():
  def result(run: str, seed: int, losses: list[float]) -> dict[str, Any]:
    last = {"decoded_loss": losses[0]}
    return {"run": run, "seed": seed, "loss_by_row": losses, "last": last}

  dense = [result("dense", seed, [3.0 + seed, 4.0]) for seed in (0, 1)]
  own = [result("other", seed, [3.0 + seed + excess, 4.0]) for seed, excess in ((1, 0.2), (2, 9.0))]
  # Seed 1 alone is in both: differences of 0.2 and 0 by row.
  ratio, seeds, decoded = continued_report._ratios(own, dense, with_seeds=True)
  assert ratio == f"{math.exp(0.1):.4f} ± {0.1 * math.exp(0.1):.4f}"
  assert seeds == ""
  assert decoded == f"{math.exp(0.2):.4f}"
  before = [result("untrained", 0, [4.0, 5.0])]
  ratio, seeds, decoded = continued_report._ratios(before, dense, with_seeds=True)
  assert ratio.startswith(f"{math.exp(0.75):.4f} ± ")
  assert seeds == f"{math.exp(1.0):.4f}, {math.exp(0.5):.4f}"
  assert continued_report._ratios(own[1:], dense, with_seeds=True) == ["", "", ""]


def test_a_run_is_trained_evaluated_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  workdir = write_checkpoint(tmp_path / "model")
  for name in ("books.txt", "facts.txt", "held_out_books.txt", "held_out_facts.txt"):
    (tmp_path / name).write_text("\0".join(f"{name} {index} {STORY * 3}" for index in range(40)))
  settings = Pretraining(
    folder=tmp_path / "runs",
    cache_dir=tmp_path / "data",
    train_files=(str(tmp_path / "books.txt"), str(tmp_path / "facts.txt")),
    validation_files=tuple(str(tmp_path / f"held_out_{name}.txt") for name in ("books", "facts")),
    runs=("dense", "streaming_eighth"),
    overrides={
      "num_steps": 3, "warmup_steps": 1, "batch_size": 2, "eval_every": 3, "eval_batches": 1,
      "checkpoint_every": 3, "loss_chunk": 32, "log_every": 1,
      "data": {"sequence_length": 64}, "model": {"dtype": "float32"},
    },
    perplexity=PerplexitySettings(batch_size=2, targets=8, buckets=4, always_decode=False),
  )  # fmt: skip
  (tmp_path / "novels.txt").write_text(STORY * 20)
  inputs = Inputs(str(workdir), [str(tmp_path / "novels.txt")], 1, settings)
  monkeypatch.setattr(
    continued, "measure_recall",
    lambda *_: {
      "retrieval": {"passkey 64": {"share": 0.5}},
      "ruler": {"single": {"score": 0.25}},
    },
  )  # fmt: skip
  results = Results(tmp_path / "paper.jsonl")
  jobs = list(continued.make_jobs(inputs))
  assert [job.label for job in jobs] == [
    "continued data 0 prepared",
    "continued untrained 0 loss",
    "continued untrained 0 recall",
    *(f"continued {run} 0 {what}" for run in settings.runs for what in ("train", "loss", "recall")),
  ]
  assert run_jobs(jobs, results, origin="tiny") == 0
  by_label = {(one["run"], one["measure"]): one for one in results.all()}
  prepared = by_label["data", "prepared"]
  # 3 steps of 2 rows, half of them of each corpus.
  assert prepared["reads"] == {name: round(3 / n, 4) for name, n in prepared["rows"].items()}
  for run in settings.runs:
    trained = by_label[run, "train"]
    assert len(trained["losses"]) == trained["steps"] == 3
    assert trained["tokens"] == 3 * 2 * 64
    assert [one["step"] for one in trained["held_out"]] == [0, 3]
    assert set(trained["held_out"][0]["losses"]) == {"books.txt", "facts.txt"}
    # Training lowers the loss, and the evaluation measures the trained model.
    before, after = (sum(one["losses"].values()) for one in trained["held_out"])
    assert after < before
    assert by_label[run, "loss"]["loss"] < by_label["untrained", "loss"]["loss"]
  assert str(tmp_path) not in json.dumps([one["depends_on"] for one in results.all()])
  # A signal stops the command before the next job.
  stopped = StopSignals()
  stopped.asked = True
  inputs.signals = stopped
  with pytest.raises(InterruptedError, match="The same command continues it"):
    next(iter(continued.make_jobs(inputs))).run(lambda: None)
  # A second start measures nothing, and a longer run is another result.
  again = list(continued.make_jobs(inputs))
  assert {job.key for job in again} == {job.key for job in jobs}
  longer = dataclasses.replace(settings, overrides={**settings.overrides, "num_steps": 4})
  inputs.pretraining = longer
  assert not {job.key for job in continued.make_jobs(inputs)} & {job.key for job in jobs}
  text = continued_report.write(results.all(), tmp_path)
  assert "| DGA streaming, an eighth of the keys | 1 |" in text
  assert "| RULER single | 25% | 25% | 25% |" in text
  assert (tmp_path / "continued.png").stat().st_size > 1000

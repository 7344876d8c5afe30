"""Evaluation jobs and their stored results, tables, plots, and the command `dga evaluate`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dga_jax.evaluation import report
from dga_jax.evaluation.jobs import (
  Job,
  longbench_job,
  lost_in_the_middle_job,
  perplexity_job,
  retrieval_job,
  RetrievalSettings,
  run_jobs,
)
from dga_jax.evaluation.longbench import LongBenchSet
from dga_jax.evaluation.lost_in_the_middle import Question
from dga_jax.evaluation.perplexity import PerplexitySettings
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.retrieval import Haystack
from dga_jax.evaluation.texts import read_documents, token_rows
from dga_jax.evaluation.variants import Variant
from tests.dga_jax.evaluation.tiny import (
  family,
  STORY,
  TOKENIZER,
  write_checkpoint,
  write_documents,
)

ROOT = Path(__file__).parents[3]
VARIANTS = [
  Variant("dense", {"attention": "dense"}),
  Variant("StreamingLLM, half", {"attention": "streaming_llm"}, 0.5),
  Variant("DGA global", {"dga": {"group_size": 3, "min_focal_tokens": 0}}),
]


def job(name: str, measured: list, depends_on: object = 1) -> Job:
  def run(tick):
    tick()
    measured.append(name)
    return {"value": len(measured)}

  return Job({"task": "t", "variant": name}, depends_on, 1, run)


def test_results_are_measured_once(tmp_path: Path) -> None:
  path, measured = tmp_path / "new" / "r.jsonl", []
  assert run_jobs([job("a", measured), job("b", measured)], Results(path), origin="o") == 0
  run_jobs([job(name, measured) for name in "abc"], Results(path), origin="o")
  assert measured == ["a", "b", "c"]
  run_jobs([job("a", measured, depends_on=2)], Results(path), origin="o")
  assert measured[3:] == ["a"]
  first = Results(path).all()[0]
  assert (first["value"], first["variant"], first["origin"]) == (1, "a", "o")
  assert "jax" in first["environment"]["versions"]


def test_no_job_starts_after_the_time_limit(tmp_path: Path) -> None:
  measured: list[str] = []
  left = run_jobs(
    [job(name, measured) for name in "abc"], Results(tmp_path / "r"), origin="o", minutes=0
  )
  assert (left, measured) == (3, [])


def test_jobs_that_the_device_cannot_run_stay_missing(tmp_path: Path, capsys) -> None:
  def no_memory(tick):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

  measured: list[str] = []
  broken = Job({"task": "t", "variant": "broken"}, 1, 1, no_memory)
  path = tmp_path / "r"
  jobs = [job("a", measured), broken, job("b", measured)]
  assert run_jobs(jobs, Results(path), origin="o", workers=2) == 1
  assert sorted(measured) == ["a", "b"]
  assert len(Results(path).all()) == 2
  assert "failed: RESOURCE_EXHAUSTED: out of memory\n" in capsys.readouterr().err


def test_other_errors_end_the_run(tmp_path: Path) -> None:
  def mistake(tick):
    raise ValueError("a mistake")

  with pytest.raises(ValueError, match="a mistake"):
    run_jobs([Job({"task": "t"}, 1, 1, mistake)], Results(tmp_path / "r"), origin="o")


def test_a_truncated_result_is_removed_and_measured_again(tmp_path: Path) -> None:
  path = tmp_path / "r.jsonl"
  results = Results(path)
  results.add("a", {"value": 1})
  results.add("b", {"value": 2})
  path.write_text(path.read_text()[:-9])
  again = Results(path)
  assert "a" in again
  assert "b" not in again
  again.add("b", {"value": 3})
  assert [result["value"] for result in Results(path).all()] == [1, 3]
  path.write_text("no result\n" + path.read_text())
  with pytest.raises(ValueError, match="line 1, is not a result"):
    Results(path)


def test_no_results_write_no_report(tmp_path: Path) -> None:
  assert report.write("perplexity", [], tmp_path) == []


def is_png(path: Path) -> bool:
  return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.nightly
def test_perplexity_and_its_plots(tmp_path: Path) -> None:
  models, settings = family(), PerplexitySettings(batch_size=2, targets=8, contexts=(8, 16))
  documents = read_documents([write_documents(tmp_path)])
  rows = token_rows(documents, TOKENIZER, 64)
  asked = [perplexity_job(models, variant, rows, settings) for variant in VARIANTS]
  results = Results(tmp_path / "r.jsonl")
  run_jobs(asked, results, origin="o")
  dense, window, later = results.all()
  assert window["budget"]["keys"] == 32
  assert later["last"]["largest_difference"] > 10 * dense["last"]["largest_difference"]
  drawn = report.write("perplexity", results.all(), tmp_path)
  assert [path.name for path in drawn[1:]] == [
    "perplexity_by_share_64.png", "perplexity_by_position_64.png", "restart_64.png",
  ]  # fmt: skip
  assert all(map(is_png, drawn[1:]))
  few = report.write("perplexity", results.all(), tmp_path, plotted=["another"])
  assert few == drawn[:2]
  table = drawn[0].read_text().splitlines()
  assert table[3].startswith("| StreamingLLM, half | 64 | 32 (50.0%) |")


def test_retrieval_and_its_plots(tmp_path: Path) -> None:
  models, settings = family(), RetrievalSettings((0.0, 1.0), samples=2, batch_size=4)
  hay = Haystack([STORY * 8], TOKENIZER)
  asked = [
    retrieval_job(models, TOKENIZER, hay, VARIANTS[0], "passkey", length, settings)
    for length in (256, 320)
  ]
  results = Results(tmp_path / "r.jsonl")
  run_jobs(asked, results, origin="o")
  first, second = results.all()
  assert (first["length"], second["length"]) == (256, 320)
  assert [one["depth"] for one in first["by_depth"]] == [0.0, 1.0]
  assert first["samples"] == len(first["answers"]) == 4
  _, *drawn = report.write("retrieval", results.all(), tmp_path)
  assert [path.name for path in drawn] == ["passkey.png", "passkey_by_depth.png"]
  assert all(map(is_png, drawn))


def test_reports_of_longbench_and_lost_in_the_middle(tmp_path: Path) -> None:
  models, variant = family(), VARIANTS[0]
  example = {"answers": ["a"], "length": 1, "all_classes": None}
  one = LongBenchSet("qasper", [example], ["text"], new_tokens=4)
  question = Question("text?", ["a"], gold=2, documents=3)
  results = Results(tmp_path / "r.jsonl")
  asked = [
    longbench_job(models, TOKENIZER, one, variant, 64, batch_size=1),
    lost_in_the_middle_job(models, TOKENIZER, [question], variant, 128, batch_size=1),
  ]
  run_jobs(asked, results, origin="o")
  assert results.all()[0]["examples"]["0-4k"] == 1
  (table,) = report.write("longbench", results.all(), tmp_path)
  assert table.read_text().splitlines()[2].startswith("| qasper | dense | 64 |")
  (table,) = report.write("lost_in_the_middle", results.all(), tmp_path)
  assert "| dense | 3 | 3 |" in table.read_text()
  with pytest.raises(ValueError, match="length is 100; the longest question takes 106"):
    lost_in_the_middle_job(models, TOKENIZER, [question], variant, 100, batch_size=1)


def evaluate(workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "dga_jax.evaluate", f"--workdir={workdir}", *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command(tmp_path: Path) -> None:
  workdir = write_checkpoint(tmp_path / "run")
  documents = write_documents(tmp_path)
  asked = ["--task=perplexity", f"--documents={documents}", "--lengths=64", "--targets=8"]
  variants = '--variants=[{"name": "dense", "attention": "dense"}]'
  done = evaluate(workdir, *asked, variants)
  assert done.returncode == 0, done.stderr
  out = workdir / "evaluation"
  assert done.stdout.split()[0] == str(out / "perplexity.md")
  result = json.loads((out / "perplexity.jsonl").read_text())
  assert (result["variant"], result["rows"], result["origin"]) == ("dense", 2, f"{workdir}, step 0")
  # Other weights in the same folder are measured, and the table shows their results alone.
  shutil.rmtree(workdir / "checkpoints")
  write_checkpoint(workdir, scale=0.5)
  done = evaluate(workdir, *asked, variants)
  assert done.returncode == 0, done.stderr
  results = list(map(json.loads, (out / "perplexity.jsonl").read_text().splitlines()))
  assert len({one["perplexity"] for one in results}) == 2
  table = (out / "perplexity.md").read_text()
  assert [f"| {one['perplexity']:.3f} |" in table for one in results] == [False, True]
  failed = evaluate(workdir, *asked[:1], "--documents=nowhere.jsonl")
  assert (failed.returncode, "Traceback" in failed.stderr) == (1, False)
  assert "error: " in failed.stderr
  assert "nowhere.jsonl" in failed.stderr

"""Tests of the parts "itl" and "reordering" of benchmarks/paper.py, and of timed decode steps."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks._attention_parts import choice, summaries, whole_op
from benchmarks._collectives import Profile
from benchmarks._decode_steps import DecodeChunk, StepModel, weight_bytes
from benchmarks._decoder_inputs import random_params
from benchmarks._inputs import Shape
from benchmarks._paired_timing import TimedProgram
from benchmarks.paper_parts import (
  ablations_report,
  itl,
  itl_report,
  published_scores,
  registry,
  reordering,
)
from benchmarks.paper_parts.inputs import Inputs
from dga_jax import DGAConfig
from dga_jax.evaluation.jobs import run_jobs
from dga_jax.evaluation.results import Results
from dga_jax.model import ModelConfig

_MODEL: dict[str, Any] = {
  "vocab_size": 64, "num_layers": 1, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2,
  "head_dim": 16, "mlp_dim": 64,
}  # fmt: skip
_TOKEN_BYTES = 2 * 2 * 2 * 16  # Key and value of one token in bfloat16.


def _model(**settings: Any) -> StepModel:
  return StepModel.from_config(ModelConfig(**_MODEL, param_dtype="bfloat16", **settings))


@pytest.mark.parametrize(
  ("length", "settings", "entries"),
  [
    # 36 tokens are two complete blocks of 16 + 2, each of two focal tokens and a group.
    (36, {"group_size": 16}, 2 * 3),
    # Blocks of 4 + 1 after 2 sinks: 38 tokens are 7 blocks and 3 tokens. The last block is raw.
    (40, {"group_size": 4, "sink_tokens": 2, "local_window": 1}, 2 + 6 * 2 + 5 + 3),
  ],
)
def test_live_bytes_count_what_the_next_token_sees(length: int, settings: dict, entries: int):
  config = DGAConfig(selection="streaming", **settings)
  model = _model(attention="dga", dga=config)
  assert model.live_bytes(length) == entries * _TOKEN_BYTES
  assert model.allocated_bytes(1, length) >= model.live_bytes(length)


def test_a_chunk_decodes_the_most_likely_tokens_of_its_cache():
  model = _model(attention="dense")
  params = random_params(model.params)
  chunk = DecodeChunk.compile(model, params, 2, 24, 3)
  cache, token_B = chunk.start(jax.random.key(1))
  np.testing.assert_array_equal(cache.length, 21)
  want, decoder = token_B, model.decoder(params)
  step = nnx.jit(lambda decoder, token, cache: decoder.decode(token, cache))
  state = jax.tree.map(jnp.copy, (cache, token_B))
  for _ in range(3):
    logits_BxV, cache = step(decoder, want, cache)
    want = logits_BxV.argmax(axis=-1)
  after, got = chunk.decode(params, state)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(after.length, 24)


def test_itl_has_every_setting_and_a_second_run_measures_nothing(tmp_path: Path):
  sizes = itl.Sizes(_MODEL, (64,), (16,), chunk=2, rounds=1, read_bytes=2**20)
  jobs = list(itl.make_jobs(Inputs(None, []), sizes))
  assert run_jobs(jobs, Results(tmp_path / "paper.jsonl"), origin="random") == 0
  again = Results(tmp_path / "paper.jsonl")
  assert run_jobs([dataclasses.replace(jobs[0], run=None)], again, origin="random") == 0
  (result,) = again.all()
  assert result["origin"] == "shapes of LLaMA2-7B, random weights"
  assert [*result["kinds"]] == ["dense", "DGA, m = 16", "StreamingLLM", "LM-Infinite"]
  assert result["depends_on"]["settings"]["StreamingLLM"]["settings"]["window"] == 2000
  assert result["depends_on"]["settings"]["DGA, m = 16"]["settings"]["group_size"] == 16
  read = weight_bytes(random_params(_model(attention="dense").params))
  for own in result["kinds"].values():
    assert own["seconds"][1] <= own["seconds"][0] <= own["seconds"][2]
    floor = (read + own["live_bytes"]) / result["read_rate"]
    np.testing.assert_allclose(own["floor_seconds"], floor)
  # A dense cache also has two lengths.
  assert result["kinds"]["dense"]["live_bytes"] == 64 * _TOKEN_BYTES + 2 * 4


def test_a_context_that_does_not_compile_leaves_the_others(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  compile_chunk, compiled = itl._compile_chunk, []

  def refuse_short(sizes: itl.Sizes, length: int, config: ModelConfig) -> DecodeChunk:
    compiled.append(length)
    if length == 32:
      raise jax.errors.JaxRuntimeError("no memory")
    return compile_chunk(sizes, length, config)

  monkeypatch.setattr(itl, "_compile_chunk", refuse_short)
  dense = ModelConfig(**_MODEL, param_dtype="bfloat16")
  monkeypatch.setattr(itl, "models_at", lambda sizes, length: {"dense": dense})
  sizes = itl.Sizes(_MODEL, (32, 64), (16,), chunk=2, rounds=1, read_bytes=2**20)
  results = Results(tmp_path / "paper.jsonl")
  assert run_jobs(list(itl.make_jobs(Inputs(None, []), sizes)), results, origin="random") == 1
  assert [one["length"] for one in results.all()] == [64]
  assert sorted(compiled) == [32, 64]  # Once for all jobs.


def test_tables_of_itl_have_the_papers_times_beside_ours(tmp_path: Path):
  def result(length: int, milliseconds: dict[str, float]) -> dict[str, Any]:
    kinds = {
      name: {"seconds": [ms / 1e3] * 3, "floor_seconds": ms / 2e3, "live_bytes": ms}
      for name, ms in milliseconds.items()
    }
    return {"length": length, "kinds": kinds}

  at_16k = {"dense": 10.0, "DGA, m = 2": 8.0, "DGA, m = 16": 5.0, "StreamingLLM": 4.0}
  results = [result(16384, at_16k), result(4096, {"dense": 6.0, "DGA, m = 16": 4.5})]
  text = itl_report.write(results, tmp_path)
  assert "| dense | 36.87 | 69.70 | 6.000 (2.00) | 10.000 (2.00) |" in text
  assert "| StreamingLLM | 40.00 | 78.28 |  | 4.000 (2.00) |" in text
  assert "| MInference | 93.13 | 94.34 |  |  |" in text
  assert "| 2 | 80.0% | 55.0% | 8.000 (2.00) | 1.25 | 53.0 | 1.32 | 9.53 | 5.68 | 5.40 |" in text
  assert "| 16 | 50.0% | 15.8% | 5.000 (2.00) | 2.00 | 28.8 | 2.42 | 6.81 | 3.61 | 3.58 |" in text
  assert (tmp_path / "itl.png").is_file()


def test_parts_of_the_op_are_its_steps():
  shape = Shape(L=48, H=4, N=2, D=16, dtype="float32")
  arrays = shape.tokens(jax.random.key(0))
  config = DGAConfig(group_size=4, importance_rate=0.25, min_focal_tokens=0)
  layout, visibility = jax.jit(lambda x: choice(config, x))(arrays)
  sources = jax.jit(lambda x: summaries(config, x))(arrays)
  # γL = 12 focal tokens, and 9 groups of 4 of the other 36.
  assert layout.focal_index.shape == (1, 2, 12)
  assert layout.member_index.shape == (1, 2, 9, 4)
  for head, index_r in enumerate(layout.focal_index[0]):
    want_rxD = arrays[1][0, index_r, head]
    np.testing.assert_array_equal(sources.focal.key[0, :, head], want_rxD)
  assert visibility.focal_end.shape[-1] == 48
  out = jax.jit(lambda x: whole_op(config, None, x))(arrays)
  assert out.shape == arrays[0].shape


@pytest.fixture
def profiles(monkeypatch: pytest.MonkeyPatch) -> None:
  """A profile without a GPU: every profile has three seconds of kernels."""

  def take_profile(run: Callable[[], Any]) -> Profile:
    jax.block_until_ready(run())
    return Profile(3.0, 0.0, 0.0, {})

  monkeypatch.setattr(reordering, "take_profile", take_profile)


@pytest.mark.usefixtures("profiles")
def test_reordering_measures_its_parts_and_a_second_run_measures_nothing(tmp_path: Path):
  sizes = reordering.Sizes((Shape(64, 2, 2, 16),), rounds=1, repeats=2)
  jobs = list(reordering.make_jobs(Inputs(None, []), sizes))
  assert run_jobs(jobs, Results(tmp_path / "paper.jsonl"), origin="random") == 0
  again = Results(tmp_path / "paper.jsonl")
  assert run_jobs([dataclasses.replace(jobs[0], run=None)], again, origin="random") == 0
  (result,) = again.all()
  assert {name: [*parts] for name, parts in result["parts"].items()} == {
    "global": ["op", "summaries", "choice"], "streaming": ["op", "summaries"],
  }  # fmt: skip
  every = [seconds for parts in result["parts"].values() for seconds in parts.values()]
  assert every == [[1.5] * 3] * 5  # Two calls in a profile.


def test_table_of_reordering_has_the_authors_share_beside_ours(tmp_path: Path):
  parts = {
    "global": {"op": [4e-3], "summaries": [1e-3], "choice": [0.8e-3]},
    "streaming": {"op": [3e-3], "summaries": [0.3e-3]},
  }
  text = reordering.write([{"length": 16384, "kv_heads": 32, "parts": parts}], tmp_path)
  assert "| 16384 | 32 | 15.8% | 1.000 of 4.000 | 25.0% | 0.300 of 3.000 | 10.0% | 5.0% |" in text
  assert (tmp_path / "reordering.png").is_file()


@pytest.mark.usefixtures("profiles")
def test_a_shape_that_does_not_compile_leaves_the_others(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  def programs_of(shape: Shape) -> dict[tuple[str, str], Any]:
    def run(x: jax.Array) -> jax.Array:
      if shape.L == 32:
        raise ValueError("no such kernel")
      return x

    program = TimedProgram(jax.jit(run), jax.jit(lambda key: (jax.random.normal(key),)))
    return {("global", "op"): program, ("streaming", "op"): program}

  monkeypatch.setattr(reordering, "programs_of", programs_of)
  sizes = reordering.Sizes((Shape(32, 2, 2, 16), Shape(64, 2, 2, 16)), rounds=1, repeats=1)
  results = Results(tmp_path / "paper.jsonl")
  jobs = list(reordering.make_jobs(Inputs(None, []), sizes))
  assert run_jobs(jobs, results, origin="random") == 1
  assert [one["length"] for one in results.all()] == [64]


@pytest.mark.parametrize("part", ["itl", "reordering"])
def test_without_a_gpu_a_part_says_what_it_needs(part: str, capsys: pytest.CaptureFixture[str]):
  if jax.devices()[0].platform == "gpu":
    pytest.skip("The device is a GPU.")
  assert not list(registry.PARTS[part].make_jobs(Inputs(None, [])))
  assert f"Part {part} is left out: it needs a GPU with" in capsys.readouterr().out


def test_scores_of_the_paper_have_those_of_the_runs_beside_them():
  ours = {
    "dense": {"retrieval, 8192": 60.0, "RULER's needles": 50.0},
    "global": {"retrieval, 8192": 18.0},
    "budgets_quarter": {"retrieval, 8192": 57.0},
  }
  text = published_scores.table(ours)
  dga = "| DGA | 21.1 (97%) | 35.0 (94%) | 27.4 (75%) | 25.6 (76%) | 22.6 (84%) | 18.0 (30%) |  |"
  assert dga in text
  assert "| MInference | 21.6 (100%) | 29.2 (78%) | 24.8 (68%) | 23.6 (70%) | 17.0 (63%) |" in text
  assert "| dense | 21.7 (100%) |" in text
  assert "60.0 (100%) | 50.0 (100%) |" in text
  assert published_scores.table({"budgets_quarter": ours["budgets_quarter"]}) == ""


def test_table_7_has_our_loss_of_complementary_tokens_beside_it():
  def result(loss: float) -> dict[str, Any]:
    return {"loss": [loss], "decoded_loss": [loss + 1], "accuracy": [0.25]}

  by_name = {"paper": result(0.0), "no complementary tokens": result(1.0)}
  text = ablations_report._complementary(by_name)
  assert "| with | 1.00 | 2.72 | 25.0% |  | 21.14 | 6.81 | 57.90 | 28.80 |" in text
  assert "| without | 2.72 | 7.39 | 25.0% |  | 20.33 | 8.47 | 53.69 | 24.90 |" in text
  assert ablations_report._complementary({"paper": result(0.0)}) == ""

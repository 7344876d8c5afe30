"""Tests of benchmarks/paper.py: every measured quantity against its definition, and the report."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks._forward import (
  chunked_causal_attention,
  embed,
  relative_noise,
  run_layers,
)
from benchmarks.paper_parts import (
  ablations,
  ablations_report,
  convergence,
  noise,
  registry,
  sparsity,
  theorems,
  training,
)
from benchmarks.paper_parts.inputs import Ablation, Inputs
from dga_jax.attention.dense import xla_attention
from dga_jax.evaluation.jobs import Job, run_jobs
from dga_jax.evaluation.losses import teacher_forced
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.variants import Variant
from tests.dga_jax.evaluation.tiny import family, write_checkpoint, write_documents


def test_statistics_of_rows_follow_their_definitions():
  rng = np.random.default_rng(0)
  L, H, N, D = 150, 4, 2, 8
  q, k = (3 * rng.standard_normal(shape).astype(np.float32) for shape in ((3, H, D), (L, N, D)))
  position = np.array([120, 140, 149])
  got = sparsity.row_statistics(jnp.asarray(q), jnp.asarray(k), jnp.asarray(position))
  for row, head in np.ndindex(3, H):
    n = position[row] + 1
    logits = k[:n, head // (H // N)].astype(np.float64) @ q[row, head].astype(np.float64)
    a = np.exp(logits / math.sqrt(D) - (logits / math.sqrt(D)).max())
    a /= a.sum()
    sharp = np.exp(logits - logits.max())
    descending = np.sort(a)[::-1]
    want = {
      "largest": a.max(),
      "largest_unscaled": (sharp / sharp.sum()).max(),
      "largest_without_sinks": a[4:].max() / a[4:].sum(),
      "first": a[0],
      "sinks": a[:4].sum(),
      "window": a[max(4, n - 128) :].sum(),
      "top_1_percent": descending[: math.ceil(0.01 * n)].sum(),
      "top_10_percent": descending[: math.ceil(0.1 * n)].sum(),
    }
    for name, value in want.items():
      np.testing.assert_allclose(got[name][row, head], value, rtol=1e-4, err_msg=name)


def test_a_row_is_sparse_if_a_weight_exceeds_the_level():
  largest = np.array([0.1, 0.11, 0.2, 0.0999]).reshape(1, 1, 2, 2)
  # The level is 1/(nρ): 0.1 for 100 keys and 0.05 for 200 keys.
  assert sparsity.p_sparse(largest, np.array([100, 200]), 0.1) == 0.75


def test_a_length_is_taken_from_the_shortest_pieces():
  def result(piece: int, rows: int, value: float, lengths: tuple[int, ...]) -> dict:
    by_length = [
      {"length": n, "rows": rows, "mass": {"first": value}, "p_sparse": {"largest": {"0.1": value}}}
      for n in lengths
    ]
    return {"length": piece, "by_length": by_length}

  merged = sparsity.merge_lengths(
    [
      result(200, 10, 1.0, (100, 200)),
      result(200, 30, 0.0, (100,)),
      result(400, 10, 0.5, (100, 400)),
    ]
  )
  assert {n: (one["rows"], one["mass"]["first"]) for n, one in merged.items()} == {
    100: (40, 0.25), 200: (10, 1.0), 400: (10, 0.5),
  }  # fmt: skip


def test_chunked_attention_is_causal_attention():
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 37, 4, 8))
  got = chunked_causal_attention(q, k[:, :, :2], v[:, :, :2], chunk=10)
  want = xla_attention(q, k[:, :, :2], v[:, :, :2], is_causal=True)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_bounds_of_theorem_1():
  """The printed bound is 1 where the probability is 0. The other bound holds and is not empty."""
  values = theorems.sparsity_bound(300, np.random.default_rng(0))
  assert all(one["printed"] == 1 for one in values)
  assert values[0]["measured"] == 0
  assert all(one["bound"] <= one["measured"] + 0.06 for one in values)
  assert max(one["bound"] for one in values) > 0.8


def test_condition_numbers_of_groups():
  """Even weights keep κ for L ≤ D, by interlacing of eigenvalues, and not for L > D."""
  rng = np.random.default_rng(0)
  for _ in range(20):
    V = rng.standard_normal((16, 24))
    grouped = theorems.merge(V, np.zeros(16), 4)
    np.testing.assert_allclose(grouped, V.reshape(4, 4, 24).mean(axis=1))
    assert theorems.condition_number(grouped) < theorems.condition_number(V)
  V = rng.standard_normal((256, 24))
  grouped = theorems.merge(V, np.zeros(256), 4)
  assert theorems.condition_number(grouped) > theorems.condition_number(V)
  eigenvalues = np.linalg.eigvalsh(V.T @ V)
  want = eigenvalues[-1] / eigenvalues[0]
  np.testing.assert_allclose(theorems.condition_number(V), want)


def test_descent_lowers_the_loss_to_its_minimum():
  V, y = convergence.make_problem(256, np.random.default_rng(0))
  dense = convergence.gradient_descent(V, y, 300)
  np.testing.assert_allclose(dense[0], np.square(V.mean(axis=0) - y).sum())
  assert (np.diff(dense) <= 1e-12).all()
  assert dense[-1] < 1e-6 * dense[0]
  grouped = theorems.merge(V, np.zeros(256), 16)
  solution = np.linalg.lstsq(grouped.T, y, rcond=None)[0]
  least = np.square(solution @ grouped - y).sum()
  end = convergence.gradient_descent(grouped, y, 300)[-1]
  np.testing.assert_allclose(end, least, rtol=1e-6)
  mirror = convergence.mirror_descent(grouped, y, 300)
  assert (np.diff(mirror) <= 1e-12).all()
  assert least < mirror[-1] < 0.9 * mirror[0]


def test_layers_with_noise_of_size_0_are_the_model():
  model = family(attention="dense").model(Variant("dense", {"attention": "dense"}), 20)
  tokens = np.arange(20)[None] % 7
  kind = model.config.make_attention()
  states, layers = run_layers(
    model, embed(model, tokens), lambda q, k, v, _, layer: (kind(q, k, v), layer)
  )
  np.testing.assert_allclose(states, model.hidden(tokens), rtol=1e-5, atol=1e-5)
  assert layers.tolist() == [0, 1]
  graphdef, params = nnx.split(model)
  key = jax.random.key(0)
  clean = noise._states(graphdef, params, tokens, 0.0, 0.0, key)
  np.testing.assert_allclose(clean, states, rtol=1e-5, atol=1e-5)
  assert abs(float(noise._divergence(graphdef, params, clean, clean))) < 1e-6
  small, large = (
    float(
      noise._divergence(
        graphdef, params, clean, noise._states(graphdef, params, tokens, 0.0, size, key)
      )
    )
    for size in (0.01, 0.1)
  )
  assert 0 < small < large


def test_noise_has_the_relative_size():
  x = 3 * jax.random.normal(jax.random.key(0), (100, 100))
  noise = relative_noise(jax.random.key(1), x, jnp.float32(0.2))
  np.testing.assert_allclose(noise.std(), 0.6, rtol=0.03)


def test_loss_and_accuracy_of_ablations():
  one = family(attention="dense")
  tokens = jax.random.randint(jax.random.key(0), (1, 65), 0, 257)
  graphdef = one.graphdef(Variant("dense", {"attention": "dense"}), 64)
  nats, right = ablations._measure(graphdef, one.params, tokens)
  want = teacher_forced(graphdef, one.params, tokens)[0]
  np.testing.assert_allclose(nats, want, rtol=1e-5)
  logits = nnx.merge(graphdef, one.params)(tokens[:, :-1])[0]
  assert right.tolist() == (logits.argmax(axis=1) == tokens[0, 1:]).tolist()


def test_the_loss_in_decoding_and_the_times_of_all_settings(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(ablations, "_DECODED", 8)
  monkeypatch.setattr(
    ablations, "variants", lambda: {"dense": None, "m = 4": ablations._config(group_size=4)}
  )
  inputs = Inputs(
    str(write_checkpoint(tmp_path / "run")),
    [str(write_documents(tmp_path))],
    ablation=Ablation(length=64, latency_batch=2),
  )
  results = Results(tmp_path / "paper.jsonl")
  assert run_jobs(list(ablations.make_jobs(inputs)), results, origin="tiny") == 0
  dense, merged, times = results.all()
  assert dense["model"] == ablations.PRETRAINED
  rows = inputs.rows("novels", 64, 1)
  want = teacher_forced(inputs.family.graphdef(Variant("dense"), 64), inputs.family.params, rows)
  np.testing.assert_allclose(dense["decoded_loss"], want[:, -8:].mean(axis=1), rtol=1e-4)
  assert (times["variant"], times["batch"]) == (ablations.TIMES, 2)
  assert list(times["times"]) == ["dense", "m = 4"]
  assert all(seconds > 0 for own in times["times"].values() for seconds in own.values())
  ratio = math.exp(np.mean(merged["decoded_loss"]) - np.mean(dense["decoded_loss"]))
  token = f"{1e3 * times['times']['m = 4']['token_seconds']:.2f}"
  text = ablations_report.write(results.all(), tmp_path)
  assert re.search(rf"\| m = 4 .*\| {ratio:.3f} \| [0-9.]+ \| {token} \|", text)
  # The settings of another model, without times.
  other = str(write_checkpoint(tmp_path / "other", scale=0.5))
  inputs.ablation = Ablation(length=64, models=(other,))
  (job, _) = ablations.make_jobs(inputs)
  result = job.fields | job.run(lambda: None)
  assert (result["model"], result["variant"]) == ("other", "dense")
  own = inputs.trained_family(other)
  want = teacher_forced(own.graphdef(Variant("dense"), 64), own.params, rows)
  np.testing.assert_allclose(result["loss"], want[:, 32:].mean(axis=1), rtol=1e-5)


@pytest.fixture
def small_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Job]]:
  """Jobs of every part at the smallest size, on a tiny model."""
  monkeypatch.setattr(sparsity, "LENGTHS", (100, 200))
  inputs = Inputs(
    str(write_checkpoint(tmp_path / "run")),
    [str(write_documents(tmp_path))],
    ablation=Ablation(length=64),
  )
  settings = training.Training(2, rows=1, length=40, validation_rows=1, every=1)
  return {
    "theorems": list(theorems.make_jobs(inputs, draws=20)),
    "convergence": list(convergence.make_jobs(inputs, lengths=(64,), steps=10, draws=1)),
    "training": list(training.make_jobs(inputs, settings, seeds=(0,)))[:1],
    "cache": list(registry.PARTS["cache"].make_jobs(inputs)),
    "sparsity": list(sparsity.make_jobs(inputs, ((200, 1),)))[:1],
    "ablations": list(ablations.make_jobs(inputs))[:2],
    "noise": list(noise.make_jobs(inputs, length=64))[:1],
  }


def test_the_report_has_every_part_and_a_second_run_measures_nothing(
  tmp_path: Path, small_jobs: dict[str, list[Job]]
):
  # These parts have tests of their own.
  others = {"itl", "reordering", "shares", "continued"}
  assert [*small_jobs] == [name for name in registry.PARTS if name not in others]
  jobs = [job for own in small_jobs.values() for job in own]
  out = tmp_path / "out"
  results = Results(out / "paper.jsonl")
  assert run_jobs(jobs, results, origin="tiny") == 0
  again = Results(out / "paper.jsonl")
  assert run_jobs([dataclasses.replace(job, run=None) for job in jobs], again, origin="tiny") == 0
  for result in again.all():
    assert result["environment"]["versions"]["jax"] == jax.__version__
  registry.write_report(again.all(), out)
  text = (out / "paper.md").read_text()
  assert [line[3:].lower() for line in text.splitlines() if line.startswith("## ")] == [*small_jobs]
  assert "656" not in text
  assert "664 (0.32 GB)" in text
  pictures = {path.stem for path in out.glob("*.png")}
  assert pictures == {
    "theorems", "convergence", "training", "sparsity", "sinks_novels", "ablations", "noise",
  }  # fmt: skip

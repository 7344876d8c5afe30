"""Measurements of heads and of sets, stored as JSON lines so that a killed run continues."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dga_jax.calibration.candidates import label
from dga_jax.calibration.program import AssignedDecoder, Measured
from dga_jax.calibration.rows import Batch, Rows
from dga_jax.evaluation.results import Results
from dga_jax.head_budgets import FULL, HeadSetting
from dga_jax.model import Decoder

_AHEAD = 8  # Measurements that the device may be ahead of the file.

Measure = Literal["divergence", "loss"]
type Tick = Callable[[], Any]
# A key of the file; and layer, KV head and candidate.
type _Job = tuple[str, tuple[int, int, int]]


class RowSet(NamedTuple):
  """The two kinds of rows that calibration measures.

  Attributes:
    text: long texts; the loss of the second half counts.
    retrieval: prompts with a hidden fact; the loss of the answer counts.
  """

  text: Rows
  retrieval: Rows


class SetLoss(NamedTuple):
  """Losses of one assignment.

  Attributes:
    text: mean loss in nats per token.
    retrieval: mean loss of an answer's tokens in nats per token.
    found: answers that greedy decoding gives.
    questions: answers in all.
    divergence: from dense attention.
  """

  text: float
  retrieval: float
  found: int
  questions: int
  divergence: "Divergence"


class Divergence(NamedTuple):
  """Mean Kullback-Leibler divergence from dense attention in nats; see `program.Measured`.

  Attributes:
    text: per token.
    retrieval: per token of an answer.
  """

  text: float
  retrieval: float


class HeadRises(NamedTuple):
  """The rise of the divergence or of the loss when one KV head alone leaves a base set.

  Each head follows each candidate. The base of the profile is the set of full heads.

  Attributes:
    text: nats per token, [layers, KV heads, candidates]; 0 for the candidate of the base.
    retrieval: likewise.
  """

  text: Float[np.ndarray, "K N C"]
  retrieval: Float[np.ndarray, "K N C"]


def open_results(path: Path, settings: Mapping[str, Any], flag: str = "--output") -> Results:
  """The file of measurements, whose first line holds everything that they depend on.

  Args:
    path: a .jsonl file, which is created if it is missing.
    settings: JSON values.
    flag: that names the file or its folder, for errors.

  Raises:
    ValueError: the file was measured with other settings.
  """
  results = Results(path)
  wanted = json.loads(json.dumps(dict(settings)))  # Lists for tuples, as they are read.
  if "settings" not in results:
    if results.all():
      raise ValueError(
        f"{path} does not begin with what its results were measured with; give another {flag}, or "
        "move the file away."
      )
    results.add("settings", {"settings": wanted})
  stored = results["settings"]["settings"]
  for name in sorted({*stored, *wanted}):
    if stored.get(name) != wanted.get(name):
      raise ValueError(
        f"{path} was measured with {name}={stored.get(name)!r:.200}, and this run has"
        f" {name}={wanted.get(name)!r:.200}: repeat the earlier flags, give another {flag}, or"
        " delete the file."
      )
  return results


class Measurer:
  """Measures losses of a model and stores each one as soon as it is known.

  Args:
    model: the decoder.
    candidates: settings of a KV head; "full" is the first.
    results: the file of measurements.
    batch_size: rows that run together.
    later: settings that `add_candidates` will add. The programs have their blocks from the start,
      so that adding them compiles nothing.
    measure: what rises: the divergence from dense attention, or the loss, whose rise has more noise
      and is below 0 where a set predicts better than dense attention, as beyond the trained length.

  Attributes:
    candidates: settings that the compiled program has.
    shape: layers and KV heads.

  Raises:
    ValueError: the first candidate is not "full".
  """

  def __init__(
    self,
    model: Decoder,
    candidates: Sequence[HeadSetting],
    results: Results,
    batch_size: int,
    measure: Measure = "divergence",
    later: Iterable[HeadSetting] = (),
  ) -> None:
    if candidates[0] != FULL:
      raise ValueError(f"candidates[0] is {candidates[0]!r}; it must be {FULL!r}.")
    self.candidates = tuple(candidates)
    self._model, self._results, self._batch_size = model, results, batch_size
    self._rising, self._later = measure, tuple(later)
    self._decoder = AssignedDecoder(model, candidates, self._later)
    self._dense: dict[str, Array] = {}
    self.shape = (model.config.num_layers, model.config.num_kv_heads)

  def add_candidates(self, settings: Iterable[HeadSetting]) -> None:
    """Adds settings to the candidates; a new block size compiles a program, a window does not."""
    candidates = tuple(dict.fromkeys((*self.candidates, *settings)))
    if candidates != self.candidates:
      self.candidates = candidates
      self._decoder = AssignedDecoder(self._model, candidates, self._later)

  def missing(
    self, rows: RowSet, wanted: Bool[np.ndarray, "K N C"], base: Int[np.ndarray, "K N"]
  ) -> int:
    """How often `measure_heads` calls `tick`."""
    return sum(
      key not in self._results
      for name, one in rows._asdict().items()
      for batch, _ in enumerate(one.batches(self._batch_size))
      for key, _ in self._jobs(name, batch, wanted, base)
    )

  def measure_heads(
    self,
    rows: RowSet,
    wanted: Bool[np.ndarray, "K N C"],
    base: Int[np.ndarray, "K N"],
    tick: Tick = lambda: None,
  ) -> HeadRises:
    """One KV head at a time under a candidate, while all other heads follow the base set.

    A head of layer l needs the layers from l on alone: the state of the base set before layer l is
    kept while the heads of this layer are measured. So a measurement takes half of a forward pass
    on average.

    Args:
      rows: of the calibration.
      wanted: which candidates of which heads are measured; the rises of the others are NaN.
      base: the candidate of every head of the base set.
      tick: called after every measurement that the file lacked.

    Raises:
      FloatingPointError: a loss is NaN or infinite.
    """
    whole = self._values(self.measure_set(rows, self.candidates, base))
    is_base = np.arange(wanted.shape[-1]) == base[..., None]
    rises = []
    for name, one in rows._asdict().items():
      total = np.where(wanted, 0.0, np.nan)
      for index, (count, batch) in enumerate(one.batches(self._batch_size)):
        jobs = self._jobs(name, index, wanted, base)
        self._measure_batch(jobs, base, count, batch, tick)
        for key, at in jobs:
          total[at] += sum(self._results[key][self._rising])
      rises.append(np.where(is_base, 0, total / len(one) - getattr(whole, name)))
    return HeadRises(*rises)

  def measure_set(
    self, rows: RowSet, candidates: Sequence[HeadSetting], assignment: Int[np.ndarray, "K N"]
  ) -> SetLoss:
    """The losses of one assignment.

    Args:
      rows: any rows.
      candidates: the settings that `assignment` counts, all among the candidates of the measurer.
      assignment: the setting of each KV head.

    Raises:
      FloatingPointError: a loss is NaN or infinite.
    """
    losses, divergence, found = {}, {}, 0
    for name, one in rows._asdict().items():
      measured = self.measure_rows(name, one, candidates, assignment)
      losses[name] = float(np.mean(measured["loss"]))
      divergence[name] = float(np.mean(measured["divergence"]))
      found = sum(map(sum, measured["found"]))
    questions = len(rows.retrieval) * rows.retrieval.questions
    return SetLoss(**losses, found=found, questions=questions, divergence=Divergence(**divergence))

  def rise_of_set(
    self, rows: RowSet, candidates: Sequence[HeadSetting], assignment: Int[np.ndarray, "K N"]
  ) -> Divergence:
    """The rise of one assignment over dense attention; the arguments are those of `measure_set`."""
    own = self._values(self.measure_set(rows, candidates, assignment))
    dense = self._values(self.measure_set(rows, (FULL,), np.zeros(self.shape, int)))
    return Divergence(own.text - dense.text, own.retrieval - dense.retrieval)

  def _values(self, measured: SetLoss) -> Divergence:
    """The divergences or the losses."""
    if self._rising == "divergence":
      return measured.divergence
    return Divergence(measured.text, measured.retrieval)

  def measure_rows(
    self,
    name: str,
    rows: Rows,
    candidates: Sequence[HeadSetting],
    assignment: Int[np.ndarray, "K N"],
  ) -> dict[str, Any]:
    """The losses of each row under one assignment.

    Args:
      name: of the rows, for the file.
      rows: any rows.
      candidates: as for `measure_set`.
      assignment: likewise.

    Returns:
      "loss" and "divergence", of each row; "found", of each row and question.

    Raises:
      FloatingPointError: a loss is NaN or infinite.
    """
    own = np.array([self.candidates.index(one) for one in candidates])[assignment]
    key = f"set {name} {self._describe(own)} {rows.digest}"
    if key not in self._results:
      self._results.add(key, self._run_set(rows, own))
    return self._results[key]

  def _describe(self, assignment: Int[np.ndarray, "K N"]) -> str:
    """A hash of the settings of all heads."""
    settings = [[repr(self.candidates[index]) for index in row] for row in assignment]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

  def _measure_batch(
    self,
    jobs: Sequence[_Job],
    base: Int[np.ndarray, "K N"],
    count: int,
    batch: Batch,
    tick: Tick,
  ) -> None:
    """Measures what the file lacks of one batch; the jobs are in the order of their layers."""
    layers = self.shape[0]
    state: Array | None = None
    reached = 0
    # The device computes while results of earlier jobs are written.
    pending: list[tuple[str, Measured]] = []
    for key, (layer, head, candidate) in jobs:
      if key in self._results:
        continue
      if state is None:
        state, dense = self._decoder.embed(batch.tokens), self._dense_states(batch)
      state, reached = self._decoder.run_layers(state, base, reached, layer), layer
      assignment = base.copy()
      assignment[layer, head] = candidate
      end = self._decoder.run_layers(state, assignment, layer, layers)
      pending.append((key, self._measure(end, dense, batch)))
      while len(pending) > _AHEAD:
        self._store(*pending.pop(0), batch, count)
        tick()
    for key, measured in pending:
      self._store(key, measured, batch, count)
      tick()

  def _store(self, key: str, measured: Measured, batch: Batch, count: int) -> None:
    self._results.add(key, as_json(measured, batch, count))

  def _measure(self, end: Array, dense: Array, batch: Batch) -> Measured:
    """The losses of a batch from the output of the last layer."""
    return self._decoder.measure(self._decoder.target_states(end, batch), dense, batch)

  def _dense_states(self, batch: Batch) -> Array:
    """The states that predict the targets under dense attention; kept for the next batches."""
    arrays = (batch.tokens, batch.position)
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in arrays)).hexdigest()
    if digest not in self._dense:
      full = np.zeros(self.shape, int)
      end = self._decoder.run_layers(self._decoder.embed(batch.tokens), full, 0, self.shape[0])
      self._dense[digest] = self._decoder.target_states(end, batch)
    return self._dense[digest]

  def _jobs(
    self, name: str, batch: int, wanted: Bool[np.ndarray, "K N C"], base: Int[np.ndarray, "K N"]
  ) -> list[_Job]:
    """The key, and layer, head and candidate of each wanted measurement of a batch."""
    beside = f" beside {self._describe(base)}" if base.any() else ""
    jobs = []
    for at in zip(*np.nonzero(wanted), strict=True):
      layer, head, candidate = map(int, at)
      if candidate != base[layer, head]:
        setting = label(self.candidates[candidate])
        key = f"head {name} batch {batch} layer {layer} head {head} {setting}{beside}"
        jobs.append((key, (layer, head, candidate)))
    return jobs

  def _run_set(self, rows: Rows, assignment: Int[np.ndarray, "K N"]) -> dict[str, list[Any]]:
    total: dict[str, list[Any]] = {"loss": [], "divergence": [], "found": []}
    for count, batch in rows.batches(self._batch_size):
      embedded = self._decoder.embed(batch.tokens)
      end = self._decoder.run_layers(embedded, assignment, 0, self.shape[0])
      measured = self._measure(end, self._dense_states(batch), batch)
      for field, values in as_json(measured, batch, count).items():
        total[field] += values
    return total


def as_json(measured: Measured, batch: Batch, count: int) -> dict[str, list[Any]]:
  """The first `count` rows as JSON values; "found" says of each question whether it is answered.

  Raises:
    FloatingPointError: a loss is NaN or infinite.
  """
  loss, divergence = (np.asarray(x)[:count].tolist() for x in (measured.loss, measured.divergence))
  if not all(map(math.isfinite, loss + divergence)):
    raise FloatingPointError(
      "the loss is NaN or infinite; if the model's dtype is float16, activations overflow above"
      " 65504: use bfloat16 or float32"
    )
  is_right, weight, question = (
    np.asarray(x)[:count] for x in (measured.is_right, batch.weight, batch.question)
  )
  found = [
    (is_right | (weight == 0) | (question != one)).all(axis=1) for one in range(question.max() + 1)
  ]
  return {
    "loss": loss,
    "divergence": divergence,
    "found": np.stack(found, axis=1).tolist(),
  }

"""Measurements of heads and of sets, stored as JSON lines so that a killed run continues."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dga_jax.calibration.candidates import label
from dga_jax.calibration.program import AssignedDecoder, Measured
from dga_jax.calibration.rows import Batch, Rows
from dga_jax.evaluation.results import Results
from dga_jax.head_budgets import FULL, HeadSetting
from dga_jax.model import Decoder

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
    prompts: answers in all.
  """

  text: float
  retrieval: float
  found: int
  prompts: int


class HeadRises(NamedTuple):
  """The rise of the loss when one KV head alone leaves a base set and follows a candidate.

  The base of the profile is the set of full heads.

  Attributes:
    text: nats per token, [layers, KV heads, candidates]; 0 for the candidate of the base.
    retrieval: likewise.
  """

  text: Float[np.ndarray, "K N C"]
  retrieval: Float[np.ndarray, "K N C"]


def open_results(path: Path, settings: Mapping[str, Any]) -> Results:
  """The file of measurements, whose first line holds everything that they depend on.

  Args:
    path: a .jsonl file, which is created if it is missing.
    settings: JSON values.

  Raises:
    ValueError: the file was measured with other settings.
  """
  results = Results(path)
  wanted = json.loads(json.dumps(dict(settings)))  # Lists for tuples, as they are read.
  if "settings" not in results:
    if results.all():
      raise ValueError(f"{path} is not a file of calibration measurements; give another --output.")
    results.add("settings", {"settings": wanted})
  stored = results["settings"]["settings"]
  for name in sorted({*stored, *wanted}):
    if stored.get(name) != wanted.get(name):
      raise ValueError(
        f"{path} was measured with {name}={stored.get(name)!r:.200}, and this run has"
        f" {name}={wanted.get(name)!r:.200}: repeat the earlier flags, give another --output, or"
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

  Attributes:
    candidates: settings that the compiled program has.
    shape: layers and KV heads.

  Raises:
    ValueError: the first candidate is not "full".
  """

  def __init__(
    self, model: Decoder, candidates: Sequence[HeadSetting], results: Results, batch_size: int
  ) -> None:
    if candidates[0] != FULL:
      raise ValueError(f"candidates[0] is {candidates[0]!r}; it must be {FULL!r}.")
    self.candidates = tuple(candidates)
    self._model, self._results, self._batch_size = model, results, batch_size
    self._decoder = AssignedDecoder(model, candidates)
    self.shape = (model.config.num_layers, model.config.num_kv_heads)

  def add_candidates(self, settings: Iterable[HeadSetting]) -> None:
    """Adds settings to the candidates; later measurements compile one program with all of them."""
    candidates = tuple(dict.fromkeys((*self.candidates, *settings)))
    if candidates != self.candidates:
      self.candidates = candidates
      self._decoder = AssignedDecoder(self._model, candidates)

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
    whole = self.measure_set(rows, self.candidates, base)
    is_base = np.arange(wanted.shape[-1]) == base[..., None]
    rises = []
    for name, one in rows._asdict().items():
      total = np.where(wanted, 0.0, np.nan)
      for index, (count, batch) in enumerate(one.batches(self._batch_size)):
        jobs = self._jobs(name, index, wanted, base)
        self._measure_batch(jobs, base, count, batch, tick)
        for key, at in jobs:
          total[at] += sum(self._results[key]["loss"])
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
    losses, found = {}, 0
    own = np.array([self.candidates.index(one) for one in candidates])[assignment]
    for name, one in rows._asdict().items():
      key = f"set {name} {self._describe(own)} {one.digest}"
      if key not in self._results:
        self._results.add(key, self._run_set(one, own))
      losses[name] = float(np.mean(self._results[key]["loss"]))
      found = sum(self._results[key]["found"])
    return SetLoss(losses["text"], losses["retrieval"], found, len(rows.retrieval))

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
    for key, (layer, head, candidate) in jobs:
      if key in self._results:
        continue
      if state is None:
        state = self._decoder.embed(batch.tokens)
      state, reached = self._decoder.run_layers(state, base, reached, layer), layer
      assignment = base.copy()
      assignment[layer, head] = candidate
      end = self._decoder.run_layers(state, assignment, layer, layers)
      self._results.add(key, as_json(self._decoder.measure(end, batch), count))
      tick()

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
    total: dict[str, list[Any]] = {"loss": [], "found": []}
    for count, batch in rows.batches(self._batch_size):
      embedded = self._decoder.embed(batch.tokens)
      end = self._decoder.run_layers(embedded, assignment, 0, self.shape[0])
      for field, values in as_json(self._decoder.measure(end, batch), count).items():
        total[field] += values
    return total


def as_json(measured: Measured, count: int) -> dict[str, list[Any]]:
  """The first `count` rows as JSON values.

  Raises:
    FloatingPointError: a loss is NaN or infinite.
  """
  loss = np.asarray(measured.loss)[:count].tolist()
  if not all(map(math.isfinite, loss)):
    raise FloatingPointError(
      "the loss is NaN or infinite; if the model's dtype is float16, activations overflow above"
      " 65504: use bfloat16 or float32"
    )
  return {"loss": loss, "found": np.asarray(measured.found)[:count].tolist()}

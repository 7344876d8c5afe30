"""The perplexity task: one variant on rows of one length, as a record for JSON."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dga_jax.evaluation.losses import batches, decoded, fill, restarted, teacher_forced
from dga_jax.evaluation.variants import Family, Variant


@dataclasses.dataclass(frozen=True)
class PerplexitySettings:
  """What is measured on rows of documents.

  Attributes:
    batch_size: rows that run together.
    targets: last tokens of each row on which the rule of decoding is compared with teacher
      forcing, and on which the restart control is taken.
    contexts: lengths of the restart control, in tokens before the targets.
    buckets: equal pieces of a row over which the loss by position is averaged.
    always_decode: whether the rule of decoding is measured even where it is the same function as
      over whole sequences. Otherwise the record says so and holds one figure twice.
  """

  batch_size: int = 1
  targets: int = 256
  contexts: Sequence[int] = ()
  buckets: int = 16
  always_decode: bool = True


def measure_perplexity(
  family: Family,
  variant: Variant,
  rows: Int[np.ndarray, "B L+1"],
  settings: PerplexitySettings,
  tick: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
  """Losses of one variant.

  Args:
    rows: from `token_rows`; they begin as documents do.
    tick: called after every batch of every part, for a progress bar; `parts` says how many.

  Returns:
    "loss" and "perplexity" over all positions with "standard_error" of the loss over rows;
    "by_position"; "last", the same target tokens teacher-forced and by the rule of decoding;
    "restart", the loss on these tokens with less context; the cache's "budget"; "seconds".
  """
  length = rows.shape[1] - 1
  graphdef = family.graphdef(variant, length)
  begin = time.perf_counter()

  def over_batches(program: Callable[..., Array], rows: np.ndarray) -> Float[np.ndarray, "B T"]:
    results = []
    for batch in batches(rows, settings.batch_size):
      results.append(np.asarray(program(fill(batch, settings.batch_size)))[: len(batch)])
      tick()
    return np.concatenate(results).astype(np.float64)

  loss_BxL = over_batches(lambda batch: teacher_forced(graphdef, family.params, batch), rows)
  record = summarise(loss_BxL, settings.buckets)
  decoded_BxT = loss_BxL[:, -settings.targets :]
  measured = settings.always_decode or not family.decodes_as_whole(variant, length)
  if measured:
    decoded_BxT = over_batches(
      lambda batch: decoded(graphdef, family.params, batch, settings.targets), rows
    )
  record["last"] = compare_last(loss_BxL, decoded_BxT) | {"measured_by_decoding": measured}
  record["restart"] = [
    {"context": context, "loss": _restart_loss(family, graphdef, rows, context, settings, tick)}
    for context in settings.contexts
  ]
  record["budget"] = dataclasses.asdict(family.budget(variant, length))
  record["seconds"] = time.perf_counter() - begin
  return record


def parts(
  family: Family, variant: Variant, length: int, num_rows: int, settings: PerplexitySettings
) -> int:
  """How often `measure_perplexity` ticks."""
  decode = settings.always_decode or not family.decodes_as_whole(variant, length)
  return -(-num_rows // settings.batch_size) * (1 + decode + len(settings.contexts))


def summarise(loss_BxL: Float[np.ndarray, "B L"], buckets: int) -> dict[str, Any]:
  """Means over everything, and over equal pieces of the rows."""
  B, L = loss_BxL.shape
  edges = np.unique(np.linspace(0, L, min(buckets, L) + 1).round().astype(int))
  by_row_B = loss_BxL.mean(axis=1)
  return {
    "length": L,
    "rows": B,
    "loss": float(by_row_B.mean()),
    "perplexity": float(np.exp(by_row_B.mean())),
    "standard_error": float(by_row_B.std(ddof=1) / np.sqrt(B)) if B > 1 else None,
    "loss_by_row": by_row_B.tolist(),
    "by_position": [
      {"from": int(start), "to": int(end), "loss": float(loss_BxL[:, start:end].mean())}
      for start, end in itertools.pairwise(edges)
    ],
  }


def compare_last(
  loss_BxL: Float[np.ndarray, "B L"], decoded_BxT: Float[np.ndarray, "B T"]
) -> dict[str, Any]:
  """The last tokens of the rows: over the whole sequence, and as decoding finds them."""
  T = decoded_BxT.shape[1]
  whole_BxT = loss_BxL[:, -T:]
  return {
    "targets": T,
    "teacher_forced_loss": float(whole_BxT.mean()),
    "decoded_loss": float(decoded_BxT.mean()),
    "largest_difference": float(np.abs(whole_BxT - decoded_BxT).max()),
  }


def _restart_loss(
  family: Family,
  graphdef: nnx.GraphDef,
  rows: np.ndarray,
  context: int,
  settings: PerplexitySettings,
  tick: Callable[[], Any],
) -> float:
  """Under the settings of whole rows: a share of the keys stays as many keys."""
  short = restarted(rows, context, settings.targets, family.start_ids)
  total = 0.0
  for batch in batches(short, settings.batch_size):
    loss = teacher_forced(graphdef, family.params, fill(batch, settings.batch_size))
    total += float(np.asarray(loss)[: len(batch), -settings.targets :].sum())
    tick()
  return total / (len(rows) * settings.targets)

"""The perplexity task: the result of one variant on rows of one length."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from dga_jax.evaluation.losses import batches, decoded, fill, restarted, teacher_forced
from dga_jax.evaluation.variants import Family, Variant


@dataclasses.dataclass(frozen=True)
class PerplexitySettings:
  """What the perplexity task measures on rows of documents.

  Attributes:
    batch_size: rows that run together.
    targets: last tokens of each row that are decoded token by token, for a comparison with the loss
      over whole sequences, and that the restart control measures.
    contexts: tokens of context before the targets in the restart control.
    buckets: pieces of equal length over which the loss by position is averaged.
    always_decode: whether the targets are decoded even if decoding computes the same function as
      whole sequences. Otherwise "measured_by_decoding" is False, and both losses are the same
      number.
  """

  batch_size: int = 1
  targets: int = 256
  contexts: Sequence[int] = ()
  buckets: int = 16
  always_decode: bool = True


def measure_perplexity(
  family: Family,
  variant: Variant,
  rows: Int[np.ndarray, "B T"],
  settings: PerplexitySettings,
  tick: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
  """The losses of one variant, in nats per token.

  Args:
    family: the model.
    variant: the attention kind and its settings.
    rows: from `token_rows`.
    settings: what is measured.
    tick: called after every batch, `parts` times in all, for a progress bar.

  Returns:
    "loss" and "perplexity" over all positions, and "standard_error" of the loss over rows;
    "by_position"; "last", the loss of the target tokens over whole sequences and in decoding, with
    the standard error of the latter;
    "restart", the loss of the target tokens with less context; "budget" of the cache; "seconds".

  Raises:
    FloatingPointError: a loss is NaN or infinite.
  """
  length = rows.shape[1] - 1
  graphdef = family.graphdef(variant, length)
  begin = time.perf_counter()

  def over_batches(program: Callable[..., Array], rows: np.ndarray) -> Float[np.ndarray, "B T"]:
    results = []
    for batch in batches(rows, settings.batch_size):
      results.append(np.asarray(program(fill(batch, settings.batch_size)))[: len(batch)])
      tick()
    return _finite(np.concatenate(results).astype(np.float64), variant)

  def over_whole_rows(batch: Array) -> Array:
    return teacher_forced(graphdef, family.params, batch)

  def with_context(context: int) -> dict[str, float | None]:
    """The loss of the targets with less context; a budget in keys stays that of whole rows."""
    short = restarted(rows, context, settings.targets, family.start_ids)
    return _mean(over_batches(over_whole_rows, short)[:, -settings.targets :])

  loss_BxL = over_batches(over_whole_rows, rows)
  result = summarise(loss_BxL, settings.buckets)
  decoded_BxT = loss_BxL[:, -settings.targets :]
  measured = settings.always_decode or not family.decodes_as_whole(variant, length)
  if measured:
    decoded_BxT = over_batches(
      lambda batch: decoded(graphdef, family.params, batch, settings.targets), rows
    )
  result["last"] = compare_last(loss_BxL, decoded_BxT) | {"measured_by_decoding": measured}
  result["restart"] = [
    {"context": context, **with_context(context)} for context in settings.contexts
  ]
  result["budget"] = dataclasses.asdict(family.budget(variant, length))
  result["seconds"] = time.perf_counter() - begin
  return result


def parts(
  family: Family, variant: Variant, length: int, num_rows: int, settings: PerplexitySettings
) -> int:
  """How often `measure_perplexity` calls `tick`."""
  decode = settings.always_decode or not family.decodes_as_whole(variant, length)
  return -(-num_rows // settings.batch_size) * (1 + decode + len(settings.contexts))


def summarise(loss_BxL: Float[np.ndarray, "B L"], buckets: int) -> dict[str, Any]:
  """Mean losses over all tokens, by row, and over `buckets` pieces of the rows."""
  B, L = loss_BxL.shape
  edges = np.unique(np.linspace(0, L, min(buckets, L) + 1).round().astype(int))
  by_row_B = loss_BxL.mean(axis=1)
  return {
    "length": L,
    "rows": B,
    "loss": float(by_row_B.mean()),
    "perplexity": float(np.exp(by_row_B.mean())),
    "standard_error": _mean(loss_BxL)["standard_error"],
    "loss_by_row": by_row_B.tolist(),
    "by_position": [
      {"from": int(start), "to": int(end), **_mean(loss_BxL[:, start:end])}
      for start, end in itertools.pairwise(edges)
    ],
  }


def compare_last(
  loss_BxL: Float[np.ndarray, "B L"], decoded_BxT: Float[np.ndarray, "B T"]
) -> dict[str, Any]:
  """The losses of the rows' last tokens over whole sequences and in decoding, compared."""
  T = decoded_BxT.shape[1]
  whole_BxT = loss_BxL[:, -T:]
  return {
    "targets": T,
    "teacher_forced_loss": float(whole_BxT.mean()),
    "decoded_loss": float(decoded_BxT.mean()),
    "standard_error": _mean(decoded_BxT)["standard_error"],
    "largest_difference": float(np.abs(whole_BxT - decoded_BxT).max()),
  }


def _mean(loss_BxT: Float[np.ndarray, "B T"]) -> dict[str, float | None]:
  """The mean loss, and its standard error over rows, None for one row."""
  by_row_B = loss_BxT.mean(axis=1)
  B = len(by_row_B)
  error = float(by_row_B.std(ddof=1) / np.sqrt(B)) if B > 1 else None
  return {"loss": float(by_row_B.mean()), "standard_error": error}


def _finite(loss: Float[np.ndarray, "..."], variant: Variant) -> Float[np.ndarray, "..."]:
  if not np.isfinite(loss).all():
    raise FloatingPointError(
      f"the loss of {variant.name!r} is NaN or infinite; if its dtype is float16, activations"
      " overflow above 65504: use bfloat16 or float32"
    )
  return loss

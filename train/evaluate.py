"""Held-out loss: per token, per byte, and by position in the context."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from dga_jax.attention.segments import find_documents
from dga_jax.tokenizer import Tokenizer
from train.config import TrainConfig
from train.data.config import DataKind
from train.sharding import batch_sharding, replicated
from train.step import Batch, batch_losses, Functions, micro_batches

# The first bucket of positions; each further one is as long as all before it.
_FIRST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Means over the held-out tokens that have a loss.

  Attributes:
    loss: nats per token.
    accuracy: share of the targets that the model finds most likely.
    bits_per_byte: loss per byte of text, comparable between tokenizers; of sound per sample.
    loss_by_position: nats per token by position in the document: a key is the first position of
      its bucket, which ends before the next key. Buckets without a token are missing.
    loss_by_corpus: nats per token of each corpus; empty for a single corpus.
  """

  loss: float
  accuracy: float
  bits_per_byte: float
  loss_by_position: dict[int, float]
  loss_by_corpus: dict[str, float] = dataclasses.field(default_factory=dict)

  def to_dict(self) -> dict[str, Any]:
    """The fields for metrics.jsonl, with "eval_" before their names."""
    values = dataclasses.asdict(self)
    if not self.loss_by_corpus:
      del values["loss_by_corpus"]
    return {f"eval_{name}": value for name, value in values.items()}

  @classmethod
  def mean(cls, by_corpus: Mapping[str, Self], weights: Sequence[float]) -> Self:
    """The mean over corpora by their weights, a bucket of positions over those that have it."""
    evaluations = list(by_corpus.values())

    def mean(values: Sequence[float | None]) -> float:
      pairs = [(w, x) for w, x in zip(weights, values, strict=True) if x is not None]
      return sum(w * x for w, x in pairs) / sum(w for w, _ in pairs)

    starts = sorted({start for one in evaluations for start in one.loss_by_position})
    return cls(
      loss=mean([one.loss for one in evaluations]),
      accuracy=mean([one.accuracy for one in evaluations]),
      bits_per_byte=mean([one.bits_per_byte for one in evaluations]),
      loss_by_position={
        start: mean([one.loss_by_position.get(start) for one in evaluations]) for start in starts
      },
      loss_by_corpus={name: one.loss for name, one in by_corpus.items()},
    )


type EvalStep = Callable[[PyTree[Array], Batch], dict[str, Array]]


def make_eval_step(config: TrainConfig, functions: Functions, tokenizer: Tokenizer) -> EvalStep:
  """A jitted function (params, batch) -> sums: by bucket of positions, and of bytes."""
  bytes_V = token_lengths(tokenizer, config.model.vocab_size, config.data.kind)
  starts_K = bucket_starts(config.data.sequence_length)

  def sums(params: PyTree[Array], batch: Batch) -> dict[str, Array]:
    loss_BxL, correct_BxL = batch_losses(config, functions.graphdef, params, batch)
    mask_BxL = batch["loss_mask"]
    B, L = mask_BxL.shape
    position_BxL = find_documents(B, L, None, batch["segment_ids"]).position
    bucket_BxL = jnp.searchsorted(starts_K, position_BxL, side="right") - 1

    def by_bucket(x_BxL: Array) -> Array:
      return jnp.zeros(len(starts_K)).at[bucket_BxL].add(jnp.where(mask_BxL, x_BxL, 0.0))

    return {
      "loss": by_bucket(loss_BxL),
      "tokens": by_bucket(jnp.ones_like(loss_BxL)),
      "correct": jnp.sum(correct_BxL & mask_BxL),
      "bytes": jnp.sum(jnp.asarray(bytes_V)[batch["targets"]], where=mask_BxL),
    }

  def eval_step(params: PyTree[Array], batch: Batch) -> dict[str, Array]:
    with jax.sharding.use_abstract_mesh(functions.mesh.abstract_mesh):
      per_micro_batch = jax.lax.map(lambda one: sums(params, one), micro_batches(config, batch))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), per_micro_batch)

  shardings = (functions.shardings.params, batch_sharding(functions.mesh))
  return jax.jit(eval_step, in_shardings=shardings, out_shardings=replicated(functions.mesh))


def evaluate_corpora(
  config: TrainConfig,
  functions: Functions,
  eval_step: EvalStep,
  params: PyTree[Array],
  held_out: Mapping[str, Iterable[Any]],
) -> Evaluation:
  """`evaluate` on every corpus; of several corpora the mean by `config.data.weights`."""
  by_corpus = {
    name: evaluate(config, functions, eval_step, params, batches)
    for name, batches in held_out.items()
  }
  if not config.data.weights:
    (evaluation,) = by_corpus.values()
    return evaluation
  return Evaluation.mean(by_corpus, config.data.weights)


def evaluate(
  config: TrainConfig,
  functions: Functions,
  eval_step: EvalStep,
  params: PyTree[Array],
  batches: Iterable[Any],
) -> Evaluation:
  """Evaluates on the first `eval_batches` held-out batches, the same ones every time."""
  first = itertools.islice(batches, config.eval_batches)
  # All batches are dispatched before the first result is waited for.
  results = jax.device_get([eval_step(params, functions.shard_batch(batch)) for batch in first])
  totals = {
    name: np.sum([sums[name] for sums in results], axis=0, dtype=float) for name in results[0]
  }
  tokens = max(1.0, float(totals["tokens"].sum()))
  loss = float(totals["loss"].sum())
  return Evaluation(
    loss=loss / tokens,
    accuracy=float(totals["correct"]) / tokens,
    bits_per_byte=loss / math.log(2) / max(1.0, float(totals["bytes"])),
    loss_by_position={
      int(start): float(loss_sum / count)
      for start, loss_sum, count in zip(
        bucket_starts(config.data.sequence_length), totals["loss"], totals["tokens"], strict=True
      )
      if count
    },
  )


def bucket_starts(length: int) -> Int[np.ndarray, "K"]:
  """First positions of the buckets: 0, 16, 32, 64, ... below `length`."""
  doublings = max(0, math.ceil(math.log2(length / _FIRST_BUCKET)))
  return np.array([0, *(_FIRST_BUCKET << i for i in range(doublings))], np.int32)


def token_lengths(
  tokenizer: Tokenizer, vocab_size: int, kind: DataKind = "text"
) -> Int[np.ndarray, "V"]:
  """Bytes of data per token: 0 for the end token and for ids that the tokenizer lacks.

  A token of sound is one byte, a μ-law sample.
  """
  lengths_V = np.zeros(vocab_size, np.int32)
  known = [len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)]
  if kind == "audio":
    known = [min(1, length) for length in known]
  lengths_V[: len(known)] = known
  return lengths_V

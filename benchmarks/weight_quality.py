"""Quality of weights in 8 bits: perplexity, and agreement with the tokens of unquantized weights.

  ./workspace bench weight_quality --workdir=runs/smollm2 --documents=novels.jsonl --length=2048

Every document gives one row of --length tokens. Perplexity is that of the row's second half.
Agreement is the share of the positions of that half at which the most likely token is the one of
unquantized weights, after the same tokens. Then each row's first half is continued by --new_tokens
most likely tokens; the table has the mean number of tokens before a continuation differs.
"""

import math
from collections.abc import Sequence
from typing import Any, cast, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks.timing import environment
from dga_jax.choices import AttentionName, DtypeName, WeightName
from dga_jax.evaluation.texts import read_documents
from dga_jax.files.path_flags import define_path, define_paths
from dga_jax.generation import ContinuousBatching, Request, Sampling
from dga_jax.loading import load
from dga_jax.model import Decoder
from train.loss import token_losses

_WORKDIR = define_path("workdir", None, "folder of the model", required=True)
_DOCUMENTS = define_paths("documents", "files with id and text, .jsonl, or .txt")
_LENGTH = flags.DEFINE_integer("length", 2048, "tokens of a row", lower_bound=4)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 128, "tokens of a continuation", lower_bound=1)
_ATTENTION = flags.DEFINE_string("attention", "dense", "attention kind")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "dtype of the activations")
_WEIGHTS = flags.DEFINE_list("weights", ["int8", "fp8"], "weights to compare with --dtype's")
_CHUNK = 256  # Tokens whose logits exist at a time.


class _Row(NamedTuple):
  """Of one row's second half: losses, the most likely tokens; and the continuation."""

  losses: np.ndarray
  likely: np.ndarray
  continuation: list[int]


def main(argv: list[str]) -> None:
  """Prints one line for each kind of weights."""
  del argv
  print(environment())
  print(f"{_ATTENTION.value}, {_DTYPE.value}, rows of {_LENGTH.value} tokens")
  print("| weights | perplexity | over unquantized | agreement | equal new tokens |")
  print("| --- | --- | --- | --- | --- |")
  wanted: list[_Row] = []
  for name in (None, *_WEIGHTS.value):
    rows = _measure(cast(WeightName | None, name))
    wanted = wanted or rows
    loss, reference = (np.mean([row.losses for row in each]) for each in (rows, wanted))
    pairs = list(zip(rows, wanted, strict=True))
    agreement = np.mean([row.likely == other.likely for row, other in pairs])
    equal = np.mean([_equal(row.continuation, other.continuation) for row, other in pairs])
    print(
      f"| {name or _DTYPE.value} | {math.exp(loss):.4f} | {math.exp(loss - reference):.4f} |"
      f" {agreement:.2%} | {equal:.1f} of {_NEW_TOKENS.value} |",
      flush=True,
    )


def _measure(weights: WeightName | None) -> list[_Row]:
  model, tokenizer = load(
    str(_WORKDIR.value),
    attention=cast(AttentionName, _ATTENTION.value),
    dtype=cast(DtypeName, _DTYPE.value),
    weights=weights,
  )
  rows = []
  for document in read_documents(_DOCUMENTS.value):
    tokens = [*tokenizer.start_ids, *tokenizer.encode(document.text)][: _LENGTH.value + 1]
    if len(tokens) <= _LENGTH.value:
      raise ValueError(f"{document.id} has {len(tokens)} tokens; --length={_LENGTH.value}.")
    rows.append(tokens)
  graphdef, params = nnx.split(model)
  read = jax.jit(lambda params, tokens: _read(nnx.merge(graphdef, params), tokens))
  half = _LENGTH.value // 2
  continuations = _continue(model, [tokens[:half] for tokens in rows])
  measured = []
  for tokens, continuation in zip(rows, continuations, strict=True):
    losses, likely = (np.asarray(x)[0] for x in read(params, jnp.array([tokens])))
    measured.append(_Row(losses, likely, continuation))
  return measured


def _read(model: Decoder, tokens_1xL: jax.Array) -> tuple[jax.Array, jax.Array]:
  half = _LENGTH.value // 2
  states = model.hidden(tokens_1xL[:, :-1])[:, half:]
  losses, _ = token_losses(model.unembedder(), states, tokens_1xL[:, half + 1 :], chunk=_CHUNK)
  likely: Any = jax.lax.map(lambda x: jnp.argmax(model.unembed(x), axis=-1), states[0])
  return losses, likely[None]


def _continue(model: Decoder, prompts: Sequence[list[int]]) -> list[list[int]]:
  greedy = Sampling(temperature=0.0)
  requests = [Request(prompt, _NEW_TOKENS.value, greedy) for prompt in prompts]
  result = ContinuousBatching(model, requests, slots=1, stop_ids=()).run()
  result.raise_if_failed()
  return [list(tokens) for tokens in result.tokens]


def _equal(one: list[int], other: list[int]) -> int:
  """The number of tokens before two continuations differ."""
  pairs = enumerate(zip(one, other, strict=True))
  return next((i for i, (a, b) in pairs if a != b), len(one))


if __name__ == "__main__":
  app.run(main)

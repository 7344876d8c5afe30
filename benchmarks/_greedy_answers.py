"""Greedy answers to prompts of two lengths, each by one compiled program."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from benchmarks._forward import greedy_steps
from dga_jax.evaluation.losses import batches, fill
from dga_jax.tokenizer import Tokenizer


def greedy_answers(
  graphdef: nnx.GraphDef,
  params: Any,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  *,
  new_tokens: Sequence[int],
  batch_size: int,
) -> list[str]:
  """The most likely continuation of each prompt, decoded with the attention kind's cache.

  Prompts are right-padded to one of two lengths, so at most two programs are compiled.

  Args:
    graphdef: of the decoder.
    params: its parameters.
    tokenizer: of the model; a stop token ends an answer.
    prompts: token ids of each prompt.
    new_tokens: most tokens of each answer. The programs decode the largest of these numbers.
    batch_size: prompts that run together.
  """
  most, answers = max(new_tokens), {}
  for indices, length in _by_length(prompts):
    rows = np.zeros((len(indices), length + 1), np.int32)  # The last column is the length.
    for row, index in zip(rows, indices, strict=True):
      row[: len(prompts[index])] = prompts[index]
      row[-1] = len(prompts[index])
    for start, batch in zip(
      range(0, len(rows), batch_size), batches(rows, batch_size), strict=True
    ):
      tokens_BxT = _continue(graphdef, params, fill(batch, batch_size), most)
      for index, row in zip(indices[start:], np.asarray(tokens_BxT), strict=False):
        tokens = row[: new_tokens[index]]
        stops = np.isin(tokens, tokenizer.stop_ids)
        end = int(stops.argmax()) if stops.any() else len(tokens)
        answers[index] = tokenizer.decode(tokens[:end].tolist())
  return [answers[index] for index in range(len(prompts))]


def compile_answers(
  graphdef: nnx.GraphDef,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  new_tokens: Sequence[int],
  batch_size: int,
) -> None:
  """Compiles the programs of `greedy_answers`, which then compiles nothing for these arguments.

  Programs of several decoders compile at the same time in threads.

  Args:
    graphdef: of the decoder.
    params: its parameters, or arrays of their shapes and dtypes.
    prompts: token ids of each prompt.
    new_tokens: as for `greedy_answers`.
    batch_size: likewise.
  """
  for _, length in _by_length(prompts):
    rows = jax.ShapeDtypeStruct((batch_size, length + 1), jnp.int32)
    _continue.lower(graphdef, params, rows, max(new_tokens)).compile()


def _by_length(prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
  """The indices of the prompts up to half of the longest, and of the others; with their length."""
  longest = max(map(len, prompts))
  short = [index for index, prompt in enumerate(prompts) if 2 * len(prompt) <= longest]
  rest = [index for index, prompt in enumerate(prompts) if 2 * len(prompt) > longest]
  return [(indices, size) for indices, size in ((short, longest // 2), (rest, longest)) if indices]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _continue(
  graphdef: nnx.GraphDef, params: Any, rows_BxC: Int[Array, "B C"], new_tokens: int
) -> Int[Array, "B T"]:
  """The `new_tokens` most likely tokens after each prompt, one after another.

  Args:
    graphdef: of the decoder.
    params: its parameters.
    rows_BxC: right-padded prompts of C - 1 tokens, and the length of each in the last column.
    new_tokens: T.
  """
  model = nnx.merge(graphdef, params)
  prompts_BxL, lengths_B = rows_BxC[:, :-1], rows_BxC[:, -1]
  max_length = prompts_BxL.shape[1] + new_tokens
  logits_BxV, cache = model.prefill(prompts_BxL, lengths_B, max_length=max_length)

  first_B = logits_BxV.argmax(axis=-1).astype(jnp.int32)
  later_TxB = greedy_steps(model, first_B, cache, new_tokens - 1)
  return jnp.concatenate([first_B[None], later_TxB]).T

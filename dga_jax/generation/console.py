"""The `generate` command without its flags: load a model, continue prompts, print the texts."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from dga_jax.checkpoint import load_config, load_model
from dga_jax.choices import AttentionName, DtypeName
from dga_jax.generation.continuous_batching import ContinuousBatching, Generation
from dga_jax.generation.requests import Request
from dga_jax.generation.sampling import Sampling
from dga_jax.model import Decoder, ModelConfig
from dga_jax.tokenizer import Tokenizer

_RULE = "-" * 72


class Loaded(NamedTuple):
  """A model from a checkpoint.

  Attributes:
    model: the decoder.
    tokenizer: of the model.
    trained_length: tokens of the longest context that the model was trained on, None if unknown.
  """

  model: Decoder
  tokenizer: Tokenizer
  trained_length: int | None


def load(
  workdir: str,
  step: int | None = None,
  *,
  attention: AttentionName | None = None,
  dtype: DtypeName | None = None,
) -> Loaded:
  """Loads the model of a checkpoint.

  Args:
    workdir: the folder with the checkpoint.
    step: of the checkpoint; None for the newest.
    attention: attention kind in place of the checkpoint's.
    dtype: dtype of the activations in place of the checkpoint's.

  Raises:
    CheckpointError: the checkpoint is missing or damaged.
  """
  saved = load_config(workdir, step)
  changes = {"attention": attention, "dtype": dtype}
  given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
  config = dataclasses.replace(ModelConfig.from_dict(saved["model"]), **given)
  model, _, tokenizer = load_model(workdir, step, config=config)
  return Loaded(model, tokenizer, trained_length(saved))


def trained_length(saved: dict[str, Any]) -> int | None:
  """The longest context, in tokens, of the training of a model; None if it is unknown.

  Args:
    saved: the config of a checkpoint. A model trained here has the sequence length of its data; an
      imported model has what its files state.
  """
  lengths = [
    (saved.get("data") or {}).get("sequence_length"),
    (saved.get("origin") or {}).get("max_position_embeddings"),
  ]
  return max((length for length in lengths if length is not None), default=None)


def make_batch(
  loaded: Loaded,
  texts: Sequence[str],
  sampling: Sampling,
  *,
  max_new_tokens: int,
  max_length: int | None = None,
  slots: int = 8,
  prompt_chunk: int | None = None,
  stream: bool = False,
) -> ContinuousBatching:
  """Compiles the programs that continue the texts; prompt i samples with seed + i.

  Warns on stderr about prompts that are longer than the model's trained context.

  Args:
    loaded: from `load`.
    texts: the prompts.
    sampling: how tokens are sampled.
    max_new_tokens: bound on the tokens of a continuation.
    max_length: bound on the tokens of a prompt and its continuation; None for no bound.
    slots: prompts that run at once.
    prompt_chunk: see `ContinuousBatching`.
    stream: whether every token is delivered at once, instead of a chunk of several.

  Raises:
    ValueError: as `ContinuousBatching`.
  """
  tokenizer = loaded.tokenizer
  prompts = [[*tokenizer.start_ids, *tokenizer.encode(text)] for text in texts]
  _warn_about_long(prompts, loaded.trained_length)
  return ContinuousBatching(
    loaded.model,
    [Request(prompt, max_new_tokens, sampling.with_offset(i)) for i, prompt in enumerate(prompts)],
    slots=slots,
    stop_ids=tokenizer.stop_ids,
    max_length=max_length,
    prompt_chunk=prompt_chunk,
    **({"decode_chunk": 1} if stream else {}),
  )


def print_stream(batch: ContinuousBatching, tokenizer: Tokenizer, prompt: str) -> None:
  """Prints the prompt, the text of each token as soon as it is sampled, and statistics.

  Raises:
    FloatingPointError: the logits are not finite; the text before that has been printed.
  """
  print(prompt, end="", flush=True)
  new = (token for step in batch.steps() for emitted in step for token in emitted.tokens)
  for piece in tokenizer.decode_stream(new):
    print(piece, end="", flush=True)
  print("\n")
  _finish(batch)


def print_all(batch: ContinuousBatching, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
  """Shows progress, then prints every prompt with its continuation, and statistics.

  Raises:
    FloatingPointError: the logits of some prompts are not finite; the others have been printed.
  """
  with tqdm(total=len(prompts), desc="generating", unit="prompt") as bar:
    for step in batch.steps():
      bar.update(sum(emitted.done for emitted in step))
  result = _result(batch)
  for prompt, tokens, failed in zip(prompts, result.tokens, result.failed, strict=True):
    if not failed:
      print(f"{prompt}{tokenizer.decode(tokens)}\n{_RULE}")
  _finish(batch)


def _finish(batch: ContinuousBatching) -> None:
  result = _result(batch)
  print(result.summary())
  result.raise_if_failed()


def _result(batch: ContinuousBatching) -> Generation:
  assert batch.result is not None, "steps() has not been iterated to its end"
  return batch.result


def _warn_about_long(prompts: Sequence[Sequence[int]], trained_length: int | None) -> None:
  if trained_length is None:
    return
  for i, prompt in enumerate(prompts):
    if len(prompt) > trained_length:
      print(
        f"warning: prompt {i} has {len(prompt)} tokens; the model was trained on contexts of at"
        f" most {trained_length} tokens, and may not use the rest well.",
        file=sys.stderr,
      )

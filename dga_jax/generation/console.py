"""The `generate` command without its flags: prompts in, texts or JSON lines out.

Texts and records are printed to stdout. Figures, notes and progress are printed to stderr.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dga_jax.cache_choice import with_smaller_cache
from dga_jax.generation.continuous_batching import ContinuousBatching, Generation
from dga_jax.generation.requests import Request
from dga_jax.generation.sampling import Sampling
from dga_jax.loading import Loaded
from dga_jax.text_generation import Prompt, prompt_tokens
from dga_jax.tokenizer import Tokenizer

_RULE = "-" * 72


def make_batch(
  loaded: Loaded,
  prompts: Sequence[Prompt],
  sampling: Sampling,
  *,
  max_new_tokens: int,
  max_length: int | None = None,
  slots: int = 8,
  prompt_chunk: int | None = None,
  stream: bool = False,
  attention_is_chosen: bool = False,
) -> ContinuousBatching:
  """Compiles the programs that continue the prompts; prompt i samples with seed + i.

  Warns on stderr about prompts that are longer than the model's trained context.

  Args:
    loaded: from `dga_jax.loading`.
    prompts: texts, or messages of conversations.
    sampling: how tokens are sampled.
    max_new_tokens: bound on the tokens of a continuation.
    max_length: bound on the tokens of a prompt and its continuation; None for no bound.
    slots: prompts that run at once.
    prompt_chunk: see `ContinuousBatching`.
    stream: whether every token is delivered at once, instead of a chunk of several.
    attention_is_chosen: see `with_smaller_cache`.

  Raises:
    ValueError: as `ContinuousBatching`, or messages for a model without a chat template.
  """
  tokens = [prompt_tokens(loaded.tokenizer, prompt) for prompt in prompts]
  warn_about_long([len(prompt) for prompt in tokens], loaded.trained_length)
  longest = max(map(len, tokens), default=0) + max_new_tokens
  loaded = with_smaller_cache(loaded, longest, is_chosen=attention_is_chosen)
  return ContinuousBatching(
    loaded.model,
    [Request(prompt, max_new_tokens, sampling.with_offset(i)) for i, prompt in enumerate(tokens)],
    slots=slots,
    stop_ids=loaded.tokenizer.stop_ids,
    max_length=max_length,
    prompt_chunk=prompt_chunk,
    **({"decode_chunk": 1} if stream else {}),
  )


def print_stream(batch: ContinuousBatching, tokenizer: Tokenizer, prompt: Prompt) -> None:
  """Prints a prompt that is a text, then the text of each token as soon as it is sampled.

  Raises:
    FloatingPointError: the logits are not finite; the text before that has been printed.
  """
  print(prompt if isinstance(prompt, str) else "", end="", flush=True)
  new = (token for step in batch.steps() for emitted in step for token in emitted.tokens)
  for piece in tokenizer.decode_stream(new):
    print(piece, end="", flush=True)
  print(flush=True)
  _finish(batch)


def print_all(batch: ContinuousBatching, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> None:
  """Shows progress on a terminal, then prints every prompt that is a text with its continuation.

  Raises:
    FloatingPointError: the logits of some prompts are not finite; the others have been printed.
  """
  _run(batch, len(prompts))
  result = _result(batch)
  for prompt, tokens, failed in zip(prompts, result.tokens, result.failed, strict=True):
    if not failed:
      text = prompt if isinstance(prompt, str) else ""
      print(f"{text}{tokenizer.decode(tokens)}\n{_RULE}")
  _finish(batch)


def print_json_lines(
  batch: ContinuousBatching,
  tokenizer: Tokenizer,
  records: Sequence[Mapping[str, Any]],
  *,
  max_new_tokens: int,
) -> None:
  """Shows progress on a terminal, then prints one JSON object for each prompt, in their order.

  An object has the keys of its record, and "text", "new_tokens" and "finish": "stop" at a stop
  token, "length" at max_new_tokens, "not_finite" at logits that are not finite.

  Args:
    batch: of the records' prompts.
    tokenizer: of the model.
    records: the JSON objects that contain the prompts.
    max_new_tokens: as for `make_batch`.

  Raises:
    FloatingPointError: the logits of some prompts are not finite; all objects have been printed.
  """
  _run(batch, len(records))
  result = _result(batch)
  for record, tokens, failed in zip(records, result.tokens, result.failed, strict=True):
    finish = "not_finite" if failed else "length" if len(tokens) == max_new_tokens else "stop"
    facts = {"text": tokenizer.decode(tokens), "new_tokens": len(tokens), "finish": finish}
    print(json.dumps({**record, **facts}, ensure_ascii=False))
  _finish(batch)


def _run(batch: ContinuousBatching, count: int) -> None:
  with tqdm(total=count, desc="generating", unit="prompt", disable=None) as bar:
    for step in batch.steps():
      bar.update(sum(emitted.done for emitted in step))


def _finish(batch: ContinuousBatching) -> None:
  result = _result(batch)
  print(result.summary(), file=sys.stderr)
  result.raise_if_failed()


def _result(batch: ContinuousBatching) -> Generation:
  assert batch.result is not None, "steps() has not been iterated to its end"
  return batch.result


def warn_about_long(lengths: Sequence[int], trained_length: int | None) -> None:
  """Prints a warning for every prompt that is longer than the trained context.

  Args:
    lengths: tokens of each prompt.
    trained_length: of the model, None if it is unknown.
  """
  if trained_length is None:
    return
  for i, length in enumerate(lengths):
    if length > trained_length:
      print(
        f"warning: prompt {i} has {length} tokens; the model was trained on contexts of at most"
        f" {trained_length} tokens, and may not use the rest well.",
        file=sys.stderr,
      )

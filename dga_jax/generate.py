"""Generates text from a trained checkpoint.

  python -m dga_jax.generate --workdir=runs/quickstart --prompt="def main("

Prompts of a file (--prompt_file, one a line) go through the model --slots at a time; one that ends
makes room for the next, so that a long list keeps the batch full.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from absl import app, flags, logging
from tqdm import tqdm

from dga_jax.checkpoint import CheckpointError, load_config, load_model
from dga_jax.generation import ContinuousBatching, Generation, Request, Sampling
from dga_jax.model import ModelConfig
from dga_jax.model.config import AttentionName
from dga_jax.tokenizer import Tokenizer

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The run's folder, as given to train.main.", required=True
)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; default: the newest.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File of prompts, one a line, UTF-8.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens to generate.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length", None, "Bound on prompt and new tokens together; default: as many as it takes."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer(
  "top_k", 0, "Draw from so many most likely tokens; 0: from all.", lower_bound=0
)
_TOP_P = flags.DEFINE_float("top_p", 0.95, "Draw from the most likely tokens that hold this much.")
_MIN_P = flags.DEFINE_float(
  "min_p", 0.0, "Draw from tokens with this share of the most likely one's probability."
)
_SLOTS = flags.DEFINE_integer(
  "slots", 8, "Prompts under way at once; the cache is made for so many.", lower_bound=1
)
_PROMPT_CHUNK = flags.DEFINE_integer(
  "prompt_chunk",
  None,
  "Read prompts in chunks of so many tokens, to save memory on long ones; default: whole.",
  lower_bound=1,
)
_ATTENTION = flags.DEFINE_enum(
  "attention",
  None,
  get_args(AttentionName),
  "Attention kind, with the checkpoint's settings of it; default: the checkpoint's own.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws; the same seed repeats the text.")


def main(argv: Sequence[str]) -> None:
  """Prints the text as it comes, then one line of figures."""
  if len(argv) > 1:
    raise app.UsageError(f"{argv[1]!r} is no flag; quote prompts that hold spaces.")
  logging.set_verbosity(logging.WARNING)  # The checkpoint library reports every read.
  try:
    texts = read_prompts()
    model, _, tokenizer = load_model(_WORKDIR.value, _STEP.value, config=read_config())
    requests = [
      Request(encode_prompt(tokenizer, text), _MAX_NEW_TOKENS.value, read_sampling(place))
      for place, text in enumerate(texts)
    ]
    batch = ContinuousBatching(
      model,
      requests,
      slots=_SLOTS.value,
      stop_ids=tokenizer.stop_ids,
      max_length=_MAX_LENGTH.value,
      prompt_chunk=_PROMPT_CHUNK.value,
      **({"burst": 1} if _PROMPT_FILE.value is None else {}),
    )
    if _PROMPT_FILE.value is None:
      result = print_as_it_comes(batch, tokenizer, texts[0])
    else:
      result = print_all(batch, tokenizer, texts)
    print(result.summary())
  except (CheckpointError, ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from error


def read_config() -> ModelConfig | None:
  """The checkpoint's model with another attention kind, where one is asked for."""
  if _ATTENTION.value is None:
    return None
  saved = ModelConfig.from_dict(load_config(_WORKDIR.value, _STEP.value)["model"])
  return dataclasses.replace(saved, attention=cast(AttentionName, _ATTENTION.value))


def read_sampling(place: int) -> Sampling:
  """How the prompt at a place of the list is continued; each has a seed of its own."""
  return Sampling(
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    min_p=_MIN_P.value,
    seed=_SEED.value + place,
  )


def read_prompts() -> list[str]:
  """The prompt, or those of the file, one a line; blank lines are none."""
  prompt, path = _PROMPT.value, _PROMPT_FILE.value
  if prompt is not None and path is None:
    return [prompt]
  if prompt is not None or path is None:
    raise app.UsageError("Give one of --prompt and --prompt_file.")
  lines = Path(path).read_text(encoding="utf-8").splitlines()
  texts = [line for line in lines if line.strip()]
  if not texts:
    raise ValueError(f"--prompt_file={path} holds no prompt; write one a line.")
  return texts


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
  """A prompt's tokens, after those that stand before every document."""
  return [*tokenizer.start_ids, *tokenizer.encode(text)]


def print_as_it_comes(batch: ContinuousBatching, tokenizer: Tokenizer, prompt: str) -> Generation:
  """Prints the prompt and each new piece of text at once."""
  print(prompt, end="", flush=True)
  new = (token for step in batch.steps() for emitted in step for token in emitted.tokens)
  for piece in tokenizer.decode_stream(new):
    print(piece, end="", flush=True)
  print("\n")
  assert batch.result is not None
  return batch.result


def print_all(batch: ContinuousBatching, tokenizer: Tokenizer, prompts: list[str]) -> Generation:
  """Shows progress, then prints every prompt with its continuation."""
  with tqdm(total=len(prompts), desc="generating", unit="prompt") as bar:
    for step in batch.steps():
      bar.update(sum(emitted.done for emitted in step))
  result = batch.result
  assert result is not None
  for prompt, tokens in zip(prompts, result.tokens, strict=True):
    print(f"{prompt}{tokenizer.decode(tokens)}\n{'-' * 72}")
  return result


if __name__ == "__main__":
  app.run(main)

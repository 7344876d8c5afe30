"""Generates text from a trained checkpoint.

  python -m dga_jax.generate --workdir=runs/quickstart --prompt="def main("

Prompts of a file (--prompt_file, one a line) go through the model together, as one ragged batch.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from absl import app, flags, logging
from tqdm import tqdm

from dga_jax.checkpoint import CheckpointError, load_config, load_model
from dga_jax.generation import Generation, Generator
from dga_jax.model import ModelConfig
from dga_jax.model.config import AttentionName
from dga_jax.sampling import Sampling
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
_TOP_P = flags.DEFINE_float("top_p", 0.95, "Draw from the most likely tokens that hold this much.")
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
    sampling = Sampling(_TEMPERATURE.value, _TOP_P.value, _SEED.value)
    model, _, tokenizer = load_model(_WORKDIR.value, _STEP.value, config=read_config())
    generator = Generator(
      model,
      [encode_prompt(tokenizer, text) for text in texts],
      max_new_tokens=_MAX_NEW_TOKENS.value,
      sampling=sampling,
      end_id=tokenizer.end_id,
      max_length=_MAX_LENGTH.value,
    )
    if _PROMPT_FILE.value is None:
      result = print_as_it_comes(generator, tokenizer, texts[0])
    else:
      result = print_batch(generator, tokenizer, texts)
    print(result.summary())
  except (CheckpointError, ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from error


def read_config() -> ModelConfig | None:
  """The checkpoint's model with another attention kind, where one is asked for."""
  if _ATTENTION.value is None:
    return None
  saved = ModelConfig.from_dict(load_config(_WORKDIR.value, _STEP.value)["model"])
  return dataclasses.replace(saved, attention=cast(AttentionName, _ATTENTION.value))


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


def print_as_it_comes(generator: Generator, tokenizer: Tokenizer, prompt: str) -> Generation:
  """Prints the prompt and each new piece of text at once."""
  print(prompt, end="", flush=True)
  new = (step[0] for step in generator.steps())
  for piece in tokenizer.decode_stream(token for token in new if token is not None):
    print(piece, end="", flush=True)
  print("\n")
  assert generator.result is not None
  return generator.result


def print_batch(generator: Generator, tokenizer: Tokenizer, prompts: list[str]) -> Generation:
  """Shows progress, then prints every prompt with its continuation."""
  for _ in tqdm(generator.steps(), total=_MAX_NEW_TOKENS.value, desc="generating", unit="step"):
    pass
  result = generator.result
  assert result is not None
  for prompt, tokens in zip(prompts, result.tokens, strict=True):
    print(f"{prompt}{tokenizer.decode(tokens)}\n{'-' * 72}")
  return result


if __name__ == "__main__":
  app.run(main)

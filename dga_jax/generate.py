"""Continues prompts with a trained or imported model.

  dga generate --workdir=runs/quickstart --prompt="def main("

--prompt prints the text as it is generated. --prompt_file continues all prompts of a file, one a
line, with continuous batching: --slots prompts run at once, and a finished prompt frees its slot
for the next one.
"""

from pathlib import Path
from typing import cast, get_args

from absl import app, flags

from dga_jax import command_line
from dga_jax.choices import AttentionName, DtypeName
from dga_jax.prompts import check_text, read_prompts

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder with the checkpoint.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "UTF-8 file with one prompt a line.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 128, "Largest number of tokens to generate for a prompt.", lower_bound=1
)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length", None, "Bound on the tokens of a prompt and its continuation; default: no bound."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from the k most likely tokens; 0: from all.")
_TOP_P = flags.DEFINE_float(
  "top_p", 0.95, "Sample from the smallest set of tokens whose probability is at least p."
)
_MIN_P = flags.DEFINE_float(
  "min_p", 0.0, "Sample from tokens with at least this share of the highest probability."
)
_SLOTS = flags.DEFINE_integer(
  "slots", 8, "Prompts that run at once; sets the size of the cache.", lower_bound=1
)
_PROMPT_CHUNK = flags.DEFINE_integer(
  "prompt_chunk",
  None,
  "Prefill in chunks of this many tokens, to save memory on long prompts; default: no chunks.",
  lower_bound=1,
)
_ATTENTION = flags.DEFINE_enum(
  "attention",
  None,
  get_args(AttentionName),
  "Attention kind, with the checkpoint's settings for it; default: the checkpoint's kind.",
)
_BUDGETS = command_line.define_budgets()
_DTYPE = flags.DEFINE_enum(
  "dtype", None, get_args(DtypeName), "Dtype of the activations; default: the checkpoint's."
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of sampling, 0 to 4294967295; the same seed repeats the text."
)


def main() -> None:
  """Generates by the flags and prints the texts and one line of statistics."""
  texts = _read_texts()
  if _BUDGETS.value is not None and _ATTENTION.value is not None:
    raise app.UsageError("Give one of --attention and --budgets.")

  from dga_jax.generation import console
  from dga_jax.generation.sampling import Sampling
  from dga_jax.head_budgets import read_head_budgets
  from dga_jax.model import apply_budgets

  sampling = Sampling(
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    min_p=_MIN_P.value,
    seed=_SEED.value,
  )
  loaded = console.load(
    str(_WORKDIR.value),
    _STEP.value,
    attention=cast(AttentionName | None, _ATTENTION.value),
    dtype=cast(DtypeName | None, _DTYPE.value),
  )
  if _BUDGETS.value is not None:
    budgets = read_head_budgets(_BUDGETS.value)
    loaded = loaded._replace(model=apply_budgets(loaded.model, budgets))
  batch = console.make_batch(
    loaded,
    texts,
    sampling,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    max_length=_MAX_LENGTH.value,
    slots=_SLOTS.value,
    prompt_chunk=_PROMPT_CHUNK.value,
    stream=_PROMPT_FILE.value is None,
  )
  if _PROMPT_FILE.value is None:
    console.print_stream(batch, loaded.tokenizer, texts[0])
  else:
    console.print_all(batch, loaded.tokenizer, texts)


def _read_texts() -> list[str]:
  if _PROMPT.value is not None and _PROMPT_FILE.value is None:
    return [check_text(_PROMPT.value, "--prompt")]
  if _PROMPT.value is not None or _PROMPT_FILE.value is None:
    raise app.UsageError("Give one of --prompt and --prompt_file.")
  return read_prompts(Path(_PROMPT_FILE.value))


if __name__ == "__main__":
  command_line.run(main)

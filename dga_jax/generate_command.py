r"""Continues prompts, answers messages and questions, with any model.

  dga generate --workdir=runs/quickstart --prompt="def main("
  dga generate --workdir=runs/llama --chat --prompt="What is RoPE?"
  dga generate --workdir=runs/llama --interactive
  dga generate --workdir=runs/llama --chat --context=report.txt \
    --question="Who wrote it?" --question="When?"
  dga generate --workdir=runs/audio --prompt_audio=in.wav \
    --output_audio=out.wav --seconds=2

Prompts: --prompt prints the text as it is generated. --prompt_from reads one
prompt from a whole file. --prompt_file reads one prompt from each line; --slots
prompts run at once, and a finished prompt frees its slot for the next one. With
--chat a prompt is a message, which the model's chat template turns into a text.
--interactive reads messages from the terminal.

Documents: --context reads a document once, and each --question is answered from
its cache. --save_cache stores the cache in a file, which --load_cache reads in
place of the document.

Budgets: --budgets gives each KV head its own setting of attention. Of several
files for the same weights, --keys=0.25 chooses the one for a quarter of the
bytes of a dense cache.

Texts are printed to stdout, with --jsonl as one JSON object a line. Figures and
notes are printed to stderr.
"""

import sys
from pathlib import Path
from typing import Any, cast, get_args, TYPE_CHECKING

from absl import app, flags

from dga_jax import command_line
from dga_jax.choices import AttentionName, CacheDtypeName, DtypeName, WeightName
from dga_jax.files.path_flags import define_path
from dga_jax.files.whole_file import check_writable
from dga_jax.flag_help import FlagGroups
from dga_jax.hub_names import check_exists
from dga_jax.prompts import check_text, read_json_lines, read_prompts, read_text

if TYPE_CHECKING:
  from dga_jax.generation import Sampling
  from dga_jax.loading import Loaded

_GROUPS = FlagGroups()

_GROUPS.start("Model")
_WORKDIR = define_path(
  "workdir", None, "Folder of a checkpoint, a Hugging Face folder, or a GGUF file.", required=True
)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_ATTENTION = flags.DEFINE_enum(
  "attention",
  None,
  get_args(AttentionName),
  "Attention kind, with the checkpoint's settings for it; default: the checkpoint's kind, or dense"
  " attention where the cache of DGA would be larger.",
)
_BUDGETS = command_line.define_budgets()
_KEYS = flags.DEFINE_float(
  "keys",
  None,
  "Share of a dense cache. Of several --budgets=FILE,FILE, or of the files budgets*.json in"
  " WORKDIR, or of those of the package for an imported SmolLM2-135M, use the largest budgets that"
  " keep at most this share of --max_length tokens; without that flag, of the trained context.",
  lower_bound=1e-6,
  upper_bound=1.0,
)
_DTYPE = flags.DEFINE_enum(
  "dtype", None, get_args(DtypeName), "Dtype of the activations; default: the checkpoint's."
)
_WEIGHTS = command_line.define_weights()
_CACHE_DTYPE = command_line.define_cache_dtype()

_GROUPS.start("Prompts")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; with --chat, message to answer.")
_PROMPT_FROM = define_path(
  "prompt_from", None, "UTF-8 file that is one prompt as a whole; - for standard input."
)
_PROMPT_FILE = define_path(
  "prompt_file",
  None,
  'UTF-8 file with one prompt a line, or .jsonl file with an object a line that has "prompt" or'
  ' "messages".',
)
_CHAT = flags.DEFINE_bool("chat", False, "Use the chat template of the model.")
_SYSTEM = flags.DEFINE_string(
  "system", None, "With --chat or --interactive: system message; default: the template's own."
)
_INTERACTIVE = flags.DEFINE_bool(
  "interactive", False, "Conversation in the terminal; the cache continues from turn to turn."
)

_GROUPS.start("One document, several questions")
_CONTEXT = define_path(
  "context", None, "UTF-8 file with a document that the questions are about; - for standard input."
)
_QUESTION = flags.DEFINE_multi_string(
  "question", [], "Question about the document; give the flag once for each question."
)
_SAVE_CACHE = define_path("save_cache", None, "File for the cache of --context.")
_LOAD_CACHE = define_path("load_cache", None, "File of --save_cache to read in place of --context.")

_GROUPS.start("Sound")
_PROMPT_AUDIO = define_path("prompt_audio", None, "Audio file to continue (WAV, FLAC).")
_PROMPT_SECONDS = flags.DEFINE_float(
  "prompt_seconds",
  None,
  "Continue the last seconds of --prompt_audio; default: the whole file.",
  lower_bound=0.01,
)
_OUTPUT_AUDIO = define_path("output_audio", None, "WAV file for the continuation.")
_SECONDS = flags.DEFINE_float(
  "seconds", 2.0, "Length of the continuation of --prompt_audio, in seconds.", lower_bound=0.01
)
_SPECTROGRAM = define_path(
  "spectrogram", None, "File for a plot of --prompt_audio and its continuation, .png or .svg."
)

_GROUPS.start("Length, sampling and output")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 128, "Largest number of tokens to generate for a prompt.", lower_bound=1
)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length", None, "Bound on the tokens of a prompt and its continuation; default: no bound."
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature",
  None,
  "Divides the logits before sampling; 0 takes the most likely token. Default: 0.8, for sound 1.",
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from the k most likely tokens; 0: from all.")
_TOP_P = flags.DEFINE_float(
  "top_p",
  None,
  "Sample from the smallest set of tokens whose probability is at least p; default: 0.95, for sound"
  " 1.",
)
_MIN_P = flags.DEFINE_float(
  "min_p", 0.0, "Sample from tokens with at least this share of the highest probability."
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of sampling, 0 to 4294967295; the same seed repeats the text."
)
_JSONL = flags.DEFINE_bool("jsonl", False, "Print one JSON object a line for each prompt.")

_GROUPS.start("Memory")
_SLOTS = flags.DEFINE_integer(
  "slots",
  8,
  "Prompts of --prompt_file that run at once; the cache has as many rows.",
  lower_bound=1,
)
_PROMPT_CHUNK = flags.DEFINE_integer(
  "prompt_chunk",
  None,
  "Prefill in chunks of this many tokens, to save memory on long prompts; default: no chunks.",
  lower_bound=1,
)


def main() -> None:
  """Generates by the flags."""
  _check_flags()
  for output in (_SAVE_CACHE, _OUTPUT_AUDIO, _SPECTROGRAM):
    if output.value is not None:
      check_writable(output.value)
  document = None if _CONTEXT.value is None else read_text(_CONTEXT.value)
  is_other = _is_about_a_document() or _INTERACTIVE.value or _PROMPT_AUDIO.value is not None
  records = [] if is_other else _read_records()
  check_exists(Path(str(_WORKDIR.value)), "checkpoint, Hugging Face folder or GGUF file")

  from dga_jax.generation import Sampling
  from dga_jax.loading import load_with_facts
  from dga_jax.pretrained import calibration_note

  # In a pause the next sample is almost certain, so a bound on the probability would never end it.
  temperature, top_p = (1.0, 1.0) if _PROMPT_AUDIO.value is not None else (0.8, 0.95)
  sampling = Sampling(
    temperature=temperature if _TEMPERATURE.value is None else _TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=top_p if _TOP_P.value is None else _TOP_P.value,
    min_p=_MIN_P.value,
    seed=_SEED.value,
  )
  # Budgets of --keys are applied to a model without budgets.
  attention = "dense" if _KEYS.value is not None else _ATTENTION.value
  loaded = load_with_facts(
    str(_WORKDIR.value),
    step=_STEP.value,
    attention=cast(AttentionName | None, attention),
    dtype=cast(DtypeName | None, _DTYPE.value),
    budgets=None if _KEYS.value is not None else command_line.read_budgets(_BUDGETS),
    cache_dtype=None if _KEYS.value is not None else _cache_dtype(),
  )
  if _KEYS.value is not None:
    loaded = _with_budgets(loaded, _KEYS.value)
  elif loaded.is_imported and (note := calibration_note(loaded.model.config, str(_WORKDIR.value))):
    print(note, file=sys.stderr)
  if _WEIGHTS.value is not None:
    from dga_jax.model import quantize_weights

    model = quantize_weights(loaded.model, cast(WeightName, _WEIGHTS.value))
    loaded = loaded._replace(model=model)
  if _PROMPT_AUDIO.value is not None:
    _continue_audio(loaded, sampling)
  elif _INTERACTIVE.value:
    from dga_jax.chat.console import converse

    converse(loaded, sampling, max_new_tokens=_MAX_NEW_TOKENS.value, system=_SYSTEM.value)
  elif _is_about_a_document():
    _answer(loaded, sampling, document)
  else:
    _continue(loaded, sampling, records)


def _with_budgets(loaded: "Loaded", keys: float) -> "Loaded":
  """The model with the budgets for a share of the dense cache; names their file on stderr."""
  from dga_jax.budget_choice import choose_budgets, find_budget_files
  from dga_jax.model import apply_budgets
  from dga_jax.pretrained import package_budget_files

  length = _MAX_LENGTH.value or loaded.trained_length
  if length is None:
    raise ValueError(
      "--keys is a share of the cache of whole sequences, and the model does not state the length "
      "of its training; give --max_length."
    )
  package = package_budget_files(loaded.model.config) if loaded.is_imported else []
  files = find_budget_files(str(_WORKDIR.value), _BUDGETS.value, package)
  path, budgets, share = choose_budgets(files, keys, length)
  print(f"budgets: {path}, {share:.1%} of a dense cache of {length} tokens", file=sys.stderr)
  if (cache_dtype := _cache_dtype()) is not None:
    budgets = budgets.with_cache_dtype(cache_dtype)
  return loaded._replace(model=apply_budgets(loaded.model, budgets))


def _cache_dtype() -> CacheDtypeName | None:
  return cast(CacheDtypeName | None, _CACHE_DTYPE.value)


def _answer(loaded: "Loaded", sampling: "Sampling", document: str | None) -> None:
  from dga_jax.chat.console import answer_questions

  answer_questions(
    loaded,
    [check_text(question, "--question") for question in _QUESTION.value],
    sampling,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    chat=_CHAT.value,
    system=_SYSTEM.value,
    document=document,
    save_path=_SAVE_CACHE.value,
    load_path=_LOAD_CACHE.value,
    attention_is_chosen=_attention_is_chosen(),
    json_lines=_JSONL.value,
  )


def _continue(loaded: "Loaded", sampling: "Sampling", records: list[dict[str, Any]]) -> None:
  from dga_jax.generation import console

  prompts = [_prompt_of(record) for record in records]
  stream = _PROMPT_FILE.value is None and not _JSONL.value
  batch = console.make_batch(
    loaded,
    prompts,
    sampling,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    max_length=_MAX_LENGTH.value,
    slots=_SLOTS.value,
    prompt_chunk=_PROMPT_CHUNK.value,
    stream=stream,
    attention_is_chosen=_attention_is_chosen(),
  )
  if _JSONL.value:
    console.print_json_lines(batch, loaded.tokenizer, records, max_new_tokens=_MAX_NEW_TOKENS.value)
  elif stream:
    console.print_stream(batch, loaded.tokenizer, prompts[0])
  else:
    console.print_all(batch, loaded.tokenizer, prompts)


def _continue_audio(loaded: "Loaded", sampling: "Sampling") -> None:
  from dga_jax.audio.continuation import continue_sound, sample_rate_of
  from dga_jax.audio.files import read_audio, write_wav
  from dga_jax.audio.measures import SoundMeasures
  from dga_jax.checkpoint import load_config

  workdir = str(_WORKDIR.value)
  rate = sample_rate_of(load_config(workdir, _STEP.value), workdir)
  prompt = read_audio(str(_PROMPT_AUDIO.value), rate)
  if _PROMPT_SECONDS.value is not None:
    prompt = prompt[-max(1, round(_PROMPT_SECONDS.value * rate)) :]
  wanted = round(_SECONDS.value * rate)
  result = continue_sound(loaded.model, loaded.tokenizer, prompt, wanted, sampling)
  if not len(result.samples):
    sys.exit("The model ends the sound after the prompt, so there is no continuation.")
  write_wav(str(_OUTPUT_AUDIO.value), result.samples, rate)
  seconds = len(result.samples) / rate
  note = "" if len(result.samples) == wanted else ", where the model ended the sound"
  print(f"wrote {seconds:.2f} s at {rate} Hz to {_OUTPUT_AUDIO.value}{note}", file=sys.stderr)
  for name, samples in (("prompt", prompt), ("continuation", result.samples)):
    print(f"{name}: {SoundMeasures.from_samples(samples, rate).summary()}", file=sys.stderr)
  print(result.generation.summary(), file=sys.stderr)
  if _SPECTROGRAM.value is not None:
    from dga_jax.audio.spectrogram import plot_continuation

    kind = loaded.model.config.attention
    title = (
      f"{Path(workdir).name} · {kind} · {len(prompt) / rate:.2f} s continued by {seconds:.2f} s"
    )
    plot_continuation(str(_SPECTROGRAM.value), prompt, result.samples, rate, title=title)
    print(f"wrote {_SPECTROGRAM.value}", file=sys.stderr)


def _attention_is_chosen() -> bool:
  return any(flag.value is not None for flag in (_ATTENTION, _BUDGETS, _KEYS, _CACHE_DTYPE))


def _is_about_a_document() -> bool:
  return _CONTEXT.value is not None or _LOAD_CACHE.value is not None


def _check_flags() -> None:
  """Raises UsageError for flags that do not go together."""
  sources = (_PROMPT, _PROMPT_FILE, _PROMPT_FROM, _PROMPT_AUDIO, _CONTEXT, _LOAD_CACHE)
  given = [f"--{flag.name}" for flag in sources if flag.value is not None]
  given += ["--interactive"] * _INTERACTIVE.value
  if len(given) != 1:
    raise app.UsageError(
      "Give one of --prompt, --prompt_file, --prompt_from, --prompt_audio, --interactive,"
      f" --context and --load_cache; {' and '.join(given) or 'none'} given."
    )
  if (_PROMPT_AUDIO.value is None) != (_OUTPUT_AUDIO.value is None):
    raise app.UsageError("--prompt_audio and --output_audio need each other.")
  if _SPECTROGRAM.value is not None and _PROMPT_AUDIO.value is None:
    raise app.UsageError("--spectrogram plots a continued sound; give --prompt_audio.")
  if _ATTENTION.value is not None and (_BUDGETS.value is not None or _KEYS.value is not None):
    raise app.UsageError("Give one of --attention and --budgets, and --keys with budgets alone.")
  asks = bool(_QUESTION.value)
  if asks != _is_about_a_document() and not (_CONTEXT.value and _SAVE_CACHE.value):
    raise app.UsageError("--question needs --context or --load_cache, and these need --question.")
  if _SAVE_CACHE.value is not None and _CONTEXT.value is None:
    raise app.UsageError("--save_cache stores the cache of --context; give --context.")
  if _SYSTEM.value is not None and not (_CHAT.value or _INTERACTIVE.value):
    raise app.UsageError("--system is a message of a chat; give --chat or --interactive as well.")
  if _SYSTEM.value is not None and _LOAD_CACHE.value is not None:
    raise app.UsageError("--system is stored with the cache; give it with --save_cache.")
  _refuse_unused_flags()


def _refuse_unused_flags() -> None:
  """Raises UsageError for a flag that the kind of prompt does not read."""
  batch = [_SLOTS, _PROMPT_CHUNK, *([_MAX_LENGTH] if _KEYS.value is None else [])]
  sound = [_SECONDS, _PROMPT_SECONDS]
  if _INTERACTIVE.value:
    kind, unused = "--interactive", [*batch, *sound, _JSONL]
  elif _is_about_a_document():
    kind, unused = "--context and --load_cache", [*batch, *sound]
  elif _PROMPT_AUDIO.value is not None:
    kind, unused = "--prompt_audio", [*batch, _JSONL, _CHAT, _MAX_NEW_TOKENS]
  else:
    kind, unused = "a text", sound
  for flag in unused:
    if flag.present:
      raise app.UsageError(f"--{flag.name} has no effect with {kind}; leave it out.")


def _read_records() -> list[dict[str, Any]]:
  """The prompts, each as an object with "prompt" or "messages"."""
  if _PROMPT.value is not None:
    return [{"prompt": check_text(_PROMPT.value, "--prompt")}]
  if _PROMPT_FROM.value is not None:
    return [{"prompt": read_text(_PROMPT_FROM.value)}]
  path = Path(str(_PROMPT_FILE.value))
  if path.suffix == ".jsonl":
    return read_json_lines(path)
  return [{"prompt": text} for text in read_prompts(path)]


def _prompt_of(record: dict[str, Any]) -> Any:
  """A text, or messages: those of the record, or its prompt as a message with --chat."""
  if "messages" in record:
    if _SYSTEM.value is not None:
      raise ValueError(
        'A record of --prompt_file has "messages", and --system is given; write the system message '
        "into the record's messages, or leave --system out."
      )
    return record["messages"]
  if not _CHAT.value:
    return record["prompt"]
  system = [] if _SYSTEM.value is None else [{"role": "system", "content": _SYSTEM.value}]
  return [*system, {"role": "user", "content": record["prompt"]}]


if __name__ == "__main__":
  command_line.run(main, _GROUPS)

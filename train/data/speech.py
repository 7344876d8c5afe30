"""A corpus of speech that espeak-ng speaks: voices, paragraphs, WAV files."""

import concurrent.futures
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import soundfile
from tqdm import tqdm

from train.data.files import read_documents

# Accent and variant of espeak-ng, and words a minute.
TRAIN_VOICES = (
  ("en-us+m3", 160),
  ("en-us+f2", 170),
  ("en-gb+m1", 150),
  ("en-gb+f4", 165),
  ("en-gb-scotland+m7", 155),
  ("en-gb-x-rp+f1", 160),
  ("en-us+f5", 180),
  ("en-gb+m5", 140),
)
HELD_OUT_VOICES = (("en-us+m7", 160), ("en-gb-x-rp+f3", 165))

# Every 10th paragraph is held out. Shorter paragraphs are headings or single replies.
_HELD_OUT_STEP = 10
_FEWEST_CHARACTERS, _MOST_CHARACTERS = 80, 400
_SECONDS_TIMEOUT = 60
_BATCH = 8  # Files between two checks of the corpus's length: at most some minutes of excess.


def make_corpus(
  texts: tuple[Path, ...], output: Path, *, minutes: float, held_out_minutes: float
) -> None:
  """Writes output/train and output/held_out, whole or not at all.

  Args:
    texts: UTF-8 files.
    output: the folder, which is created.
    minutes: of training speech.
    held_out_minutes: of held-out speech.

  Raises:
    ValueError: a file is not text, or the texts are too short.
    OSError: a file could not be written, or espeak-ng failed.
  """
  partial = output.with_name(f"{output.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  written = {}
  try:
    for split, voices, wanted in (
      ("train", TRAIN_VOICES, minutes),
      ("held_out", HELD_OUT_VOICES, held_out_minutes),
    ):
      folder = partial / split
      folder.mkdir(parents=True)
      texts_of_split = paragraphs(texts, held_out=split == "held_out")
      written[split] = _speak(texts_of_split, voices, folder, wanted)
    partial.rename(output)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  for split, spoken in written.items():
    print(f"wrote {spoken:.1f} minutes to {output / split}")


def paragraphs(texts: tuple[Path, ...], *, held_out: bool) -> Iterator[str]:
  """The paragraphs of texts, cut at sentences to at most 400 characters, one text after another.

  Args:
    texts: UTF-8 files.
    held_out: yield every 10th paragraph, else the others.
  """
  for path in texts:
    for document in read_documents(path):
      found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", document))
      long = (part for part in found if len(part) >= _FEWEST_CHARACTERS)
      for index, part in enumerate(long):
        if (index % _HELD_OUT_STEP == _HELD_OUT_STEP - 1) == held_out:
          yield _first_sentences(part)


def _first_sentences(text: str) -> str:
  if len(text) <= _MOST_CHARACTERS:
    return text
  end = max(text.rfind(mark, 0, _MOST_CHARACTERS) for mark in (". ", "? ", "! ", "; ", ", "))
  return text[: end + 1] if end >= _FEWEST_CHARACTERS else text[:_MOST_CHARACTERS]


def _speak(
  texts: Iterator[str], voices: tuple[tuple[str, int], ...], folder: Path, minutes: float
) -> float:
  """Writes files until they have `minutes` of sound, and returns their minutes.

  The voices alternate.
  """
  jobs = enumerate(zip(texts, itertools.cycle(voices), strict=False))
  done = 0.0
  with (
    concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    tqdm(total=minutes, unit=" minutes", desc=f"Speaking {folder.name}", disable=None) as bar,
  ):
    while done < minutes:
      batch = list(itertools.islice(jobs, _BATCH))
      if not batch:
        raise ValueError(
          f"The texts give {done:.1f} of {minutes:g} minutes for {folder.name}. Name more texts "
          "with --texts, or ask for fewer minutes."
        )
      for seconds in pool.map(lambda job: _write(folder, job[0], *job[1]), batch):
        done += seconds / 60
        bar.update(seconds / 60)
  return done


def _write(folder: Path, index: int, text: str, voice: tuple[str, int]) -> float:
  """Writes one file, and returns its length in seconds."""
  name, words_a_minute = voice
  path = folder / f"{index:05}_{name}.wav"
  command = ["espeak-ng", "-v", name, "-s", str(words_a_minute), "-w", str(path), "--stdin"]
  done = subprocess.run(
    command, input=text.encode(), capture_output=True, timeout=_SECONDS_TIMEOUT, check=False
  )
  if done.returncode or not path.is_file():
    raise OSError(f"espeak-ng could not write {path}: {done.stderr.decode(errors='replace')}")
  return float(soundfile.info(path).duration)

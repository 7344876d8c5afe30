"""The speech corpus: held-out voices and texts, exact errors, nothing half-made."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from train.data.speech import HELD_OUT_VOICES, make_corpus, paragraphs, TRAIN_VOICES

ROOT = Path(__file__).parents[3]
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")


def write_text(path: Path, count: int) -> Path:
  """Paragraphs that begin with their number, and headings that are too short."""
  parts = [f"CHAPTER {i}\n\nParagraph {i} says {'one word more, ' * 8}." for i in range(count)]
  path.write_text("\n\n".join(parts), encoding="utf-8")
  return path


def test_every_10th_paragraph_is_held_out(tmp_path: Path) -> None:
  texts = (write_text(tmp_path / "a.txt", 25),)
  held_out = [text.split()[1] for text in paragraphs(texts, held_out=True)]
  train = [text.split()[1] for text in paragraphs(texts, held_out=False)]
  assert held_out == ["9", "19"]
  assert sorted(map(int, [*train, *held_out])) == list(range(25))


def test_long_paragraphs_end_after_a_sentence(tmp_path: Path) -> None:
  path = tmp_path / "a.txt"
  path.write_text("This is a sentence of words. " * 40, encoding="utf-8")
  (text,) = paragraphs((path,), held_out=False)
  assert len(text) <= 400
  assert text.endswith("of words.")


def test_voices_are_apart() -> None:
  assert not {name for name, _ in TRAIN_VOICES} & {name for name, _ in HELD_OUT_VOICES}


@needs_espeak
def test_the_corpus_has_the_asked_length_in_all_voices(tmp_path: Path) -> None:
  output = tmp_path / "speech"
  texts = (write_text(tmp_path / "a.txt", 60),)
  make_corpus(texts, output, minutes=1, held_out_minutes=0.3)
  for split, voices, minutes in (("train", TRAIN_VOICES, 1), ("held_out", HELD_OUT_VOICES, 0.3)):
    files = sorted((output / split).iterdir())
    assert sum(soundfile.info(file).duration for file in files) >= 60 * minutes
    assert {file.stem.partition("_")[2] for file in files} >= {
      name for name, _ in voices[: len(files)]
    }


@needs_espeak
def test_short_texts_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
  texts = (write_text(tmp_path / "a.txt", 3),)
  with pytest.raises(ValueError, match="Name more texts"):
    make_corpus(texts, tmp_path / "speech", minutes=10, held_out_minutes=1)
  assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
  done = subprocess.run(
    [sys.executable, "-m", "train.make_speech", "--texts=x", f"--output={tmp_path}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert "exists" in done.stderr or "espeak-ng is not installed" in done.stderr

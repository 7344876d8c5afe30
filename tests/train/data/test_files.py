"""Files of a corpus, their documents, and the held-out documents."""

import gzip
import json
import lzma
import pathlib
import re

import pytest

from train.data import files
from train.data.config import PYTHON_STDLIB
from train.data.files import Corpus, find_files, read_documents


def write(path: pathlib.Path, content: str | bytes) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def corpus_of(*texts: str, folder: pathlib.Path) -> Corpus:
  names = tuple(write(folder / f"{number:03}.txt", text) for number, text in enumerate(texts))
  return Corpus.find(names, ())


def test_patterns_find_each_file_once_and_in_order(tmp_path: pathlib.Path) -> None:
  for name in ("b.txt", "a.txt", "deep/er/c.txt", "other.md"):
    write(tmp_path / name, "x")
  found = find_files((str(tmp_path / "b.txt"), str(tmp_path / "**/*.txt")))
  assert [path.name for path in found] == ["b.txt", "a.txt", "c.txt"]


@pytest.mark.parametrize("pattern", ["missing.txt", "*.txt", "**/*.txt"])
def test_what_matches_nothing_is_named(tmp_path: pathlib.Path, pattern: str) -> None:
  with pytest.raises(FileNotFoundError, match=re.escape(pattern)):
    find_files((str(tmp_path / pattern),))


def test_a_folder_is_refused_with_a_pattern_to_use(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match=r"is a folder; name its files, such as .*/\*\*/\*\.txt"):
    find_files((str(tmp_path),))


def test_a_file_cannot_be_trained_on_and_held_out(tmp_path: pathlib.Path) -> None:
  name = write(tmp_path / "a.txt", "x")
  with pytest.raises(ValueError, match=r"a\.txt is named by train_files and by validation_files"):
    Corpus.find((name,), (str(tmp_path / "*"),))


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("a.txt", "one\0 \n\0two é\0".encode()),
    ("a.txt.gz", gzip.compress("one\0two é".encode(), mtime=0)),
    ("a.xz", lzma.compress("one\0\0two é".encode())),
    ("a.jsonl", "\n".join(json.dumps({"id": 1, "text": t}) for t in ("one", "", "two é")).encode()),
    ("a.txt", "\ufeffone\0two é".encode()),
    ("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n{"text": "two \\u00e9"}'),
    ("a.jsonl.xz", lzma.compress(b'{"text": "one"}\n\n{"text": "two \\u00e9"}\n')),
  ],
)
def test_documents_of_every_kind_of_file(tmp_path: pathlib.Path, name: str, content: bytes) -> None:
  path = tmp_path / name
  write(path, content)
  assert list(read_documents(path)) == ["one", "two é"]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", b"abc\xff", "a.txt is not UTF-8 text: invalid start byte at byte 3"),
    ("a.txt.gz", b"plain", "a.txt.gz is damaged"),
    ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz is damaged"),
    ("a.txt.xz", b"plain", "a.txt.xz is damaged"),
    ("a.jsonl", b'{"text": "x"}\n{"text"', "a.jsonl, line 2, is no JSON object"),
    ("a.jsonl", b'{"body": "x"}', 'a.jsonl, line 1, is no JSON object with a field "text"'),
    ("a.jsonl", b"[1]", "a.jsonl, line 1, is no JSON object"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1, is no JSON object"),
    ("a.jsonl", b'{"text": ' + b"9" * 5000, "a.jsonl, line 1, is no JSON object"),
    (
      "a.jsonl",
      b'{"text": "x"}\n{"text": "ab\\ud83d c"}',
      r'a.jsonl, line 2: the field "text" holds the lone surrogate \ud83d at character 2',
    ),
    ("a.jsonl", b'{"text": 3}', 'a.jsonl, line 1: the field "text" holds no string but 3'),
  ],
)
def test_bad_files_are_named(
  tmp_path: pathlib.Path, name: str, content: bytes, message: str
) -> None:
  path = tmp_path / name
  write(path, content)
  with pytest.raises(ValueError, match=re.escape(message)):
    list(read_documents(path))


def test_without_validation_files_some_documents_of_each_length_are_held_out(
  tmp_path: pathlib.Path,
) -> None:
  texts = ["long " * 10_000 + str(n) if n % 4 == 0 else f"short {n}" for n in range(80)]
  corpus = corpus_of(*texts, folder=tmp_path)
  train, held_out = list(corpus.documents("train")), list(corpus.documents("validation"))
  assert sorted(train + held_out) == sorted(texts)
  assert sum(len(text) > 1000 for text in held_out) == 20 // 8
  assert sum(len(text) < 1000 for text in held_out) == 60 // 16


def test_validation_files_are_held_out_alone(tmp_path: pathlib.Path) -> None:
  train = write(tmp_path / "train.txt", "\0".join(map(str, range(40))))
  validation = write(tmp_path / "validation.txt", "a\0b")
  corpus = Corpus.find((train,), (validation,))
  assert list(corpus.documents("train")) == list(map(str, range(40)))
  assert list(corpus.documents("validation")) == ["a", "b"]


def test_the_fingerprint_is_of_contents_order_and_split(tmp_path: pathlib.Path) -> None:
  a, b = (write(tmp_path / name, name) for name in ("a.txt", "b.txt"))
  moved = write(tmp_path / "moved/a.txt", "a.txt")
  first = Corpus.find((a, b), ()).fingerprint()
  assert first == Corpus.find((moved, b), ()).fingerprint()
  others = [((b, a), ()), ((a,), ()), ((a,), (b,)), ((b,), (a,))]
  fingerprints = {first, *(Corpus.find(*patterns).fingerprint() for patterns in others)}
  pathlib.Path(b).write_text("b.tx!")
  fingerprints.add(Corpus.find((a, b), ()).fingerprint())
  assert len(fingerprints) == 6


def test_the_standard_library_is_a_corpus_with_long_documents_held_out() -> None:
  corpus = Corpus.find((PYTHON_STDLIB,), ())
  names = [path.name for path in corpus.train_files]
  assert "argparse.py" in names
  assert not {"test", "tests", "site-packages"} & {
    part for path in corpus.train_files for part in path.parts[-3:]
  }
  assert corpus.train_files == Corpus.find((PYTHON_STDLIB,), ()).train_files
  held_out = [len(text) for text in corpus.documents("validation")]
  train = [len(text) for text in corpus.documents("train")]
  assert 5e6 < sum(train) < 2e7
  assert 0.03 < sum(held_out) / sum(train) < 0.2
  assert sum(length >= 50_000 for length in held_out) >= 3


def test_a_python_without_library_source_says_so(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(files.sysconfig, "get_path", lambda name: str(tmp_path))
  with pytest.raises(FileNotFoundError, match="name text files instead"):
    find_files((PYTHON_STDLIB,))

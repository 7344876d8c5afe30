"""Documents are read from files and cut into rows."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dga_jax.evaluation.texts import Document, read_documents, token_rows
from tests.dga_jax.evaluation.tiny import TOKENIZER


def test_documents_of_each_file_format(tmp_path: Path) -> None:
  line = json.dumps({"id": 7, "text": "Größe"}) + "\n\n"
  (tmp_path / "a.jsonl").write_text(line)
  for name, library in (("b.jsonl.xz", lzma), ("c.jsonl.gz", gzip)):
    with library.open(tmp_path / name, "wt") as file:
      file.write(line)
  (tmp_path / "d.txt").write_text("plain", encoding="utf-8-sig")  # With a byte order mark.
  paths = sorted(tmp_path.iterdir())
  assert read_documents(paths) == [Document("7", "Größe")] * 3 + [Document(str(paths[3]), "plain")]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ('{"id": 1}', r"a\.jsonl, line 1, lacks 'id' or 'text'"),
    ("[1]", r"a\.jsonl, line 1, lacks 'id' or 'text'"),
    ('{"id": 1, "text": 2}', r"a\.jsonl, line 1: 'text' is 2; it must be a string"),
    ('{"id": 1, "text": ""}\n{', r"a\.jsonl, line 2, is not JSON"),
    ('{"id": 1, "text": ""}\n\n{"id": 1, "text": "\\ud800"}', r"line 3: .* surrogate U\+D800"),
    ("[" * 100_000, r"a\.jsonl, line 1, is"),
    ("", "have no document"),
  ],
)
def test_invalid_files_are_errors(content: str, message: str, tmp_path: Path) -> None:
  (tmp_path / "a.jsonl").write_text(content)
  with pytest.raises(ValueError, match=message):
    read_documents([tmp_path / "a.jsonl"])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_not_utf8_are_an_error(name: str, tmp_path: Path) -> None:
  (tmp_path / name).write_bytes(b'{"id": 1, "text": "a"}\n{"id": 1, "text": "\xff"}\n')
  with pytest.raises(ValueError, match=r"line 2"):
    read_documents([tmp_path / name])


@pytest.mark.parametrize(("suffix", "library"), [(".gz", gzip), (".xz", lzma), (".bz2", bz2)])
def test_damaged_compression(suffix: str, library: Any, tmp_path: Path) -> None:
  path = tmp_path / f"a.jsonl{suffix}"
  whole = library.compress(b'{"id": 1, "text": "abc"}\n' * 100)
  for damaged in (whole[:-9], b"\0" * 40):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"a\.jsonl\{suffix} is damaged"):
      read_documents([path])


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
  text = "a\u2028b\u0085c\x0cd"
  (tmp_path / "a.jsonl").write_text(json.dumps({"id": 1, "text": text}, ensure_ascii=False))
  assert read_documents([tmp_path / "a.jsonl"]) == [Document("1", text)]


def test_rows_start_with_the_start_tokens_and_do_not_overlap() -> None:
  documents = [Document("a", "abcdefgh"), Document("b", "xyz"), Document("c", "12345678901")]
  rows = token_rows(documents, TOKENIZER, 4, rows_per_document=2)
  assert rows.dtype == np.int32
  pieces = [TOKENIZER.decode(row) for row in rows]
  assert pieces == ["abcd", "efgh", "1234", "5678"]
  assert (rows[:, 0] == TOKENIZER.end_id).all()
  assert len(token_rows(documents, TOKENIZER, 4)) == 2


def test_documents_too_short_for_a_row_are_an_error() -> None:
  with pytest.raises(ValueError, match="length is 99"):
    token_rows([Document("a", "short")], TOKENIZER, 99)
  with pytest.raises(ValueError, match="length is 0; it must be at least 1"):
    token_rows([Document("a", "short")], TOKENIZER, 0)

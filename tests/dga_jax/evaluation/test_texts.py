"""Reading documents and cutting them into rows."""

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from dga_jax.evaluation.texts import Document, read_documents, token_rows
from tests.dga_jax.evaluation.tiny import TOKENIZER


def test_documents_of_all_kinds_of_files(tmp_path: Path) -> None:
  line = json.dumps({"id": 7, "text": "Größe"}) + "\n\n"
  (tmp_path / "a.jsonl").write_text(line)
  for name, library in (("b.jsonl.xz", lzma), ("c.jsonl.gz", gzip)):
    with library.open(tmp_path / name, "wt") as file:
      file.write(line)
  (tmp_path / "d.txt").write_text("plain")
  paths = sorted(tmp_path.iterdir())
  assert read_documents(paths) == [Document("7", "Größe")] * 3 + [Document(str(paths[3]), "plain")]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ('{"id": 1}', r"line 1, lacks 'id' or 'text'"),
    ('{"id": 1, "text": ""}\n{', r"line 2, is no JSON"),
    ("", "hold no document"),
  ],
)
def test_broken_files(content: str, message: str, tmp_path: Path) -> None:
  (tmp_path / "a.jsonl").write_text(content)
  with pytest.raises(ValueError, match=message):
    read_documents([tmp_path / "a.jsonl"])


def test_rows_begin_like_documents_and_do_not_overlap() -> None:
  documents = [Document("a", "abcdefgh"), Document("b", "xyz"), Document("c", "12345678901")]
  rows = token_rows(documents, TOKENIZER, 4, rows_per_document=2)
  assert rows.dtype == np.int32
  pieces = [TOKENIZER.decode(row) for row in rows]
  assert pieces == ["abcd", "efgh", "1234", "5678"]
  assert (rows[:, 0] == TOKENIZER.end_id).all()
  assert len(token_rows(documents, TOKENIZER, 4)) == 2


def test_documents_too_short_for_a_row() -> None:
  with pytest.raises(ValueError, match="length is 99"):
    token_rows([Document("a", "short")], TOKENIZER, 99)

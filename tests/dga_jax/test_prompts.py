"""Prompts from files, standard input and arguments; errors name the line."""

import io
import os
import sys
from pathlib import Path

import pytest

from dga_jax.prompts import check_text, read_json_lines, read_prompts, read_text


@pytest.mark.parametrize(
  ("content", "prompts"),
  [
    ("one\ntwo\n", ["one", "two"]),
    ("one\r\n\n  \ntwo", ["one", "two"]),
    (
      "a\u2028b\nc\u0085d\ne\x0cf\ng\rh\ni\x1cj",
      ["a\u2028b", "c\u0085d", "e\x0cf", "g\rh", "i\x1cj"],
    ),
    ("\ufeffone\n\ufefftwo", ["one", "\ufefftwo"]),
    ("größe\n日本", ["größe", "日本"]),
  ],
)
def test_one_prompt_per_line(content: str, prompts: list[str], tmp_path: Path) -> None:
  path = tmp_path / "prompts.txt"
  path.write_bytes(content.encode())
  assert read_prompts(path) == prompts


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"one\ntwo \xff\n", r"prompts\.txt, line 2: byte 0xff at position 4 is not UTF-8"),
    (b"\xff\xfeo\x00n\x00", r"prompts\.txt, line 1: byte 0xff at position 0"),
    (b"\n  \n", r"prompts\.txt has no prompt"),
    (b"", r"prompts\.txt has no prompt"),
  ],
)
def test_files_that_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
  path = tmp_path / "prompts.txt"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    read_prompts(path)


def test_a_byte_outside_utf8_in_an_argument_is_an_error() -> None:
  assert check_text("größe", "--prompt") == "größe"
  with pytest.raises(ValueError, match="--prompt has the byte 0xff at position 2"):
    check_text(os.fsdecode(b"ab\xff"), "--prompt")
  with pytest.raises(ValueError, match=r"surrogate U\+D800 at position 0"):
    check_text("\ud800", "--prompt")


def test_json_lines(tmp_path: Path) -> None:
  path = tmp_path / "prompts.jsonl"
  path.write_bytes('{"id": 7, "prompt": "größe\\n"}\n\n{"messages": [{"role": "user"}]}\n'.encode())
  assert read_json_lines(path) == [
    {"id": 7, "prompt": "größe\n"},
    {"messages": [{"role": "user"}]},
  ]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"prompt": "a"', "line 2 is not JSON"),
    ("[1]", "line 2 is a list; it must be an object"),
    ("{}", 'line 2 must have one of the keys "prompt" and "messages"'),
    ('{"prompt": "a", "messages": []}', "line 2 must have one of the keys"),
    ('{"prompt": 3}', 'line 2: "prompt" must be a string'),
    ('{"messages": "a"}', 'line 2: "messages" must be a list'),
  ],
)
def test_json_lines_that_are_refused(line: str, message: str, tmp_path: Path) -> None:
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "a"}\n' + line)
  with pytest.raises(ValueError, match=message):
    read_json_lines(path)
  path.write_text("\n")
  with pytest.raises(ValueError, match="has no record"):
    read_json_lines(path)


def test_a_whole_file_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  path = tmp_path / "text.txt"
  path.write_bytes(b"one\n\ntwo\r\n")
  assert read_text(str(path)) == "one\n\ntwo"
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"three\n\n")))
  assert read_text("-") == "three\n"
  path.write_bytes(b"one\n\xff")
  with pytest.raises(ValueError, match="byte 0xff at position 4 is not UTF-8"):
    read_text(str(path))
  path.write_bytes(b" \n")
  with pytest.raises(ValueError, match="is empty"):
    read_text(str(path))

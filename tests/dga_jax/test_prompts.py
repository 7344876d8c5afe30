"""Prompts from files and arguments: one prompt per line, and errors for bytes outside UTF-8."""

import os
from pathlib import Path

import pytest

from dga_jax.prompts import check_text, read_prompts


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

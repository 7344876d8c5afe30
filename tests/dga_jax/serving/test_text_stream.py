"""Decoding token by token: whole characters, stop texts, no lost text."""

import hypothesis
import pytest
from hypothesis import strategies as st

from dga_jax.serving.text_stream import TextStream
from dga_jax.tokenizer import Tokenizer

TOKENIZER = Tokenizer.byte_level()


def pieces(text, stops=()):
  """The text of every token, then what `finish` returns."""
  stream = TextStream(TOKENIZER, stops)
  found = []
  for token in TOKENIZER.encode(text):
    found.append(stream.add(token))
    if stream.stopped:
      break
  return [*found, stream.finish()], stream.stopped


def test_characters_are_not_cut():
  found, _ = pieces("a€😀ü")
  assert [piece for piece in found if piece] == ["a", "€", "😀", "ü"]


def test_tokens_before_a_stop_text():
  stream = TextStream(TOKENIZER, ["€!"])
  for token in TOKENIZER.encode("ab€!c"):  # A token for each byte.
    stream.add(token)
  assert (stream.stopped, stream.whole_tokens) == (True, 2)


def test_an_unfinished_character_becomes_a_replacement():
  stream = TextStream(TOKENIZER, ())
  euro = TOKENIZER.encode("€")
  assert stream.add(euro[0]) + stream.add(euro[1]) == ""
  assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
  ("text", "stops", "wanted"),
  [
    ("one END two", ["END"], "one "),
    ("one EN", ["END"], "one EN"),
    ("one EEND", ["END"], "one E"),
    ("abcabd", ["abd"], "abc"),
    ("xaby", ["b", "ab"], "x"),
    ("aab", ["ab", "aac"], "a"),
    ("a€b", ["€"], "a"),
    ("END", ["END"], ""),
  ],
)
def test_stop_texts(text, stops, wanted):
  found, stopped = pieces(text, stops)
  assert "".join(found) == wanted
  assert stopped is (wanted != text)


@hypothesis.given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4)))
def test_the_stream_is_the_text_before_the_first_stop_text(text, stops):
  found, stopped = pieces(text, stops)
  complete = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=len(text))
  seen = text[:complete]  # The stream ends at the first character that completes a stop text.
  starts = [seen.find(stop) for stop in stops if stop in seen]
  assert "".join(found) == (seen[: min(starts)] if starts else text)
  assert stopped is bool(starts)

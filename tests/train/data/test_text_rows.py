"""Rows of text: each token of each document once, in order, without targets across documents."""

import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dga_jax.tokenizer import Tokenizer
from train.data.packed_rows import PackedRows
from train.data.packing import cut, pack, Span
from train.data.token_stream import token_blocks, TokenStream

TOKENIZER = Tokenizer.byte_level()
# Documents of letters with every length from 1 to more than one block of the stream.
DOCUMENTS = st.lists(
  st.one_of(st.integers(1, 40), st.integers(1, 6000)).flatmap(
    lambda length: st.sampled_from("abc").map(lambda letter: (letter + "xyz" * length)[:length])
  ),
  min_size=1,
  max_size=12,
)


def stream_of(documents: list[str]) -> TokenStream:
  blocks = [{"tokens": block} for block in token_blocks(documents, TOKENIZER)]
  return TokenStream(blocks, TOKENIZER.end_id)


@hypothesis.given(documents=DOCUMENTS)
def test_the_stream_is_end_document_end_and_reads_anywhere(documents: list[str]) -> None:
  end = TOKENIZER.end_id
  expected = [end]
  for document in documents:
    expected += [*document.encode(), end]
  stream = stream_of(documents)
  np.testing.assert_array_equal(stream.ends_N, np.flatnonzero(np.array(expected) == end))
  middle = len(expected) // 2
  for start, stop in ((0, len(expected)), (middle, middle + 1), (middle // 2, middle + 1)):
    np.testing.assert_array_equal(stream.read(start, stop), expected[start:stop])


@hypothesis.given(
  documents=DOCUMENTS,
  length=st.one_of(st.integers(2, 64), st.integers(65, 3000)),
  max_documents=st.one_of(st.none(), st.integers(1, 4)),
)
def test_rows_hold_every_document_once_and_in_order(
  documents: list[str], length: int, max_documents: int | None
) -> None:
  rows = PackedRows(stream_of(documents), length, max_documents)
  pieces: list[tuple[list[int], list[int]]] = []
  for row in (rows[index] for index in range(len(rows))):
    segments = row["segment_ids"]
    count = segments.max()
    assert max_documents is None or count <= max_documents
    used = np.count_nonzero(segments > 0)
    # Documents 1, 2, ... are adjacent; padding follows them.
    np.testing.assert_array_equal(np.diff(segments[:used]) >= 0, True)
    assert set(segments[:used]) == set(range(1, count + 1))
    assert set(segments[used:]) <= {-1}
    np.testing.assert_array_equal(row["loss_mask"], segments > 0)
    for segment in range(1, count + 1):
      inputs, targets = (row[name][segments == segment].tolist() for name in ("inputs", "targets"))
      assert inputs[1:] == targets[:-1]
      # No target is past the end of its document.
      assert TOKENIZER.end_id not in [*targets[:-1], *inputs[1:]]
      pieces.append((inputs, targets))
  assert sum(len(inputs) for inputs, _ in pieces) == sum(map(len, documents)) + len(documents)
  expected: collections.Counter[tuple[tuple[int, ...], tuple[int, ...]]] = collections.Counter()
  for document in documents:
    tokens = [TOKENIZER.end_id, *document.encode(), TOKENIZER.end_id]
    for start in range(0, len(tokens) - 1, length):
      piece = tokens[start : start + length + 1]
      expected[tuple(piece[:-1]), tuple(piece[1:])] += 1
  assert collections.Counter((tuple(i), tuple(t)) for i, t in pieces) == expected


@hypothesis.given(
  lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
  max_documents=st.one_of(st.none(), st.integers(1, 5)),
)
def test_packing_leaves_no_two_rows_that_would_fit_into_one(
  lengths: list[int], max_documents: int | None
) -> None:
  starts = np.cumsum([0, *lengths])
  spans = cut(starts, 50)
  assert spans == [Span(start, length) for start, length in zip(starts[:-1], lengths, strict=True)]
  rows = pack(spans, 50, max_documents)
  assert sorted(span for row in rows for span in row) == spans
  totals = sorted(sum(span.length for span in row) for row in rows)
  assert totals[-1] <= 50
  if max_documents is None and len(totals) > 1:
    assert totals[0] + totals[1] > 50


def test_packing_fills_rows_of_short_documents() -> None:
  lengths = np.random.default_rng(0).integers(1, 1000, 500)
  rows = pack(cut(np.cumsum([0, *lengths]), 2048), 2048, max_documents=8)
  assert lengths.sum() / (2048 * len(rows)) > 0.95


@pytest.mark.parametrize("length", [2, 7, 4096])
def test_a_document_of_one_token_is_two_predictions(length: int) -> None:
  rows = PackedRows(stream_of(["a"]), length, None)
  assert len(rows) == 1
  assert rows[0]["inputs"][:2].tolist() == [TOKENIZER.end_id, ord("a")]
  assert rows[0]["targets"][:2].tolist() == [ord("a"), TOKENIZER.end_id]

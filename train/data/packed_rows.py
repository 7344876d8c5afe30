"""Rows of packed documents, read from a token stream."""

from train.data.packing import cut, pack, Span
from train.data.rows import padding_row, Row
from train.data.token_stream import TokenStream


class PackedRows:
  """The packed rows of a token stream, with random access for grain.

  Args:
    stream: the documents' tokens.
    length: L, tokens of a row.
    max_documents: most documents of a row, None for no bound.
  """

  def __init__(self, stream: TokenStream, length: int, max_documents: int | None) -> None:
    self._stream = stream
    self._length = length
    self._rows: list[list[Span]] = pack(cut(stream.ends_N, length), length, max_documents)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Row:
    row = padding_row(self._length)
    begin = 0
    for segment, span in enumerate(self._rows[index], start=1):
      tokens = self._stream.read(span.start, span.start + span.length + 1)
      columns = slice(begin, begin + span.length)
      row["inputs"][columns] = tokens[:-1]
      row["targets"][columns] = tokens[1:]
      row["segment_ids"][columns] = segment
      row["loss_mask"][columns] = self._stream.learnt(span.start + 1, span.start + span.length + 1)
      begin += span.length
    return row

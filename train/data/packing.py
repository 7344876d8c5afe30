"""Cuts documents into pieces and packs short pieces into common rows.

All rows are planned at the start, from the lengths of documents alone. So rows have random access:
each process reads its own rows, batches do not depend on the number of processes, and the state of
an iterator is one number.
"""

import bisect
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Span(NamedTuple):
  """Consecutive positions of a token stream, all of one document."""

  start: int
  length: int


def cut(ends_N: Int[np.ndarray, "N"], length: int) -> list[Span]:
  """Cuts the documents between consecutive ends into spans of at most `length` positions.

  Every position from ends_N[0] up to ends_N[-1] is in exactly one span.
  """
  return [
    Span(start, min(length, int(end) - start))
    for begin, end in itertools.pairwise(ends_N)
    for start in range(int(begin), int(end), length)
  ]


def pack(spans: list[Span], length: int, max_documents: int | None) -> list[list[Span]]:
  """Packs spans into rows of `length` positions: best fit, longest first.

  Args:
    spans: at least one, none longer than `length`.
    length: positions of a row.
    max_documents: most spans of a row, None for no bound.

  Returns:
    The rows, shuffled in a way that depends on the arguments alone, so that the first rows are a
    sample of all.
  """
  rows: list[list[Span]] = []
  open_rows: list[tuple[int, int]] = []  # (positions left, row), sorted
  for span in sorted(spans, key=lambda span: (-span.length, span.start)):
    fit = bisect.bisect_left(open_rows, (span.length, 0))
    if fit < len(open_rows):
      left, row = open_rows.pop(fit)
    else:
      left, row = length, len(rows)
      rows.append([])
    rows[row].append(span)
    left -= span.length
    if left and (max_documents is None or len(rows[row]) < max_documents):
      bisect.insort(open_rows, (left, row))
  mixed_order = np.random.default_rng(0).permutation(len(rows))
  return [rows[row] for row in mixed_order]

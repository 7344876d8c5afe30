"""Reads one prompt at a time, piece by piece, into the cache of one sequence."""

from collections.abc import Sequence
from concurrent.futures import Future

import jax
import numpy as np
from jaxtyping import Array, Float

from dga_jax.generation.kept_caches import KeptCaches
from dga_jax.generation.programs import Programs
from dga_jax.generation.requests import pad_prompt, Request
from dga_jax.generation.sampling import Sampled
from dga_jax.model.config import ModelConfig
from dga_jax.model.decoder import DecoderCache

LEAST_KEPT = 64
"""Tokens of a shared beginning, or of a conversation, that are worth a kept cache."""


def piece_lengths(prompt_chunk: int) -> tuple[int, ...]:
  """The array lengths of pieces, longest first: a short one reads the end of a prompt."""
  return (prompt_chunk, prompt_chunk // 8) if prompt_chunk >= 64 else (prompt_chunk,)


def check_reads_pieces(config: ModelConfig, prompt_chunk: int | None) -> None:
  """Raises a ValueError if prompts are to be read in pieces and the attention kind cannot."""
  if prompt_chunk is not None and config.attention == "dga" and config.dga.selection != "streaming":
    raise ValueError(
      f"prompt_chunk is {prompt_chunk}, but selection={config.dga.selection!r} ranks a prompt's"
      " tokens together: leave it out, or use selection='streaming'."
    )


class PromptReader:
  """Reads a prompt from the end of the longest kept cache that fits.

  The cache is kept where `Request.keep_at` says, and at the end of the longest beginning that the
  prompt has in common with a kept prompt. Prompts are read one after another, so that a shared
  beginning is read once.

  Args:
    programs: of the engine.
    pieces: see `piece_lengths`.
    kept: the caches of earlier prompts.
  """

  def __init__(self, programs: Programs, pieces: Sequence[int], kept: KeptCaches) -> None:
    self._programs, self._pieces, self._kept = programs, pieces, kept
    self._prompt = np.zeros(0, np.int32)
    self._stops: list[int] = []  # Where pieces end: where the cache is kept, and the end.
    self._keep_at: set[int] = set()
    self._position = 0
    self._row: DecoderCache | None = None
    self._loading: Future[DecoderCache] | None = None  # Becomes `_row`.
    self._scores: list[tuple[Sampled, int]] | None = None  # None if nobody wants them.
    self._logits: Float[Array, "1 V"] | np.ndarray | None = None

  def begin(self, request: Request) -> int:
    """Begins a prompt; returns how many of its tokens a kept cache already has."""
    self._prompt = prompt = np.asarray(request.prompt, np.int32)
    self._position, self._logits, self._keep_at = 0, None, set()
    self._scores = [] if request.prompt_logprobs else None
    if self._kept.enabled:
      wanted = [len(prompt)] if request.keep_at is None else request.keep_at
      self._keep_at = {at for at in wanted if at >= LEAST_KEPT or at == len(prompt)}
      found = None if request.prompt_logprobs else self._kept.find(prompt)
      if found is not None:
        self._position, self._logits = len(found.tokens), found.logits
        self._loading = self._kept.load(found)
      shared = self._kept.longest_shared(prompt)
      if shared >= self._position + LEAST_KEPT:
        self._keep_at.add(shared)
    if self._position == 0:
      self._row = self._programs.empty_row()
    stops = {*self._keep_at, len(prompt)}
    self._stops = sorted(stop for stop in stops if self._position < stop <= len(prompt))
    return self._position

  @property
  def waits(self) -> bool:
    """Whether a kept cache is being copied to the device; `read_piece` and `take` wait for it."""
    return self._loading is not None and not self._loading.done()

  @property
  def done(self) -> bool:
    """Whether the prompt has been read."""
    return not self._stops

  def read_piece(self) -> None:
    """Dispatches the next piece, after the piece before it has been computed."""
    if self._logits is not None:
      jax.block_until_ready(self._logits)
    self._end_loading()
    assert self._row is not None
    left = self._stops[0] - self._position
    # Short pieces cost less than a long one that is mostly padding.
    is_long = 2 * left > self._pieces[0] or self._scores is not None
    length = self._pieces[0] if is_long else self._pieces[-1]
    count = min(length, left)
    begin, end = self._position, self._position + count
    piece = pad_prompt(self._prompt[begin:end], length)
    if self._scores is None:
      self._logits, self._row = self._programs.extend(self._row, piece, count)
    else:
      next_1xT = pad_prompt(self._prompt[begin + 1 : end + 1], length)
      scored, self._logits, self._row = self._programs.score(self._row, piece, next_1xT, count)
      self._scores.append((scored, count))
    self._position = end
    if self._position < self._stops[0]:
      return
    self._stops.pop(0)
    if self._position in self._keep_at:
      whole = self.done  # The row of a whole prompt is not extended again.
      row = self._row if whole else self._programs.copy_row(self._row)
      self._kept.keep(self._prompt[: self._position], row, self._logits)

  def take(
    self,
  ) -> tuple[Float[Array, "1 V"] | np.ndarray, DecoderCache, list[tuple[Sampled, int]]]:
    """Ends the prompt.

    Returns:
      (the logits of the token after the prompt, the prompt's cache, which must not be donated, for
      each piece the result of `Programs.score` and its number of tokens if the request has
      `prompt_logprobs`).
    """
    self._end_loading()
    row, logits, scores = self._row, self._logits, self._scores or []
    assert self.done
    assert row is not None
    assert logits is not None
    self.drop()
    return logits, row, scores

  def drop(self) -> None:
    """Forgets the prompt."""
    self._row, self._logits, self._scores, self._stops = None, None, None, []
    self._loading = None

  def _end_loading(self) -> None:
    if self._loading is not None:
      self._row, self._loading = self._loading.result(), None

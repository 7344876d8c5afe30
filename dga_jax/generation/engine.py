"""Continuous batching: requests are added at any time, and share a fixed number of slots.

The engine alternates between two kinds of device work: one piece of a waiting prompt, and one
decode chunk of all slots. Therefore the next token of a running request waits for at most one piece
of another request's prompt.
"""

import itertools
import logging
import sys
import threading
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dga_jax.generation.cache_shapes import CacheShapes
from dga_jax.generation.compile_jobs import Progress
from dga_jax.generation.kept_caches import bytes_for_kept, KeptCaches
from dga_jax.generation.programs import Programs
from dga_jax.generation.prompt_reader import (
  check_reads_pieces,
  LEAST_KEPT,
  piece_lengths,
  PromptReader,
)
from dga_jax.generation.requests import (
  Emitted,
  EngineStatus,
  EngineStoppedError,
  FinishReason,
  QueueFullError,
  Request,
  TokenLogprobs,
)
from dga_jax.generation.sampling import Sampled
from dga_jax.generation.slot_state import BatchState
from dga_jax.generation.tasks import Deliver, Dispatched, Task
from dga_jax.model import Decoder


class Engine:
  """Continues requests in `slots` slots. `submit` and `cancel` may be called from any thread.

  Either the owner calls `step` again and again, or `start` runs a thread that does.

  All shapes are fixed. Therefore the tokens of a request do not depend on the other requests, and
  everything is compiled by the constructor. A request whose logits are NaN or infinite ends there;
  the other requests continue.

  Args:
    model: a decoder of any attention kind.
    slots: sequences that run at once.
    max_length: bound on the tokens of a prompt and its continuation.
    prompt_chunk: reads prompts in pieces of this many tokens, for the attention kinds that can
      (dense; DGA with streaming selection). None reads prompts whole.
    whole_lengths: without `prompt_chunk`, the array lengths to which prompts are padded.
    decode_chunk: decode steps per host synchronization.
    pieces_per_step: pieces of prompts that are read between decode chunks; None reads prompts until
      all slots are full.
    cache_bytes: bound on the bytes of all caches on the device: those of the slots, of the prompt
      being read, and of kept prompts, which get the rest. None keeps no prompt on the device.
    host_bytes: bound on the bytes of kept prompts on the host.
    max_waiting: requests that may wait for a slot; None for no bound.
    logprobs: whether requests may ask for log probabilities.
    weights: from `compute_weights` of a decoder with the model's parameters, such as those of an
      engine with another attention kind; None makes them.
    mesh: devices that share weights and cache; None for one device.
    progress: iterates over the programs to compile, for example with a progress bar.

  Raises:
    ValueError: a size below 1, `prompt_chunk` for an attention kind that needs the whole prompt,
      slots that exceed `cache_bytes`, or a weight that overflows the dtype of the products.
  """

  def __init__(
    self,
    model: Decoder,
    *,
    slots: int,
    max_length: int,
    prompt_chunk: int | None = 256,
    whole_lengths: Collection[int] = (),
    decode_chunk: int = 4,
    pieces_per_step: int | None = 1,
    cache_bytes: int | None = None,
    host_bytes: int = 0,
    max_waiting: int | None = None,
    logprobs: bool = False,
    weights: nnx.State | None = None,
    mesh: Mesh | None = None,
    progress: Progress = iter,
  ) -> None:
    counts = (("slots", slots), ("decode_chunk", decode_chunk), ("prompt_chunk", prompt_chunk))
    for name, value in counts:
      if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1.")
    check_reads_pieces(model.config, prompt_chunk)
    self.config, self.max_length, self.slots = model.config, max_length, slots
    self._has_logprobs = logprobs
    self._decode_chunk, self._pieces_per_step = decode_chunk, pieces_per_step
    self._whole_lengths, self._max_waiting = sorted(whole_lengths), max_waiting
    pieces = () if prompt_chunk is None else piece_lengths(prompt_chunk)
    shapes = CacheShapes(model, max_length)
    kept_bytes = bytes_for_kept(cache_bytes, shapes, slots)
    self.programs = Programs(
      model,
      shapes=shapes,
      slots=slots,
      whole_lengths=() if pieces else self._whole_lengths,
      piece_lengths=pieces,
      decode_chunk=decode_chunk,
      logprobs=logprobs,
      weights=weights,
      mesh=mesh,
      progress=progress,
    )
    self._kept = KeptCaches(self.programs, device_bytes=kept_bytes, host_bytes=host_bytes)
    self._reader = PromptReader(self.programs, pieces, self._kept) if pieces else None
    self._changed = threading.Condition()
    self._thread: threading.Thread | None = None
    self._closed = False
    self.error: BaseException | None = None
    self.reset()

  # ---- From any thread

  def submit(self, request: Request, deliver: Deliver | None = None) -> int:
    """Adds a request.

    Args:
      request: the request.
      deliver: called on the engine's thread with everything that the request emits.

    Returns:
      The number of the request, which `Emitted.request` and `cancel` use.

    Raises:
      ValueError: the request does not fit the model or the cache.
      QueueFullError: `max_waiting` requests wait.
      EngineStoppedError: the engine is closed, or has failed.
    """
    request.check("the prompt", self.config.vocab_size, self.max_length)
    if request.sampling.top_logprobs is not None and not self._has_logprobs:
      raise ValueError(
        f"top_logprobs is {request.sampling.top_logprobs}, but this engine computes no log"
        " probabilities: leave it out, or make the engine with logprobs=True."
      )
    if request.prompt_logprobs and self._reader is None:
      raise ValueError("prompt_logprobs is True, but this engine reads prompts whole.")
    with self._changed:
      if self._closed or self.error is not None:
        raise EngineStoppedError("The engine does not run.")
      if len(self._tasks) >= self.capacity:
        raise QueueFullError(
          f"{self.slots} requests run and {self._max_waiting} wait; try again later."
        )
      task = Task(next(self._numbers), request, deliver)
      self._tasks[task.number] = task
      self._waiting.append(task)
      self._changed.notify_all()
    return task.number

  def cancel(self, number: int) -> None:
    """Ends a request before the next decode chunk; does nothing if it has ended."""
    with self._changed:
      if number in self._tasks:
        self._cancelled.add(number)
        self._changed.notify_all()

  def read_ahead(self, tokens: Sequence[int]) -> None:
    """Reads tokens while no prompt waits, and keeps their cache for a prompt that begins with them.

    For an answer that is over after some of its tokens, when the slot's cache has more of them.
    Without room for kept caches it does nothing. Of many calls the engine remembers the last ones.
    """
    if self._reader is not None and self._kept.enabled and len(tokens) >= LEAST_KEPT:
      with self._changed:
        if not self._closed and self.error is None:
          self._ahead.append(Task(-1, Request(tokens, 1), None))
          self._changed.notify_all()

  @property
  def capacity(self) -> int:
    """Requests that can be in the engine at a time."""
    return sys.maxsize if self._max_waiting is None else self.slots + self._max_waiting

  def status(self) -> EngineStatus:
    """The load of this moment."""
    with self._changed:
      running, tasks = len(self._owner), len(self._tasks)
    return EngineStatus(
      running=running,
      waiting=max(0, tasks - running),
      kept=len(self._kept),
      slot_bytes=self.slots * self.programs.shapes.row_bytes,
      kept_device_bytes=self._kept.device_bytes,
      kept_host_bytes=self._kept.host_bytes,
    )

  def start(self) -> None:
    """Runs a thread that calls `step` whenever there is work, until `close`."""
    self._closed, self.error = False, None
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._thread.start()

  def close(self) -> None:
    """Stops the thread and cancels every request."""
    with self._changed:
      self._closed = True
      self._changed.notify_all()
    if self._thread is not None:
      self._thread.join()
    self._end_all("cancelled")

  # ---- On the thread that calls `step`

  def reset(self) -> None:
    """Drops every request without a call of `deliver`, and numbers new requests from 0."""
    self._numbers = itertools.count()
    self._tasks: dict[int, Task] = {}  # Requests that have not ended.
    self._cancelled: set[int] = set()
    self._waiting: deque[Task] = deque()
    self._ahead: deque[Task] = deque(maxlen=self.slots)  # See `read_ahead`.
    self._reading: Task | None = None
    self._owner: dict[int, Task] = {}  # The request of each slot in use.
    self._dispatched: deque[Dispatched] = deque()
    self._state: BatchState | None = None
    self.chunks = 0
    self._kept.clear()
    self._drop_reading()

  @property
  def busy(self) -> bool:
    """Whether `step` has work."""
    return bool(self._tasks or self._dispatched or self._reading or self._ahead)

  def step(self) -> list[Emitted]:
    """Reads pieces of prompts, dispatches a decode chunk, and returns the chunk before it."""
    emitted = self._end_cancelled()
    pieces = itertools.count() if self._pieces_per_step is None else range(self._pieces_per_step)
    for _ in pieces:
      if not self._read():
        break
    self._decode()
    # The device computes the newest entry while the host reads the older ones.
    while self._dispatched and (len(self._dispatched) > 1 or not self._owner):
      emitted += [self._emit(*result) for result in self._dispatched.popleft().read()]
    return emitted

  def _run(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._closed or self.busy)
        if self._closed:
          return
      try:
        self.step()
      except Exception as error:
        logging.exception("the engine has failed")
        with self._changed:
          self.error = error
        self._end_all("failed")
        return

  def _read(self) -> bool:
    """Does the next work on a waiting prompt; returns whether there was any."""
    if self._reading is not None and self._reading.number < 0 and self._waiting:
      self._drop_reading()  # A prompt does not wait for what is read ahead.
    if self._reading is None:
      task = self._next_to_read()
      if task is None:
        return False
      if self._reader is None:
        self._admit_whole(task)
        return True
      self._reading = task
      task.cached_tokens = self._reader.begin(task.request)
    assert self._reader is not None
    if self._reader.waits and self._owner:
      return False  # Decoding continues while a kept cache is copied to the device.
    if not self._reader.done:
      self._reader.read_piece()
    if self._reader.done:
      task, self._reading = self._reading, None
      logits, row, task.prompt_scores = self._reader.take()
      if task.number < 0:
        return True
      slot = self._free_slot()
      new, self._state = self.programs.insert(self._take_state(), logits, row, slot, task.request)
      self._occupy(slot, task, new)
    return True

  def _next_to_read(self) -> Task | None:
    with self._changed:
      if self._waiting:
        return self._waiting.popleft() if len(self._owner) < self.slots else None
      return self._ahead.popleft() if self._ahead else None

  def _admit_whole(self, task: Task) -> None:
    count, slot = len(task.request.prompt), self._free_slot()
    length = next(length for length in self._whole_lengths if length >= count)
    new, self._state = self.programs.admit(self._take_state(), task.request, length, slot)
    self._occupy(slot, task, new)

  def _take_state(self) -> BatchState:
    """The state of all slots, for a program that takes over its buffers."""
    state, self._state = self._state, None
    return self.programs.empty() if state is None else state

  def _free_slot(self) -> int:
    return next(slot for slot in range(self.slots) if slot not in self._owner)

  def _occupy(self, slot: int, task: Task, first: Sampled) -> None:
    """Assigns a slot to a request. The device computes its first token."""
    task.scheduled = 1
    self._dispatched.append(Dispatched({0: task}, first))
    if task.request.max_new_tokens > 1:
      self._owner[slot] = task

  def _decode(self) -> None:
    if not self._owner:
      return
    in_use_B = np.isin(np.arange(self.slots), list(self._owner))
    new, self._state = self.programs.decode(self._take_state(), in_use_B)
    self.chunks += 1
    self._dispatched.append(Dispatched(dict(self._owner), new))
    for slot, task in list(self._owner.items()):
      task.scheduled += self._decode_chunk
      if task.scheduled >= task.request.max_new_tokens:
        self._copy_row(slot, task)  # Another request may get the slot before the tokens arrive.
        del self._owner[slot]

  def _emit(
    self,
    task: Task,
    tokens: list[int],
    finish: FinishReason | None,
    logprobs: list[TokenLogprobs],
  ) -> Emitted:
    task.tokens += tokens
    task.finish = finish
    if finish is not None:
      slots = [slot for slot, owner in self._owner.items() if owner is task]
      if finish == "stop" and slots:
        self._copy_row(slots[0], task)
      self._keep_answer(task)
      with self._changed:
        self._tasks.pop(task.number, None)
        self._cancelled.discard(task.number)
        for slot in slots:
          del self._owner[slot]
    emitted = Emitted(
      task.number, tokens, finish, logprobs, task.cached_tokens, task.take_prompt_logprobs()
    )
    if task.deliver is not None:
      task.deliver(emitted)
    return emitted

  def _copy_row(self, slot: int, task: Task) -> None:
    """Copies the cache of a slot at the end of its request, if kept caches have room."""
    if self._reader is not None and self._kept.reserve():
      assert self._state is not None
      task.row = self.programs.take_row(self._state, slot)

  def _keep_answer(self, task: Task) -> None:
    """Keeps the cache of a prompt and its answer for the next turn."""
    row, task.row = task.row, None
    if row is None:
      return
    tokens = task.tokens_in_cache()
    if task.finish in ("stop", "length") and len(tokens) >= LEAST_KEPT:
      self._kept.keep_answer(tokens, task.request.last_kept, row)
    else:
      self._kept.release()

  def _end_cancelled(self) -> list[Emitted]:
    with self._changed:
      cancelled = [self._tasks[number] for number in sorted(self._cancelled)]
      for task in cancelled:
        if task in self._waiting:
          self._waiting.remove(task)
    if self._reading in cancelled:
      self._drop_reading()
    return [self._emit(task, [], "cancelled", []) for task in cancelled]

  def _drop_reading(self) -> None:
    self._reading = None
    if self._reader is not None:
      self._reader.drop()

  def _end_all(self, finish: FinishReason) -> None:
    """Ends every request, and drops all caches."""
    with self._changed:
      tasks = list(self._tasks.values())
    for task in tasks:
      self._emit(task, [], finish, [])
    self.reset()

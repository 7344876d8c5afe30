"""The compiled programs of generation: read prompts, insert them into slots, decode all slots."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dga_jax.generation.cache_shapes import CacheShapes, content_bytes, hold_lengths
from dga_jax.generation.compile_jobs import compile_jobs, Job, Progress
from dga_jax.generation.placement import Placement
from dga_jax.generation.requests import pad_prompt, Request
from dga_jax.generation.sampling import sample_with_logprobs, Sampled, token_logprobs
from dga_jax.generation.slot_state import BatchState, SlotSettings
from dga_jax.generation.weights import compute_weights, unstacked_structure
from dga_jax.model import Decoder
from dga_jax.model.decoder import DecoderCache
from pallas_kernels.dispatch import find_target

_SCORED_ROWS = 64  # Tokens whose logits `Programs.score` has at a time.


def decode_options() -> dict[str, bool | int]:
  """XLA options for a decoding program; empty except for GPUs from Ampere on.

  The options merge the products of query, key and value into one kernel, and those of gate and up
  into another. XLA's Triton products read merged weights in place; other products would copy the
  weights side by side first, for every token.
  """
  if not find_target().runs_triton:
    return {}
  return {"xla_gpu_dot_merger_threshold_mb": 512, "xla_gpu_enable_triton_gemm": True}


class Programs:
  """The programs of a batch of slots, compiled by the constructor; they update slots in place.

  A prompt is read whole by `admit`, or piece by piece: `empty_row` or `copy_row`, `extend`, then
  `insert`. `take_row` copies the cache of a slot, for programs that read pieces.

  Args:
    model: a decoder. The programs keep its weights in the dtype of the products.
    shapes: of the model's cache.
    slots: sequences that run at once.
    whole_lengths: the array lengths of prompts that `admit` reads.
    piece_lengths: the array lengths of pieces that `extend` reads.
    decode_chunk: tokens that one call of `decode` samples for every slot.
    logprobs: whether sampled tokens have log probabilities.
    weights: see `Engine`.
    mesh: devices that share the weights and the cache by `ShardingRules`; None for one device.
    progress: iterates over the programs to compile, for example with a progress bar.

  Raises:
    ValueError: a weight that overflows the dtype of the products, or pieces for an attention kind
      that reads whole prompts.

  Attributes:
    shapes: of caches.
    state_bytes: bytes of keys and values of all slots.
  """

  def __init__(
    self,
    model: Decoder,
    *,
    shapes: CacheShapes,
    slots: int,
    whole_lengths: Collection[int] = (),
    piece_lengths: Collection[int] = (),
    decode_chunk: int,
    logprobs: bool = False,
    weights: nnx.State | None = None,
    mesh: Mesh | None = None,
    progress: Progress = iter,
  ) -> None:
    self.shapes, self._decode_chunk = shapes, decode_chunk
    self._has_logprobs = logprobs
    self._sample = functools.partial(sample_with_logprobs, logprobs=logprobs)
    self._params = compute_weights(model, mesh) if weights is None else weights
    self._graphdef = unstacked_structure(model, self._params)
    self._axes = shapes.batch_axes()
    self._placement = Placement(mesh, self._axes, model.config)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
      jobs = self._jobs(model, slots, whole_lengths, piece_lengths)
      self._compiled = compile_jobs(jobs, progress)

  def _jobs(
    self, model: Decoder, slots: int, whole_lengths: Collection[int], pieces: Collection[int]
  ) -> list[Job]:
    one, slot = _shape(1), _shape()
    settings = jax.eval_shape(lambda: SlotSettings.empty(1))
    prompts = {length: (self._params, _shape(1, length), one) for length in whole_lengths}
    row = self._placement.cache_shapes(self.shapes.rows(1))
    rows = [row] if pieces else []
    rows += [jax.eval_shape(self._prefill, *prompt)[1] for prompt in prompts.values()]
    empty, state = self._empty_slots(slots, rows)
    self.state_bytes = content_bytes(state.cache)
    jobs = [Job("empty", empty, ())]
    jobs += [
      Job(f"admit {length}", self._admit, (state, *prompt, slot, settings), (0,))
      for length, prompt in prompts.items()
    ]
    if pieces:
      logits = _shape(1, model.config.vocab_size, dtype=jnp.float32)
      jobs += [
        Job("empty row", self._empty_row, ()),
        Job("copy row", _copy, (row,)),
        Job("insert", self._insert, (state, logits, row, slot, settings), (0,)),
        Job("take row", self._take_row, (state.cache, slot)),
      ]
    for length in pieces:
      shapes = (row, self._params, _shape(1, length), one)
      jobs.append(Job(f"extend {length}", self._extend, shapes, (0,)))
    if pieces and self._has_logprobs:
      piece = _shape(1, max(pieces))
      jobs.append(Job("score", self._score, (row, self._params, piece, piece, one), (0,)))
    slots_in_use = _shape(slots, dtype=jnp.bool_)
    decode = (state, self._params, slots_in_use)
    return [*jobs, Job("decode", self._decode, decode, (0,), decode_options())]

  @property
  def count(self) -> int:
    """Programs compiled. No program is compiled later: each refuses arrays of other shapes."""
    return len(self._compiled)

  def empty(self) -> BatchState:
    """Slots without a sequence."""
    state: BatchState = self._compiled["empty"]()
    return state

  def empty_row(self) -> DecoderCache:
    """The cache of one sequence without tokens."""
    row: DecoderCache = self._compiled["empty row"]()
    return row

  def copy_row(self, row: DecoderCache) -> DecoderCache:
    """A copy that can be donated."""
    copied: DecoderCache = self._compiled["copy row"](row)
    return copied

  def load_row(self, leaves: list[np.ndarray]) -> DecoderCache:
    """A row on the device, from the host's arrays in the order of `jax.tree.leaves`.

    It waits for the copy, so that no program on the device waits for it. Any thread may call it.
    """
    ((shardings,), _) = self._compiled["copy row"].input_shardings
    row = jax.tree.unflatten(jax.tree.structure(self.shapes.rows(1)), leaves)
    # The result has buffers of its own, which can be donated; those of `placed` may be the host's.
    placed = jax.block_until_ready(jax.device_put(row, shardings))
    return self.copy_row(placed)

  def extend(
    self, row: DecoderCache, piece_1xT: Int[np.ndarray, "1 T"], count: int
  ) -> tuple[Float[Array, "1 V"], DecoderCache]:
    """Appends the first `count` tokens of a piece to a row, whose buffers are donated.

    Returns:
      (the logits of the token after them, the new row).
    """
    run = self._compiled[f"extend {piece_1xT.shape[1]}"]
    extended: tuple[Array, DecoderCache] = run(
      row, self._params, piece_1xT, np.array([count], np.int32)
    )
    return extended

  def score(
    self,
    row: DecoderCache,
    piece_1xT: Int[np.ndarray, "1 T"],
    next_1xT: Int[np.ndarray, "1 T"],
    count: int,
  ) -> tuple[Sampled, Float[Array, "1 V"], DecoderCache]:
    """As `extend` with a piece of the longest length, and the log probabilities of given tokens.

    Args:
      row: to append to; its buffers are donated.
      piece_1xT: the tokens to append.
      next_1xT: for each of them, the token after it.
      count: tokens of the piece.

    Returns:
      (the tokens after the piece's tokens with their log probabilities [T], the logits of the token
      after the piece, the new row).
    """
    scored: tuple[Sampled, Array, DecoderCache] = self._compiled["score"](
      row, self._params, piece_1xT, next_1xT, np.array([count], np.int32)
    )
    return scored

  def insert(
    self,
    state: BatchState,
    logits_1xV: Float[Array | np.ndarray, "1 V"],
    row: DecoderCache,
    slot: int,
    request: Request,
  ) -> tuple[Sampled, BatchState]:
    """Samples a prompt's first token and writes its cache into a free slot; donates the state."""
    run, settings = self._compiled["insert"], SlotSettings.from_request(request)
    inserted: tuple[Sampled, BatchState] = run(state, logits_1xV, row, np.int32(slot), settings)
    return inserted

  def take_row(self, state: BatchState, slot: int) -> DecoderCache:
    """A copy of the cache of a slot."""
    row: DecoderCache = self._compiled["take row"](state.cache, np.int32(slot))
    return row

  def admit(
    self, state: BatchState, request: Request, length: int, slot: int
  ) -> tuple[Sampled, BatchState]:
    """Prefills a right-padded prompt into a free slot and samples its first token.

    Args:
      state: of all slots; its buffers are donated.
      request: with the prompt.
      length: one of `whole_lengths`, to which the prompt is padded.
      slot: a free slot.
    """
    count = np.array([len(request.prompt)], np.int32)
    where = (np.int32(slot), SlotSettings.from_request(request))
    run, prompt = self._compiled[f"admit {length}"], pad_prompt(request.prompt, length)
    admitted: tuple[Sampled, BatchState] = run(state, self._params, prompt, count, *where)
    return admitted

  def decode(
    self, state: BatchState, in_use_B: Bool[np.ndarray, "B"]
  ) -> tuple[Sampled, BatchState]:
    """Samples the next T = `decode_chunk` tokens of every slot; the state's buffers are donated.

    Args:
      state: of all slots.
      in_use_B: the slots with a request. The other slots are emptied, so that the decode step does
        not read their caches.
    """
    decoded: tuple[Sampled, BatchState] = self._compiled["decode"](state, self._params, in_use_B)
    return decoded

  def _model(self, params: Any) -> Decoder:
    model: Decoder = nnx.merge(self._graphdef, params)
    return model

  def _prefill(self, params: Any, prompt_1xL: Array, length_1: Array) -> tuple[Array, DecoderCache]:
    return self._model(params).prefill(prompt_1xL, length_1, max_length=self.shapes.max_length)

  def _admit(
    self,
    state: BatchState,
    params: Any,
    prompt_1xL: Array,
    length_1: Array,
    slot: Array,
    settings: SlotSettings,
  ) -> tuple[Sampled, BatchState]:
    return self._insert(state, *self._prefill(params, prompt_1xL, length_1), slot, settings)

  def _empty_row(self) -> DecoderCache:
    return self._placement.cache(self._model(self._params).init_cache(1, self.shapes.max_length))

  def _extend(
    self, row: DecoderCache, params: Any, piece_1xT: Array, count_1: Array
  ) -> tuple[Array, DecoderCache]:
    logits_1xV, row = self._model(params).extend(piece_1xT, row, count_1)
    return self._placement.logits(logits_1xV), self._placement.cache(row)

  def _score(
    self, row: DecoderCache, params: Any, piece_1xT: Array, next_1xT: Array, count_1: Array
  ) -> tuple[Sampled, Array, DecoderCache]:
    model = self._model(params)
    states_1xTxE, row = model.extend_hidden(piece_1xT, row, count_1)
    unembed = model.unembedder()

    def logprobs(part: tuple[Array, Array]) -> Sampled:
      return token_logprobs(self._placement.logits(unembed(part[0])), part[1])

    # Logits of few tokens at a time: those of a whole piece take much memory.
    rows = math.gcd(_SCORED_ROWS, piece_1xT.shape[1])
    parts = (states_1xTxE.reshape(-1, rows, states_1xTxE.shape[2]), next_1xT.reshape(-1, rows))
    scored = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(logprobs, parts))
    last_1xE = jnp.take_along_axis(states_1xTxE, count_1[:, None, None] - 1, axis=1)[:, 0]
    logits_1xV = self._placement.logits(unembed(last_1xE))
    return self._placement.whole(scored), logits_1xV, self._placement.cache(row)

  def _empty_slots(
    self, count: int, rows: list[DecoderCache]
  ) -> tuple[Callable[[], BatchState], BatchState]:
    """A function that makes empty slots into which any of the rows fits, and their shapes."""
    leaves = [
      self._widest(shapes, axis, count)
      for axis, *shapes in zip(self._axes, *map(jax.tree.leaves, rows), strict=True)
    ]
    cache = jax.tree.unflatten(jax.tree.structure(rows[0]), leaves)

    def empty() -> BatchState:
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)
      zero_B = jnp.zeros(count, jnp.int32)
      return self._place(BatchState(zeros, zero_B, zero_B, SlotSettings.empty(count)))

    state = jax.eval_shape(empty)
    return empty, dataclasses.replace(state, cache=self._placement.cache_shapes(state.cache))

  def _widest(
    self, shapes: list[jax.ShapeDtypeStruct], axis: int | None, count: int
  ) -> jax.ShapeDtypeStruct:
    shape = np.max([shape.shape for shape in shapes], axis=0).tolist()
    if axis is not None:
      shape[axis] = count
    return jax.ShapeDtypeStruct(tuple(shape), shapes[0].dtype)

  def _decode(self, state: BatchState, params: Any, in_use_B: Array) -> tuple[Sampled, BatchState]:
    model, placement = self._model(params), self._placement
    state = state.without_requests(~in_use_B, self._axes)

    def step(state: BatchState, _: None) -> tuple[BatchState, Sampled]:
      ended_B = state.ended()
      logits_BxV, cache = model.decode(state.token, state.cache)
      logits_BxV = placement.logits(logits_BxV)
      new = self._sample(logits_BxV, state.settings.sampling, state.sampled)
      # Decoding wrote one token after the cache's last one. With the earlier length, no query
      # sees the written entries, and the next tokens of the sequence overwrite them.
      cache = hold_lengths(state.cache, cache, self._axes, ended_B)
      token_B = jnp.where(ended_B, state.token, new.token)
      sampled_B = state.sampled + ~ended_B
      return BatchState(placement.cache(cache), token_B, sampled_B, state.settings), new

    state, new = jax.lax.scan(step, state, None, length=self._decode_chunk)
    return placement.whole(new), self._place(state)

  def _insert(
    self,
    state: BatchState,
    logits_1xV: Array,
    row: DecoderCache,
    slot: Array,
    settings: SlotSettings,
  ) -> tuple[Sampled, BatchState]:
    first = self._sample(logits_1xV, settings.sampling, jnp.zeros(1, jnp.int32))
    leaves, structure = jax.tree.flatten(state.cache)
    cache = jax.tree.unflatten(
      structure,
      [
        _write_row(every, one, slot, axis)
        for every, one, axis in zip(leaves, jax.tree.leaves(row), self._axes, strict=True)
      ],
    )

    def write(all_rows: Array, one_row: Array) -> Array:
      return all_rows.at[slot].set(one_row[0])

    new = BatchState(
      cache=cache,
      token=write(state.token, first.token),
      sampled=write(state.sampled, jnp.ones(1, jnp.int32)),
      settings=jax.tree.map(write, state.settings, settings),
    )
    return self._placement.whole(jax.tree.map(lambda x: x[None], first)), self._place(new)

  def _take_row(self, cache: DecoderCache, slot: Array) -> DecoderCache:
    leaves, structure = jax.tree.flatten(cache)
    row = [
      leaf if axis is None else jax.lax.dynamic_slice_in_dim(leaf, slot, 1, axis)
      for leaf, axis in zip(leaves, self._axes, strict=True)
    ]
    return self._placement.cache(jax.tree.unflatten(structure, row))

  def _place(self, state: BatchState) -> BatchState:
    rest = self._placement.whole((state.token, state.sampled, state.settings))
    return BatchState(self._placement.cache(state.cache), *rest)


def _write_row(all_rows: Array, one_row: Array, slot: Array, axis: int | None) -> Array:
  """Writes the cache of a sequence, padded with zeros, into a slot."""
  if axis is None:
    return all_rows
  missing = [(0, whole - own) for whole, own in zip(all_rows.shape, one_row.shape, strict=True)]
  missing[axis] = (0, 0)
  padded = jnp.pad(one_row, missing)
  return jax.lax.dynamic_update_slice_in_dim(all_rows, padded, slot, axis)


def _copy(row: DecoderCache) -> DecoderCache:
  return jax.tree.map(jnp.copy, row)


def _shape(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)

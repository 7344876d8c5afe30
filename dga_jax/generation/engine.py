"""The compiled programs of generation: prefill a prompt into a slot, decode all slots."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dga_jax.generation.sampling import sample, Sampling, SamplingParams
from dga_jax.model import Decoder
from dga_jax.model.decoder import DecoderCache
from pallas_kernels.dispatch import find_target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchState:
  """The state of all slots, on the device. The entries of a free slot have no meaning.

  Attributes:
    cache: one row a slot.
    token: the last token of each slot; the cache does not contain it yet.
    sampled: tokens sampled so far in each slot.
    sampling: the sampling settings of each slot.
  """

  cache: DecoderCache
  token: Int[Array, "B"]
  sampled: Int[Array, "B"]
  sampling: SamplingParams


def decode_options() -> dict[str, bool | int]:
  """XLA options for a decoding program; empty except for GPUs from Ampere on.

  The options merge the products of query, key and value into one kernel, and those of gate and up
  into another. XLA's Triton products read merged weights in place; other products would copy the
  weights side by side first, for every token.
  """
  if not find_target().runs_triton:
    return {}
  return {"xla_gpu_dot_merger_threshold_mb": 512, "xla_gpu_enable_triton_gemm": True}


class Engine:
  """The programs of a batch of slots, compiled by the constructor; they update slots in place.

  Args:
    model: a decoder. The engine keeps its weights in the dtype of the products.
    slots: sequences that run at once.
    max_length: tokens for which a slot's cache has room.
    padded_lengths: the array lengths of the prompts to come.
    prompt_chunk: tokens of a prompt that one program prefills; None for whole prompts.
    decode_chunk: tokens that one call of `decode` samples for every slot.

  Raises:
    ValueError: a weight that overflows the dtype of the products.
  """

  def __init__(
    self,
    model: Decoder,
    *,
    slots: int,
    max_length: int,
    padded_lengths: Collection[int],
    prompt_chunk: int | None,
    decode_chunk: int,
  ) -> None:
    # Cast before the layers are unstacked, since unstacking copies the weights.
    graphdef, params = nnx.split(model)
    model = nnx.merge(graphdef, _in_compute_dtype(params, model.config.dtype))
    self._graphdef, self._params = nnx.split(model.unstack_layers())
    self._max_length, self._prompt_chunk = max_length, prompt_chunk
    self._decode_chunk = decode_chunk
    self._compiled: dict[str, Any] = {}
    one, slot = _shape(1), _shape()
    sampling = jax.eval_shape(lambda: SamplingParams.from_samplings([Sampling()]))
    if prompt_chunk is None:
      prompts = {length: (self._params, _shape(1, length), one) for length in padded_lengths}
      rows = [jax.eval_shape(self._prefill, *prompt)[1] for prompt in prompts.values()]
      empty, state = self._empty_slots(slots, rows)
      for length, prompt in prompts.items():
        self._compile(f"admit {length}", self._admit, state, *prompt, slot, sampling, donate=0)
    else:
      row = jax.eval_shape(self._empty_row)
      empty, state = self._empty_slots(slots, [row])
      logits = _shape(1, model.config.vocab_size, dtype=jnp.float32)
      piece = _shape(1, prompt_chunk)
      self._compile("empty row", self._empty_row)
      self._compile("extend", self._extend, row, self._params, piece, one, donate=0)
      self._compile("insert", _insert, state, logits, row, slot, sampling, donate=0)
    self._compile("empty", empty)
    self._compile("decode", self._decode, state, self._params, donate=0, options=decode_options())

  @property
  def count(self) -> int:
    """Programs compiled. No program is compiled later: each refuses arrays of other shapes."""
    return len(self._compiled)

  def empty(self) -> BatchState:
    """Slots without a sequence."""
    state: BatchState = self._compiled["empty"]()
    return state

  def admit(
    self,
    state: BatchState,
    prompt_1xL: Int[np.ndarray, "1 L"],
    length: int,
    slot: int,
    sampling: Sampling,
  ) -> tuple[Int[Array, "1"], BatchState]:
    """Prefills a right-padded prompt into a slot and samples its first token.

    Args:
      state: of all slots; its buffers are donated.
      prompt_1xL: int32, with L one of `padded_lengths` or a multiple of `prompt_chunk`.
      length: tokens of the prompt without the padding.
      slot: a free slot.
      sampling: how the sequence's tokens are sampled.

    Returns:
      (the first token, the new state).
    """
    where = (np.int32(slot), SamplingParams.from_samplings([sampling]))
    if self._prompt_chunk is None:
      count = np.array([length], np.int32)
      run = self._compiled[f"admit {prompt_1xL.shape[1]}"]
      admitted: tuple[Array, BatchState] = run(state, self._params, prompt_1xL, count, *where)
      return admitted
    row, logits = self._compiled["empty row"](), None
    for begin in range(0, length, self._prompt_chunk):
      piece = prompt_1xL[:, begin : begin + self._prompt_chunk]
      count = np.array([min(self._prompt_chunk, length - begin)], np.int32)
      logits, row = self._compiled["extend"](row, self._params, piece, count)
    inserted: tuple[Array, BatchState] = self._compiled["insert"](state, logits, row, *where)
    return inserted

  def decode(self, state: BatchState) -> tuple[Int[Array, "T B"], BatchState]:
    """Samples the next T = `decode_chunk` tokens of every slot; the state's buffers are donated."""
    decoded: tuple[Array, BatchState] = self._compiled["decode"](state, self._params)
    return decoded

  def _compile(
    self,
    name: str,
    function: Callable[..., Any],
    *shapes: Any,
    donate: tuple[int, ...] | int = (),
    options: dict[str, bool | int] | None = None,
  ) -> None:
    lowered = jax.jit(function, donate_argnums=donate).lower(*shapes)
    self._compiled[name] = lowered.compile(compiler_options=options)

  def _model(self, params: Any) -> Decoder:
    model: Decoder = nnx.merge(self._graphdef, params)
    return model

  def _prefill(self, params: Any, prompt_1xL: Array, length_1: Array) -> tuple[Array, DecoderCache]:
    return self._model(params).prefill(prompt_1xL, length_1, max_length=self._max_length)

  def _admit(
    self,
    state: BatchState,
    params: Any,
    prompt_1xL: Array,
    length_1: Array,
    slot: Array,
    sampling: SamplingParams,
  ) -> tuple[Array, BatchState]:
    return _insert(state, *self._prefill(params, prompt_1xL, length_1), slot, sampling)

  def _empty_row(self) -> DecoderCache:
    return self._model(self._params).init_cache(1, self._max_length)

  def _extend(
    self, row: DecoderCache, params: Any, piece_1xT: Array, count_1: Array
  ) -> tuple[Array, DecoderCache]:
    return self._model(params).extend(piece_1xT, row, count_1)

  def _empty_slots(
    self, count: int, rows: list[DecoderCache]
  ) -> tuple[Callable[[], BatchState], BatchState]:
    """A function that makes empty slots into which any of the rows fits, and their shapes."""

    def widest(*leaves: Any) -> Any:
      shape = tuple(np.max([leaf.shape for leaf in leaves], axis=0).tolist())
      return jax.ShapeDtypeStruct((shape[0], count, *shape[2:]), leaves[0].dtype)

    layers = jax.tree.map(widest, *(row.layers for row in rows))

    def empty() -> BatchState:
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layers)
      zero_B = jnp.zeros(count, jnp.int32)
      sampling = SamplingParams.from_samplings([Sampling()] * count)
      return BatchState(DecoderCache(zeros, zero_B), zero_B, zero_B, sampling)

    return empty, jax.eval_shape(empty)

  def _decode(self, state: BatchState, params: Any) -> tuple[Array, BatchState]:
    model = self._model(params)

    def step(state: BatchState, _: None) -> tuple[BatchState, Array]:
      logits_BxV, cache = model.decode(state.token, state.cache)
      token_B = sample(logits_BxV, state.sampling, state.sampled)
      return BatchState(cache, token_B, state.sampled + 1, state.sampling), token_B

    state, token_TxB = jax.lax.scan(step, state, None, length=self._decode_chunk)
    return token_TxB, state


def _insert(
  state: BatchState, logits_1xV: Array, row: DecoderCache, slot: Array, sampling: SamplingParams
) -> tuple[Array, BatchState]:
  """Samples a prompt's first token and writes its cache into a slot."""
  token_1 = sample(logits_1xV, sampling, jnp.zeros(1, jnp.int32))

  def write(all_rows: Array, one_row: Array, axis: int) -> Array:
    missing = [(0, whole - own) for whole, own in zip(all_rows.shape, one_row.shape, strict=True)]
    missing[axis] = (0, 0)
    padded = jnp.pad(one_row, missing)
    return jax.lax.dynamic_update_slice_in_dim(all_rows, padded, slot, axis)

  def write_setting(settings_B: Array, setting_1: Array) -> Array:
    return settings_B.at[slot].set(setting_1[0])

  return token_1, BatchState(
    cache=DecoderCache(
      layers=jax.tree.map(lambda a, b: write(a, b, 1), state.cache.layers, row.layers),
      length=write(state.cache.length, row.length, 0),
    ),
    token=write(state.token, token_1, 0),
    sampled=write(state.sampled, jnp.ones(1, jnp.int32), 0),
    sampling=jax.tree.map(write_setting, state.sampling, sampling),
  )


def _in_compute_dtype(params: Any, dtype: str) -> Any:
  """Casts the weights to the dtype of the products, once; norms compute in float32.

  Raises:
    ValueError: a weight that is too large for the dtype, which only float16 can cause.
  """

  def cast(path: tuple[Any, ...], x: Array) -> Float[Array, "..."]:
    name = jax.tree_util.keystr(path)
    if "scale" in name:
      return x
    narrow = x.astype(dtype)
    if dtype == "float16" and bool((jnp.isinf(narrow) & jnp.isfinite(x)).any()):
      raise ValueError(
        f"dtype is 'float16', whose largest number is 65504, but the parameter {name} contains"
        f" {float(jnp.abs(x).max()):g}; use dtype 'bfloat16' or 'float32'."
      )
    return narrow

  return jax.tree_util.tree_map_with_path(cast, params)


def _shape(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)

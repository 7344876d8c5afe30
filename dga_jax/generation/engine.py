"""The compiled programs of a request batch: read a prompt into a slot, decode all slots."""

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
  """State of all slots, on the device. What lies in a free slot has no meaning.

  Attributes:
    cache: one row a slot.
    token: the last token of each, not yet in the cache.
    drawn: tokens drawn so far.
    controls: how they are drawn.
  """

  cache: DecoderCache
  token: Int[Array, "B"]
  drawn: Int[Array, "B"]
  controls: SamplingParams


def decode_options() -> dict[str, bool | int]:
  """Compiler options of a program that decodes: on GPUs from Ampere on, few and large products.

  Query, key and value are one product then, gate and up another: fewer kernels, each of which
  reads more at a stretch. XLA's Triton products read the weights where they lie; others would copy
  them side by side first, for every token.
  """
  if not find_target().runs_triton:
    return {}
  return {"xla_gpu_dot_merger_threshold_mb": 512, "xla_gpu_enable_triton_gemm": True}


class Engine:
  """What runs on the device, compiled when made; every program updates the slots in place.

  Args:
    model: a decoder. Its weights are kept in the dtype that they are multiplied in.
    slots: sequences under way at once.
    max_length: tokens that a slot's cache is to hold.
    padded_lengths: of the prompts that will come, as arrays.
    chunk: tokens of a prompt that are read at once; None for all.
    burst: tokens that `decode` draws for every slot.
  """

  def __init__(
    self,
    model: Decoder,
    *,
    slots: int,
    max_length: int,
    padded_lengths: Collection[int],
    chunk: int | None,
    burst: int,
  ) -> None:
    # Cast before layers are taken apart: what is copied then is half as large.
    graphdef, params = nnx.split(model)
    model = nnx.merge(graphdef, _in_compute_dtype(params, model.config.dtype))
    self._graphdef, self._params = nnx.split(model.unstack_layers())
    self._max_length, self._chunk, self._burst = max_length, chunk, burst
    self._compiled: dict[str, Any] = {}
    one, at, controls = _shape(1), _shape(), jax.eval_shape(lambda: SamplingParams.of([Sampling()]))
    if chunk is None:
      prompts = {length: (self._params, _shape(1, length), one) for length in padded_lengths}
      rows = [jax.eval_shape(self._read, *prompt)[1] for prompt in prompts.values()]
      empty, state = self._empty_slots(slots, rows)
      for length, prompt in prompts.items():
        self._compile(f"admit {length}", self._admit, state, *prompt, at, controls, donate=0)
    else:
      row = jax.eval_shape(self._empty_row)
      empty, state = self._empty_slots(slots, [row])
      logits = _shape(1, model.config.vocab_size, dtype=jnp.float32)
      self._compile("empty row", self._empty_row)
      self._compile("extend", self._extend, row, self._params, _shape(1, chunk), one, donate=0)
      self._compile("insert", _insert, state, logits, row, at, controls, donate=0)
    self._compile("empty", empty)
    self._compile("decode", self._decode, state, self._params, donate=0, options=decode_options())

  @property
  def count(self) -> int:
    """Programs compiled. Each refuses other shapes than its own, so none is compiled later."""
    return len(self._compiled)

  def empty(self) -> BatchState:
    """Slots without a sequence."""
    slots: BatchState = self._compiled["empty"]()
    return slots

  def admit(
    self, slots: BatchState, prompt_1xL: Int[np.ndarray, "1 L"], length: int, at: int, how: Sampling
  ) -> tuple[Int[Array, "1"], BatchState]:
    """Reads a right-padded prompt into slot `at` and draws its first token."""
    place = (np.int32(at), SamplingParams.of([how]))
    if self._chunk is None:
      count = np.array([length], np.int32)
      run = self._compiled[f"admit {prompt_1xL.shape[1]}"]
      admitted: tuple[Array, BatchState] = run(slots, self._params, prompt_1xL, count, *place)
      return admitted
    row, logits = self._compiled["empty row"](), None
    for begin in range(0, length, self._chunk):
      piece = prompt_1xL[:, begin : begin + self._chunk]
      count = np.array([min(self._chunk, length - begin)], np.int32)
      logits, row = self._compiled["extend"](row, self._params, piece, count)
    inserted: tuple[Array, BatchState] = self._compiled["insert"](slots, logits, row, *place)
    return inserted

  def decode(self, slots: BatchState) -> tuple[Int[Array, "burst B"], BatchState]:
    """The next tokens of every slot."""
    decoded: tuple[Array, BatchState] = self._compiled["decode"](slots, self._params)
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

  def _read(self, params: Any, prompt_1xL: Array, length_1: Array) -> tuple[Array, DecoderCache]:
    return self._model(params).prefill(prompt_1xL, length_1, max_length=self._max_length)

  def _admit(
    self,
    slots: BatchState,
    params: Any,
    prompt_1xL: Array,
    length_1: Array,
    at: Array,
    controls: SamplingParams,
  ) -> tuple[Array, BatchState]:
    return _insert(slots, *self._read(params, prompt_1xL, length_1), at, controls)

  def _empty_row(self) -> DecoderCache:
    return self._model(self._params).init_cache(1, self._max_length)

  def _extend(
    self, row: DecoderCache, params: Any, piece_1xT: Array, count_1: Array
  ) -> tuple[Array, DecoderCache]:
    return self._model(params).extend(piece_1xT, row, count_1)

  def _empty_slots(
    self, count: int, rows: list[DecoderCache]
  ) -> tuple[Callable[[], BatchState], BatchState]:
    """What makes empty slots that any of the rows fits into, and their shapes."""

    def widest(*leaves: Any) -> Any:
      shape = tuple(np.max([leaf.shape for leaf in leaves], axis=0).tolist())
      return jax.ShapeDtypeStruct((shape[0], count, *shape[2:]), leaves[0].dtype)

    layers = jax.tree.map(widest, *(row.layers for row in rows))

    def empty() -> BatchState:
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layers)
      none_B = jnp.zeros(count, jnp.int32)
      return BatchState(
        DecoderCache(zeros, none_B), none_B, none_B, SamplingParams.of([Sampling()] * count)
      )

    return empty, jax.eval_shape(empty)

  def _decode(self, slots: BatchState, params: Any) -> tuple[Array, BatchState]:
    model = self._model(params)

    def step(slots: BatchState, _: None) -> tuple[BatchState, Array]:
      logits_BxV, cache = model.decode(slots.token, slots.cache)
      token_B = sample(logits_BxV, slots.controls, slots.drawn)
      return BatchState(cache, token_B, slots.drawn + 1, slots.controls), token_B

    slots, tokens = jax.lax.scan(step, slots, None, length=self._burst)
    return tokens, slots


def _insert(
  slots: BatchState, logits_1xV: Array, row: DecoderCache, at: Array, controls: SamplingParams
) -> tuple[Array, BatchState]:
  """Draws a prompt's first token and puts its cache into slot `at`."""
  token_1 = sample(logits_1xV, controls, jnp.zeros(1, jnp.int32))

  def put(all_rows: Array, one_row: Array, axis: int) -> Array:
    short = [(0, whole - own) for whole, own in zip(all_rows.shape, one_row.shape, strict=True)]
    short[axis] = (0, 0)
    return jax.lax.dynamic_update_slice_in_dim(all_rows, jnp.pad(one_row, short), at, axis)

  def put_key(all_keys: Array, key: Array) -> Array:
    return all_keys.at[at].set(key[0])

  old = slots.controls
  return token_1, BatchState(
    cache=DecoderCache(
      layers=jax.tree.map(lambda a, b: put(a, b, 1), slots.cache.layers, row.layers),
      length=put(slots.cache.length, row.length, 0),
    ),
    token=put(slots.token, token_1, 0),
    drawn=put(slots.drawn, jnp.ones(1, jnp.int32), 0),
    controls=jax.tree.map(put_key, old, controls),
  )


def _in_compute_dtype(params: Any, dtype: str) -> Any:
  """Weights as they are multiplied, so that no step has to cast them; norms compute in float32."""

  def cast(path: tuple[Any, ...], x: Array) -> Float[Array, "..."]:
    is_norm = any("scale" in str(entry) for entry in path)
    return x if is_norm else x.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def _shape(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)

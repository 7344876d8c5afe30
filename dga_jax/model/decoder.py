"""The decoder: embedding, stacked layers run by one scan, unembedding; training and decoding."""

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dga_jax.attention import validation
from dga_jax.attention.segments import find_documents
from dga_jax.model.attention_kinds import AttentionKind, ExtendingKind, make_attention
from dga_jax.model.config import ModelConfig
from dga_jax.model.layers import constrain_residual, DecoderLayer, rms_norm, weight
from dga_jax.model.logits import logits
from dga_jax.model.on_mesh import on_mesh
from dga_jax.model.rope import inverse_frequencies, rope_table, RopeTable
from dga_jax.model.sharded_attention import attend_on_mesh
from dga_jax.sharding import fsdp_all_gather, zigzag_order

_REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
  """State of decoding.

  Attributes:
    layers: the attention kind's cache of one layer, each array with a leading axis of layers.
    length: tokens that each sequence has seen, so the position of its next one.
  """

  layers: Any
  length: Int[Array, "B"]


class Decoder(nnx.Module):
  """LLaMA-family language model over token ids.

  Every parameter names its axes in its metadata (`out_sharding`): "layers" for the stacked one,
  and "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab".
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
    self.config = config
    V, E = config.vocab_size, config.embed_dim
    # A tied table also makes logits, whose fan-in is E. Otherwise tokens start at the scale 1 of
    # what layers add to them: smaller, and attention learns to tell them apart much later.
    fan_in = (1,) if config.tie_embeddings else ()
    self.embedding = weight(config, (V, E), ("vocab", "embed"), inputs=fan_in, rngs=rngs)
    self.layers: DecoderLayer | nnx.List[DecoderLayer] = _stacked_layers(config, rngs=rngs)
    self.norm = rms_norm(config, rngs=rngs)
    if not config.tie_embeddings:
      self.unembedding = weight(config, (E, V), ("embed", "vocab"), inputs=(0,), rngs=rngs)

  @on_mesh("batch", None, "vocab")
  def __call__(
    self,
    tokens_BxL: Int[Array, "B L"],
    *,
    segment_ids: Int[Array, "B L"] | None = None,
    lengths: Int[Array, "B"] | None = None,
  ) -> Float[Array, "B L V"]:
    """Logits of the token after each position, float32; arguments as for `hidden`."""
    states_BxLxE = self.hidden(tokens_BxL, segment_ids=segment_ids, lengths=lengths)
    order_L = zigzag_order(states_BxLxE.shape[1])
    if order_L is not None:
      states_BxLxE = states_BxLxE[:, np.argsort(order_L)]
    return self.unembed(states_BxLxE)

  @on_mesh("batch", "length", None)
  def hidden(
    self,
    tokens_BxL: Int[Array, "B L"],
    *,
    segment_ids: Int[Array, "B L"] | None = None,
    lengths: Int[Array, "B"] | None = None,
  ) -> Float[Array, "B L E"]:
    """Final normalised states, before the unembedding.

    With `unembed` on slices of it, a loss never holds all [B, L, V] float32 logits at once.

    Args:
      tokens_BxL: token ids.
      segment_ids: packed documents, consecutive runs of equal ids; negative ids are padding.
        Tokens attend, and positions count, inside their own document.
      lengths: tokens of each right-padded row.

    Returns:
      [B, L, E] in config.dtype. States of padding have no meaning. On a mesh with a context axis
      they stand in the order of `dga_jax.sharding.zigzag_order`.

    Raises:
      ValueError: a wrong rank, shape or dtype, an empty sequence, or (outside jit) lengths
        beyond L.
    """
    _check_inputs(tokens_BxL, segment_ids, lengths)
    tokens_BxL, segment_ids, lengths = jax.tree.map(jnp.asarray, (tokens_BxL, segment_ids, lengths))
    kind = self._attention_kind()

    def attend(q_BxLxHxD: Array, k_BxLxNxD: Array, v_BxLxNxD: Array, *_: Any) -> tuple[Array, None]:
      o_BxLxHxD = attend_on_mesh(
        kind, q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, segment_ids=segment_ids, lengths=lengths
      )
      return o_BxLxHxD, None

    B, L = tokens_BxL.shape
    positions_BxL = find_documents(B, L, None, segment_ids).position
    order_L = zigzag_order(L)
    if order_L is not None:
      tokens_BxL, positions_BxL = tokens_BxL[:, order_L], positions_BxL[:, order_L]
    states_BxLxE, _ = self._run_layers(tokens_BxL, positions_BxL, attend)
    return states_BxLxE

  @on_mesh(..., "vocab")
  def unembed(self, states: Float[Array, "*S E"]) -> Float[Array, "*S V"]:
    """Logits of states from `hidden`, accumulated and returned in float32."""
    return self.unembedder()(states)

  def unembedder(self) -> Callable[[Float[Array, "*S E"]], Float[Array, "*S V"]]:
    """`unembed` with its table gathered from the devices that store it, once for many calls."""
    config = self.config
    table_ExV = self.embedding[...].T if config.tie_embeddings else self.unembedding[...]
    table_ExV = fsdp_all_gather(table_ExV, ("embed", "vocab"))
    return lambda states: logits(states, table_ExV.astype(config.dtype))

  def init_cache(self, batch_size: int, max_length: int) -> DecoderCache:
    """An empty cache that holds sequences of up to `max_length` tokens, prompt included."""
    if batch_size < 1 or max_length < 1:
      raise ValueError(
        f"init_cache got batch_size={batch_size}, max_length={max_length}; both must be at least 1."
      )
    config = self.config
    layer = self._attention_kind().init_cache(
      batch_size, max_length, config.num_kv_heads, config.head_dim, jnp.dtype(config.dtype)
    )
    layers = jax.tree.map(
      lambda array: jnp.broadcast_to(array[None], (config.num_layers, *array.shape)), layer
    )
    return DecoderCache(layers=layers, length=jnp.zeros(batch_size, jnp.int32))

  def prefill(
    self,
    tokens_BxL: Int[Array, "B L"],
    lengths_B: Int[Array, "B"] | None = None,
    *,
    max_length: int,
  ) -> tuple[Float[Array, "B V"], DecoderCache]:
    """Reads right-padded prompts.

    Args:
      tokens_BxL: token ids.
      lengths_B: tokens of each prompt, from 1 to L; None if all have L.
      max_length: tokens that the cache is to hold for a sequence, prompt included.

    Returns:
      The float32 logits of each prompt's last token, and the cache to decode from.

    Raises:
      ValueError: as for `hidden`, and if L exceeds max_length.
    """
    _check_inputs(tokens_BxL, None, lengths_B)
    B, L = tokens_BxL.shape
    if max_length < L:
      raise ValueError(
        f"max_length is {max_length}, but tokens hold prompts of up to {L} tokens: raise "
        "max_length (prompt and new tokens together) or shorten the prompts."
      )
    tokens_BxL, lengths_B = jax.tree.map(jnp.asarray, (tokens_BxL, lengths_B))
    kind = self._attention_kind()

    def attend(q_BxLxHxD: Array, k_BxLxNxD: Array, v_BxLxNxD: Array, *_: Any) -> tuple[Array, Any]:
      return kind.prefill(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, lengths=lengths_B, max_length=max_length)

    positions_BxL = jnp.broadcast_to(jnp.arange(L)[None, :], (B, L))
    states_BxLxE, layers = self._run_layers(tokens_BxL, positions_BxL, attend)
    length_B = jnp.full(B, L) if lengths_B is None else lengths_B
    last_BxE = jnp.take_along_axis(states_BxLxE, length_B[:, None, None] - 1, axis=1)[:, 0]
    return self.unembed(last_BxE), DecoderCache(layers, length_B.astype(jnp.int32))

  def decode(
    self, tokens_B: Int[Array, "B"], cache: DecoderCache
  ) -> tuple[Float[Array, "B V"], DecoderCache]:
    """Appends one token to every sequence.

    Static shapes: jit it once, with the cache donated, and call it for every token. A cache that
    is full cannot raise under jit; do not decode beyond the max_length it was made for.

    Args:
      tokens_B: the next token of every sequence.
      cache: from `prefill`, `init_cache` or `decode`.

    Returns:
      The float32 logits of the token after it, and the new cache.

    Raises:
      ValueError: tokens that are not one for every sequence of the cache.
    """
    if jnp.shape(tokens_B) != cache.length.shape:
      raise ValueError(
        f"tokens is {list(jnp.shape(tokens_B))}; the cache wants {list(cache.length.shape)}."
      )
    kind = self._attention_kind()

    def attend(
      q_Bx1xHxD: Array, k_Bx1xNxD: Array, v_Bx1xNxD: Array, caches: Any, layer: Array
    ) -> tuple[Array, Any]:
      o_BxHxD, caches = kind.decode(
        q_Bx1xHxD[:, 0], k_Bx1xNxD[:, 0], v_Bx1xNxD[:, 0], caches, layer
      )
      return o_BxHxD[:, None], caches

    states_Bx1xE, layers = self._run_layers(
      tokens_B[:, None], cache.length[:, None], attend, cache.layers
    )
    return self.unembed(states_Bx1xE[:, 0]), DecoderCache(layers, cache.length + 1)

  def extend(
    self, tokens_BxT: Int[Array, "B T"], cache: DecoderCache, counts_B: Int[Array, "B"]
  ) -> tuple[Float[Array, "B V"], DecoderCache]:
    """Appends several tokens to every sequence: a chunk of a prompt, or a second turn's.

    What it computes is what decoding the tokens one by one would. Under streaming selection that
    is what a prefill of the whole prompt computes too; under global selection the tokens of a
    prefill are ranked together, and those appended here block by block.

    Args:
      tokens_BxT: right-padded.
      cache: from `prefill`, `init_cache`, `decode` or this method; donate it under jit.
      counts_B: new tokens of each sequence, 0 to T.

    Returns:
      The float32 logits of each sequence's last token, which have no meaning where there is no
      new one, and the new cache.

    Raises:
      ValueError: as for `hidden`, and for an attention kind that cannot.
    """
    _check_inputs(tokens_BxT, None, counts_B)
    kind = self._attention_kind()
    if not isinstance(kind, ExtendingKind):
      raise ValueError(
        f"attention is {self.config.attention!r}, which reads a prompt whole: use prefill, or "
        "decode its tokens one by one."
      )
    tokens_BxT, counts_B = jnp.asarray(tokens_BxT), jnp.asarray(counts_B)

    def attend(
      q_BxTxHxD: Array, k_BxTxNxD: Array, v_BxTxNxD: Array, caches: Any, layer: Array
    ) -> tuple[Array, Any]:
      return kind.extend(q_BxTxHxD, k_BxTxNxD, v_BxTxNxD, caches, layer, counts=counts_B)

    positions_BxT = cache.length[:, None] + jnp.arange(tokens_BxT.shape[1])[None]
    states_BxTxE, layers = self._run_layers(tokens_BxT, positions_BxT, attend, cache.layers)
    last_B = jnp.maximum(counts_B - 1, 0)
    last_BxE = jnp.take_along_axis(states_BxTxE, last_B[:, None, None], axis=1)[:, 0]
    return self.unembed(last_BxE), DecoderCache(layers, cache.length + counts_B)

  def unstack_layers(self) -> "Decoder":
    """The same decoder with every layer's weights in arrays of their own.

    For decoding: a layer of stacked weights is copied before XLA multiplies with it, which makes
    a token three times as expensive. `prefill`, `decode` and `extend` compute the same.
    """
    model: Decoder = nnx.merge(*nnx.split(self))
    structure: Any
    structure, stacked = nnx.split(model.layers)
    layers: list[DecoderLayer] = [
      nnx.merge(structure, jax.tree.map(operator.itemgetter(index), stacked))
      for index in range(self.config.num_layers)
    ]
    model.layers = nnx.List(layers)
    return model

  def _attention_kind(self) -> AttentionKind:
    return make_attention(self.config)

  def _run_layers(
    self,
    tokens_BxL: Int[Array, "B L"],
    positions_BxL: Int[Array, "B L"],
    attend: Callable[..., tuple[Array, Any]],
    caches: Any = None,
  ) -> tuple[Float[Array, "B L E"], Any]:
    """Embeds, scans the layers, normalises.

    Args:
      tokens_BxL: token ids.
      positions_BxL: the rotary position of each.
      attend: of (q, k, v, caches, layer), to the attention's output and either `caches` with that
        layer's part updated or, where there are none, what is to be stacked over layers.
      caches: of all layers, stacked. They are carried through the scan, which updates them in
        place, where scanning over them would copy them.
    """
    config = self.config
    omega_C = inverse_frequencies(
      config.head_dim, base=config.rope_base, scaling=config.rope_scaling
    )
    rope = rope_table(positions_BxL, omega_C)
    table_VxE = fsdp_all_gather(self.embedding[...], ("vocab", "embed"))
    x_BxLxE = constrain_residual(table_VxE[tokens_BxL].astype(config.dtype))
    if isinstance(self.layers, DecoderLayer):
      x_BxLxE, caches = self._scan(self.layers, x_BxLxE, rope, attend, caches)
    else:
      x_BxLxE, caches = _run_unstacked(self.layers, x_BxLxE, rope, attend, caches)
    return self.norm(x_BxLxE).astype(config.dtype), caches

  def _scan(
    self,
    layers: DecoderLayer,
    x_BxLxE: Array,
    rope: RopeTable,
    attend: Callable[..., tuple[Array, Any]],
    caches: Any,
  ) -> tuple[Array, Any]:
    """Stacked layers: one program for all of them."""
    config = self.config
    structure, params = nnx.split(layers)

    def layer(carry: tuple[Array, Any], xs: tuple[Any, Array]) -> tuple[tuple[Array, Any], Any]:
      (x_BxLxE, caches), (layer_params, index) = carry, xs
      x_BxLxE, made = nnx.merge(structure, layer_params)(
        x_BxLxE, rope, lambda q, k, v: attend(q, k, v, caches, index)
      )
      x_BxLxE = constrain_residual(x_BxLxE)
      return ((x_BxLxE, None), made) if caches is None else ((x_BxLxE, made), None)

    if config.remat != "none":
      # Inside a scan XLA cannot merge the recomputation away, so preventing it would only cost.
      layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[config.remat], prevent_cse=False)
    (x_BxLxE, updated), made = jax.lax.scan(
      layer, (x_BxLxE, caches), (params, jnp.arange(config.num_layers))
    )
    return x_BxLxE, made if caches is None else updated


def _run_unstacked(
  layers: Iterable[DecoderLayer],
  x_BxLxE: Array,
  rope: RopeTable,
  attend: Callable[..., tuple[Array, Any]],
  caches: Any,
) -> tuple[Array, Any]:
  """Layers apart; see `Decoder._run_layers`."""
  structures, params = zip(*(nnx.split(layer) for layer in layers), strict=True)

  @jax.jit  # traced once, for all layers
  def run(params: Any, x_BxLxE: Array, caches: Any, index: Array) -> tuple[Array, Any]:
    x_BxLxE, new = nnx.merge(structures[0], params)(
      x_BxLxE, rope, lambda q, k, v: attend(q, k, v, caches, index)
    )
    return constrain_residual(x_BxLxE), new

  made = []
  for index, layer_params in enumerate(params):
    x_BxLxE, new = run(layer_params, x_BxLxE, caches, jnp.int32(index))
    # The next layer waits for this one's cache: else all layers' keys and values, of which a cache
    # keeps a part, could be alive at once.
    x_BxLxE, new = jax.lax.optimization_barrier((x_BxLxE, new))
    if caches is None:
      made.append(new)
    else:
      caches = new
  return x_BxLxE, jax.tree.map(lambda *x: jnp.stack(x), *made) if caches is None else caches


def _stacked_layers(config: ModelConfig, *, rngs: nnx.Rngs) -> DecoderLayer:
  """All layers in one module whose parameters have a leading axis named "layers"."""

  @nnx.split_rngs(splits=config.num_layers)
  @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
  def stack(rngs: nnx.Rngs) -> DecoderLayer:
    return DecoderLayer(config, rngs=rngs)

  return stack(rngs)


def _check_inputs(tokens: Array, segment_ids: Array | None, lengths: Array | None) -> None:
  if jnp.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
    raise ValueError(
      f"tokens is {jnp.result_type(tokens)}{list(jnp.shape(tokens))}; it must be int[B, L]."
    )
  B, L = jnp.shape(tokens)
  if B == 0 or L == 0:
    raise ValueError(f"tokens is [{B}, {L}]; it must hold at least one sequence of one token.")
  validation.rows(B, L, lengths, segment_ids)

"""The decoder: embedding, layers, unembedding; whole sequences, prefill and decoding."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dga_jax.attention import validation
from dga_jax.attention.segments import Documents, find_documents, IntArray
from dga_jax.attention.validation import Lengths, SegmentIds
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.model.attention_kinds.dense import DenseAttention
from dga_jax.model.config import ModelConfig
from dga_jax.model.head_gates import mix_with_full
from dga_jax.model.layers import bias, constrain_residual, DecoderLayer, rms_norm, weight
from dga_jax.model.logits import logits
from dga_jax.model.on_mesh import on_mesh
from dga_jax.model.rope import rope_table
from dga_jax.model.run_layers import LayerAttend, run_stacked, run_unstacked
from dga_jax.model.sharded_attention import attend_on_mesh, prepare_on_mesh, update_on_mesh
from dga_jax.sharding import fsdp_all_gather, zigzag_order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
  """State of decoding. A pytree.

  Attributes:
    layers: the attention kind's cache, each array with a leading axis of layers.
    length: tokens that each sequence has seen, which is the position of its next token.
  """

  layers: Any
  length: Int[Array, "B"]


class Decoder(nnx.Module):
  """LLaMA-family language model over token ids.

  Every parameter names its axes in its metadata (`out_sharding`): "layers" for the axis of stacked
  layers, and "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab".
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
    self.config = config
    V, E = config.vocab_size, config.embed_dim
    # A tied table also makes logits, whose fan-in is E. An untied one starts at variance 1, the
    # scale of the layers' outputs: from smaller embeddings attention learns much later.
    fan_in = (1,) if config.tie_embeddings else ()
    self.embedding = weight(config, (V, E), ("vocab", "embed"), inputs=fan_in, rngs=rngs)
    self.layers: DecoderLayer | nnx.List[DecoderLayer] = _stacked_layers(config, rngs=rngs)
    self.norm = rms_norm(config, rngs=rngs)
    if not config.tie_embeddings:
      self.unembedding = weight(config, (E, V), ("embed", "vocab"), inputs=(0,), rngs=rngs)
    if config.head_gates:
      gates = (config.num_layers, config.num_kv_heads)
      self.head_gates = bias(config, gates, ("layers", "kv_heads"))

  @on_mesh("batch", None, "vocab")
  def __call__(
    self,
    tokens_BxL: Int[IntArray, "B L"],
    *,
    segment_ids: SegmentIds | None = None,
    lengths: Lengths | None = None,
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
    tokens_BxL: Int[IntArray, "B L"],
    *,
    segment_ids: SegmentIds | None = None,
    lengths: Lengths | None = None,
  ) -> Float[Array, "B L E"]:
    """Final normalised states, before the unembedding.

    A loss that applies `unembed` to slices of the states never holds all [B, L, V] float32 logits.

    Args:
      tokens_BxL: token ids.
      segment_ids: documents packed in the rows, as runs of equal ids; negative ids are padding. An
        int array [B, L] or a list of lists. Tokens attend, and positions count, inside their own
        document.
      lengths: tokens of each right-padded row, an int array [B] or a list.

    Returns:
      [B, L, E] in config.dtype. States of padding have no meaning. On a mesh with a context axis
      the states are in `dga_jax.sharding.zigzag_order`.

    Raises:
      ValueError: a wrong rank, shape or dtype, an empty sequence, or (outside jit) lengths
        beyond L.
    """
    B, L = _check_tokens(tokens_BxL)
    documents = find_documents(B, L, *validation.rows(B, L, lengths, segment_ids))
    kind = self.config.make_attention()
    attend = _attend_whole(kind, documents)
    if kind.branches > 1 and self.config.remat == "none":
      # The backward pass of a switch stores the intermediate values of all branches. Instead it
      # recomputes attention from queries, keys and values.
      attend = jax.checkpoint(attend, prevent_cse=False)
    if self.config.head_gates:
      full = _attend_whole(DenseAttention(), documents)
      attend = mix_with_full(attend, full, self.head_gates[...])

    tokens_BxL, positions_BxL = jnp.asarray(tokens_BxL), documents.position
    order_L = zigzag_order(L)
    if order_L is not None:
      tokens_BxL, positions_BxL = tokens_BxL[:, order_L], positions_BxL[:, order_L]
    states_BxLxE, _ = self._run_layers(tokens_BxL, positions_BxL, attend)
    return states_BxLxE

  @on_mesh(..., "vocab")
  def unembed(self, states: Float[Array, "*S E"]) -> Float[Array, "*S V"]:
    """Logits of states from `hidden`, float32."""
    return self.unembedder()(states)

  def unembedder(self) -> Callable[[Float[Array, "*S E"]], Float[Array, "*S V"]]:
    """`unembed` for many calls: its table is gathered over the mesh once."""
    config = self.config
    table_ExV = self.embedding[...].T if config.tie_embeddings else self.unembedding[...]
    table_ExV = fsdp_all_gather(table_ExV, ("embed", "vocab"))
    return lambda states: logits(states, table_ExV.astype(config.dtype))

  def init_cache(self, batch_size: int, max_length: int) -> DecoderCache:
    """An empty cache for sequences of up to `max_length` tokens, prompt included.

    Raises:
      ValueError: a size below 1, or the model has gates.
    """
    self._refuse_gates()
    if batch_size < 1 or max_length < 1:
      raise ValueError(
        f"init_cache got batch_size={batch_size}, max_length={max_length}; both must be at least 1."
      )
    config = self.config
    layers = config.make_attention().init_caches(
      config.num_layers,
      batch_size,
      max_length,
      config.num_kv_heads,
      config.head_dim,
      jnp.dtype(config.dtype),
    )
    return DecoderCache(layers=layers, length=jnp.zeros(batch_size, jnp.int32))

  def prefill(
    self,
    tokens_BxL: Int[IntArray, "B L"],
    lengths: Lengths | None = None,
    *,
    max_length: int,
  ) -> tuple[Float[Array, "B V"], DecoderCache]:
    """Reads right-padded prompts.

    Args:
      tokens_BxL: token ids.
      lengths: tokens of each prompt, from 1 to L, an int array or a list; None if all have L.
      max_length: tokens that the cache holds for a sequence, prompt included.

    Returns:
      The float32 logits of the token after each prompt, and the cache to decode from.

    Raises:
      ValueError: as for `hidden`, L exceeds max_length, or the model has gates.
    """
    self._refuse_gates()
    B, L = _check_tokens(tokens_BxL)
    lengths, _ = validation.rows(B, L, lengths, None)
    if max_length < L:
      raise ValueError(
        f"max_length is {max_length}, but tokens hold prompts of up to {L} tokens: raise "
        "max_length (prompt and new tokens together) or shorten the prompts."
      )
    kind = self.config.make_attention()
    metadata = kind.prepare(find_documents(B, L, lengths, None))

    # Layers of one shape make their caches, which are stacked. Other layers write to caches of all.
    caches = self.init_cache(B, max_length).layers if kind.layers_differ else None

    def attend(
      q: Array, k: Array, v: Array, caches: Any, layer: Any, scores: Array | None = None
    ) -> tuple[Array, Any]:
      heads: Any = kind.at_layer(layer)
      options = {"max_length": max_length, **heads.focal_options(scores)}
      if caches is None:
        prompt: tuple[Array, Any] = heads.prefill(q, k, v, metadata, **options)
        return prompt
      updated: tuple[Array, Any] = heads.prefill_into(caches, q, k, v, metadata, **options)
      return updated

    positions_BxL = jnp.broadcast_to(jnp.arange(L)[None, :], (B, L))
    states_BxLxE, layers = self._run_layers(jnp.asarray(tokens_BxL), positions_BxL, attend, caches)
    length_B = jnp.full(B, L) if lengths is None else jnp.asarray(lengths)
    last_BxE = jnp.take_along_axis(states_BxLxE, length_B[:, None, None] - 1, axis=1)[:, 0]
    return self.unembed(last_BxE), DecoderCache(layers, length_B.astype(jnp.int32))

  def decode(
    self, tokens_B: Int[IntArray, "B"], cache: DecoderCache
  ) -> tuple[Float[Array, "B V"], DecoderCache]:
    """Appends one token to every sequence.

    Shapes are static: jit it once, with the cache donated, and call it for every token. A full
    cache cannot raise under jit: do not decode beyond the max_length of the cache.

    Args:
      tokens_B: the next token of every sequence.
      cache: from `prefill`, `init_cache`, `extend` or `decode`.

    Returns:
      The float32 logits of the token after it, and the new cache.

    Raises:
      ValueError: the number of tokens is not the number of sequences of the cache.
    """
    if jnp.shape(tokens_B) != cache.length.shape:
      raise ValueError(
        f"tokens is {list(jnp.shape(tokens_B))}; the cache wants {list(cache.length.shape)}."
      )
    kind = self.config.make_attention()

    def attend(
      q: Array, k: Array, v: Array, caches: Any, layer: Any, scores: Array | None = None
    ) -> tuple[Array, Any]:
      scores = None if scores is None else scores[:, 0]
      o_BxHxD, caches = update_on_mesh(
        kind, kind.decode, q[:, 0], k[:, 0], v[:, 0], caches, layer, focal_scores=scores
      )
      return o_BxHxD[:, None], caches

    states_Bx1xE, layers = self._run_layers(
      jnp.asarray(tokens_B)[:, None], cache.length[:, None], attend, cache.layers
    )
    return self.unembed(states_Bx1xE[:, 0]), DecoderCache(layers, cache.length + 1)

  def extend(
    self, tokens_BxT: Int[IntArray, "B T"], cache: DecoderCache, lengths: Lengths
  ) -> tuple[Float[Array, "B V"], DecoderCache]:
    """Appends several tokens to every sequence: a chunk of a prompt, or a second turn.

    It computes what decoding the tokens one by one would. Under streaming selection that is also
    what a prefill of the whole prompt computes. Under global selection a prefill ranks its tokens
    together, and appended tokens are ranked block by block.

    Args:
      tokens_BxT: token ids, right-padded.
      cache: from `prefill`, `init_cache`, `decode` or this method; donate it under jit.
      lengths: new tokens of each sequence, 0 to T, an int array or a list.

    Returns:
      The float32 logits of the token after each sequence, which have no meaning for a sequence
      without new tokens, and the new cache.

    Raises:
      ValueError: as for `hidden`, or the attention kind does not support it.
    """
    states_BxTxE, cache, lengths_B = self._extend(tokens_BxT, cache, lengths)
    last_B = jnp.maximum(lengths_B - 1, 0)
    last_BxE = jnp.take_along_axis(states_BxTxE, last_B[:, None, None], axis=1)[:, 0]
    return self.unembed(last_BxE), cache

  def extend_hidden(
    self, tokens_BxT: Int[IntArray, "B T"], cache: DecoderCache, lengths: Lengths
  ) -> tuple[Float[Array, "B T E"], DecoderCache]:
    """As `extend`, with the final states of all new tokens in place of logits, see `unembed`."""
    return self._extend(tokens_BxT, cache, lengths)[:2]

  def _extend(
    self, tokens_BxT: IntArray, cache: DecoderCache, lengths: Lengths
  ) -> tuple[Array, DecoderCache, Array]:
    """States, cache, and the number of new tokens of each sequence."""
    B, T = _check_tokens(tokens_BxT)
    lengths_B = jnp.asarray(validation.rows(B, T, lengths, None)[0])
    kind = self.config.make_attention()

    def attend(
      q: Array, k: Array, v: Array, caches: Any, layer: Any, scores: Array | None = None
    ) -> tuple[Array, Any]:
      return update_on_mesh(
        kind, kind.extend, q, k, v, caches, layer, lengths=lengths_B, focal_scores=scores
      )

    positions_BxT = cache.length[:, None] + jnp.arange(T)[None]
    states_BxTxE, layers = self._run_layers(
      jnp.asarray(tokens_BxT), positions_BxT, attend, cache.layers
    )
    return states_BxTxE, DecoderCache(layers, cache.length + lengths_B), lengths_B

  def unstack_layers(self) -> "Decoder":
    """The same decoder with separate arrays for every layer's weights.

    For decoding: XLA copies a layer out of stacked weights before it multiplies with them, which
    makes a token three times as expensive. `prefill`, `decode` and `extend` compute the same.
    """
    self._refuse_gates()
    model: Decoder = nnx.merge(*nnx.split(self))
    structure: Any
    structure, stacked = nnx.split(model.layers)
    layers: list[DecoderLayer] = [
      nnx.merge(structure, jax.tree.map(operator.itemgetter(index), stacked))
      for index in range(self.config.num_layers)
    ]
    model.layers = nnx.List(layers)
    return model

  def _refuse_gates(self) -> None:
    if self.config.head_gates:
      raise ValueError(
        "the model has a gate for each KV head (head_gates=True) and no cache. Make head budgets "
        "of its gates with python -m train.harden_gates, and use them with the model that the "
        "gates were trained for."
      )

  def _run_layers(
    self,
    tokens_BxL: Int[Array, "B L"],
    positions_BxL: Int[Array, "B L"],
    attend: LayerAttend,
    caches: Any = None,
  ) -> tuple[Float[Array, "B L E"], Any]:
    """Embeds the tokens, runs the layers, normalises.

    Args:
      tokens_BxL: token ids.
      positions_BxL: the rotary position of each token.
      attend: see `run_stacked`.
      caches: of all layers, stacked, or None.
    """
    config = self.config
    rope = rope_table(positions_BxL, config.rope_frequencies())
    table_VxE = fsdp_all_gather(self.embedding[...], ("vocab", "embed"))
    x_BxLxE = constrain_residual(table_VxE[tokens_BxL].astype(config.dtype))
    if isinstance(self.layers, DecoderLayer):
      x_BxLxE, caches = run_stacked(
        self.layers,
        x_BxLxE,
        rope,
        attend,
        caches,
        num_layers=config.num_layers,
        remat=config.remat,
        unroll=config.unroll_layers,
      )
    else:
      layer_index = config.make_attention().layer_index
      x_BxLxE, caches = run_unstacked(self.layers, x_BxLxE, rope, attend, caches, layer_index)
    return self.norm(x_BxLxE).astype(config.dtype), caches


def _attend_whole(kind: AttentionKind, documents: Documents) -> LayerAttend:
  """Attention of every layer over whole sequences, without caches."""
  metadata = prepare_on_mesh(kind, documents)

  def attend(
    q: Array, k: Array, v: Array, _: None, layer: Any, scores: Array | None = None
  ) -> tuple[Array, None]:
    return attend_on_mesh(kind, q, k, v, metadata, layer, scores), None

  return attend


def _stacked_layers(config: ModelConfig, *, rngs: nnx.Rngs) -> DecoderLayer:
  """All layers as one module, whose parameters have a leading axis named "layers"."""

  @nnx.split_rngs(splits=config.num_layers)
  @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
  def stack(rngs: nnx.Rngs) -> DecoderLayer:
    return DecoderLayer(config, rngs=rngs)

  return stack(rngs)


def _check_tokens(tokens: IntArray) -> tuple[int, int]:
  """B and L of token ids int [B, L], both at least 1; raises ValueError for others."""
  if jnp.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
    raise ValueError(
      f"tokens is {jnp.result_type(tokens)}{list(jnp.shape(tokens))}; it must be int[B, L]."
    )
  B, L = jnp.shape(tokens)
  if B == 0 or L == 0:
    raise ValueError(f"tokens is [{B}, {L}]; it must hold at least one sequence of one token.")
  return B, L

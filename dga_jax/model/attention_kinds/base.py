"""What the decoder asks of an attention kind, with defaults."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from dga_jax.attention.segments import Documents, find_documents, IntArray


class AttentionKind:
  """One way to attend. Subclasses are frozen, hashable dataclasses.

  Queries, keys and values carry their rotary positions; H query heads, N KV heads, H = N·R. A
  query attends inside its own document. Padding outputs 0.

  A kind for whole sequences defines `attend`. A kind that decodes also defines `init_cache`,
  `prefill` and `decode`; one whose cache takes several tokens at once defines `extend`. A kind
  that supports context parallelism has `attend_sharded` (dga_jax/model/sharded_attention.py). These
  methods of a kind that takes focal scores have one more argument, see `focal_options`.

  Attributes:
    name: the value of ModelConfig.attention, for messages.
    layers_differ: whether layers have settings of their own. Such a kind defines `init_caches`, and
      its `at_layer` has `prefill_into`, which writes a prompt to the caches of all layers.
    branches: programs of a layer between which a scan over layers switches.
    one_document: whether packed rows are refused.
  """

  name: str
  one_document: bool = False
  layers_differ: bool = False

  @property
  def branches(self) -> int:
    """See the class."""
    return 1

  def at_layer(self, layer: Any) -> "AttentionKind":
    """The kind of one layer, for `attend` and `prefill`.

    Args:
      layer: its index, traced or not, or the result of `layer_index`.
    """
    return self

  @property
  def takes_focal_scores(self) -> bool:
    """Whether focal scores choose the focal tokens, see `DGAConfig.selector`."""
    return False

  def focal_options(self, focal_scores: Array | None) -> dict[str, Any]:
    """The keyword argument `focal_scores` of this kind's methods, or none.

    Args:
      focal_scores: [B, L, N] or [B, N] as the method's keys, or None.
    """
    return {"focal_scores": focal_scores} if self.takes_focal_scores else {}

  def has_equal_parts(self, parts: int) -> bool:
    """Whether devices that split the KV heads into `parts` have caches of equal shapes."""
    del parts
    return True

  def layer_index(self, index: int) -> Any:
    """The layer argument of `at_layer`, `decode` and `extend` for layers that are not in a scan."""
    return jnp.int32(index)

  def __call__(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    lengths: Int[IntArray, "B"] | None = None,
    segment_ids: Int[IntArray, "B L"] | None = None,
  ) -> Float[Array, "B L H D"]:
    """`prepare` and `attend`, for one layer alone."""
    B, L = q_BxLxHxD.shape[:2]
    metadata = self.prepare(find_documents(B, L, lengths, segment_ids))
    return self.attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata)

  def prepare(self, documents: Documents) -> Any:
    """What all layers share, computed once a forward: a pytree of arrays [B, ...].

    Raises:
      ValueError: the kind does not support such rows.
    """
    if self.one_document and documents.rows == "packed":
      raise ValueError(
        f"segment_ids are given, but attention={self.name!r} wants one document in each row. Put"
        " each document in a row of its own, right-padded, and pass lengths."
      )
    return documents

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: Any,
  ) -> Float[Array, "B L H D"]:
    """Attention over whole sequences.

    Args:
      q_BxLxHxD: queries.
      k_BxLxNxD: keys.
      v_BxLxNxD: values.
      metadata: from `prepare`.
    """
    raise NotImplementedError(f"{type(self).__name__} does not define attend.")

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> Any:
    """An empty cache of one layer, for `max_length` tokens a sequence: a pytree of arrays."""
    raise NotImplementedError(self._has_no_cache())

  def init_caches(
    self,
    num_layers: int,
    batch: int,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
  ) -> Any:
    """Empty caches of all layers: `init_cache` with a leading axis of layers."""
    layer = self.init_cache(batch, max_length, num_kv_heads, head_dim, dtype)
    return jax.tree.map(
      lambda array: jnp.broadcast_to(array[None], (num_layers, *array.shape)), layer
    )

  def prefill(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: Any,
    *,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], Any]:
    """Attends over right-padded prompts and stores them in a new cache.

    Args:
      q_BxLxHxD: queries.
      k_BxLxNxD: keys.
      v_BxLxNxD: values.
      metadata: from `prepare`, of rows that are not packed.
      max_length: tokens that the cache holds for a sequence, prompt included.
    """
    raise NotImplementedError(self._has_no_cache())

  def decode(
    self,
    q_BxHxD: Float[Array, "B H D"],
    k_BxNxD: Float[Array, "B N D"],
    v_BxNxD: Float[Array, "B N D"],
    cache: Any,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B H D"], Any]:
    """Appends one token to every sequence and attends to all that its cache holds.

    Args:
      q_BxHxD: query of the new token.
      k_BxNxD: its key.
      v_BxNxD: its value.
      cache: of all layers, stacked on a leading axis, so that the token is written in place;
        taking a layer out and putting it back would copy the layer.
      layer: the layer to update and read.
    """
    raise NotImplementedError(self._has_no_cache())

  def extend(
    self,
    q_BxTxHxD: Float[Array, "B T H D"],
    k_BxTxNxD: Float[Array, "B T N D"],
    v_BxTxNxD: Float[Array, "B T N D"],
    cache: Any,
    layer: Int[Array, ""],
    *,
    lengths: Int[Array, "B"],
  ) -> tuple[Float[Array, "B T H D"], Any]:
    """Appends several tokens to every sequence and attends; outputs of padding have no meaning.

    Args:
      q_BxTxHxD: queries of the new tokens, right-padded.
      k_BxTxNxD: their keys.
      v_BxTxNxD: their values.
      cache: as for `decode`.
      layer: as for `decode`.
      lengths: new tokens of each sequence, 0 to T.

    Raises:
      ValueError: the kind reads prompts whole.
    """
    raise ValueError(
      f"attention is {self.name!r}, which reads a prompt whole: use prefill, or append its tokens"
      " one by one with decode."
    )

  def _has_no_cache(self) -> str:
    return f"{type(self).__name__} attends to whole sequences and has no cache."

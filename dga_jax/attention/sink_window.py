"""Attention to the first tokens of a document (sinks) and to a window of the last ones.

The keys keep their RoPE positions. The sinks are the focal source of `grouped_attention` and the
row itself is its window source, so the kernels of Dynamic Group Attention run it on every device.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.array_parts import take_part
from dga_jax.attention.attend import zero_padding
from dga_jax.attention.segments import at_document_start, count_before, Documents
from dga_jax.attention.visibility import Visibility
from pallas_kernels.compact_indices import compact_indices
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gather import take_positions
from pallas_kernels.group_merge import Entries
from pallas_kernels.grouped_attention import grouped_attention, KVSources
from pallas_kernels.head_range import HeadRange


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["documents", "sink_index", "visibility"],
  meta_fields=["sinks", "window"],
)
@dataclasses.dataclass(frozen=True)
class SinkWindowMetadata:
  """What attention to sinks and a window needs of the rows; no layer changes it. A pytree.

  Attributes:
    documents: the document of every token.
    sink_index: positions of the sinks of all documents of a row, ascending; L for unused entries.
      None where a row is one document, whose sinks are its first tokens, and without sinks.
    visibility: the sinks and the window that each query sees.
    sinks: first tokens of its document that a query sees. Static.
    window: last tokens that a query sees, its own token included. Static.
  """

  documents: Documents
  sink_index: Int[Array, "B S"] | None
  visibility: Visibility
  sinks: int
  window: int


def prepare_sink_window(documents: Documents, *, sinks: int, window: int) -> SinkWindowMetadata:
  """The metadata of a forward, for every layer and head.

  Query i sees the first `sinks` tokens j ≤ i of its document, and of the other tokens of the
  document those with i − window < j ≤ i.

  Args:
    documents: the rows.
    sinks: at least 0.
    window: at least 1.
  """
  L = documents.index.shape[1]
  is_sink_BxL = documents.is_token & (documents.position < sinks)
  sinks_before_BxL = count_before(is_sink_BxL)
  sink_index = None
  if documents.rows == "packed" and sinks:
    most = L if documents.count is None else min(L, sinks * documents.count)
    sink_index = compact_indices(sinks_before_BxL, is_sink_BxL, most)
  focal_start_BxL = at_document_start(sinks_before_BxL, documents)
  seen_sinks_BxL = jnp.where(
    documents.is_token, jnp.minimum(documents.position + 1, min(sinks, L)), 0
  )
  i_BxL = documents.start + documents.position
  window_end_BxL = i_BxL + documents.is_token.astype(jnp.int32)
  first_BxL = jnp.maximum(i_BxL + 1 - window, documents.start + sinks)
  no_group_BxL = jnp.zeros_like(i_BxL)
  visibility_BxL = Visibility(
    focal_start=focal_start_BxL,
    focal_end=focal_start_BxL + seen_sinks_BxL,
    group_start=no_group_BxL,
    group_end=no_group_BxL,
    window_start=jnp.where(documents.is_token & ~is_sink_BxL, first_BxL, window_end_BxL),
    window_end=window_end_BxL,
  )
  visibility = jax.tree.map(lambda x_BxL: x_BxL[:, None], visibility_BxL)
  return SinkWindowMetadata(documents, sink_index, visibility, sinks, window)


def attend_sink_window(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  metadata: SinkWindowMetadata,
  *,
  scale: Any = None,
  implementation: Implementation = None,
) -> Float[Array, "B L H D"]:
  """One softmax over the sinks and the window of each query; padding outputs 0.

  Args:
    query: any float dtype, which all arrays share.
    key: N KV heads, where N divides H.
    value: as key.
    metadata: from `prepare_sink_window`.
    scale: of the attention logits, a float or a scalar array; default 1/√D.
    implementation: of `grouped_attention`.

  Raises:
    NotImplementedError: the named implementation cannot compute this call.
  """
  query, key, value = zero_padding(metadata.documents, query, key, value)
  return grouped_attention(
    query,
    sink_window_sources(key, value, metadata),
    scale=query.shape[-1] ** -0.5 if scale is None else scale,
    max_window=min(metadata.window, key.shape[1]),
    implementation=implementation,
  )


def sink_window_sources(
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  metadata: SinkWindowMetadata,
  *,
  heads: HeadRange | None = None,
) -> KVSources:
  """The sources of `grouped_attention`: sinks as focal tokens, and the row as the window.

  Args:
    key: N KV heads, zero in the padding.
    value: as key.
    metadata: from `prepare_sink_window`.
    heads: the KV heads of the sinks; None for all. The window has all heads. Use the key and value
      of the window downstream, so that gradients are added in place.
  """
  B, _, N, _ = key.shape
  heads = heads or HeadRange(0, N)

  def take_sinks(x: Array) -> tuple[Array, Array]:
    if metadata.sink_index is None:
      return take_part(x, (0, 0, heads.first), (B, metadata.sinks, heads.size))
    return x, take_positions(heads.of(x, N), metadata.sink_index)

  (key, sink_key), (value, sink_value) = take_sinks(key), take_sinks(value)
  no_key = heads.of(key[:, :0], N)
  entries = Entries(sink_key, sink_value, no_key, no_key, key, value)
  return metadata.visibility.sources(entries)

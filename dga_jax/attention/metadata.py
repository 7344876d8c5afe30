"""What attention needs of the rows and no layer changes: computed once a forward."""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool

from dga_jax.attention.layout import Sizes, static_sizes
from dga_jax.attention.scores import sample_queries, SampledQueries
from dga_jax.attention.segments import Documents
from dga_jax.attention.selection import document_quotas
from dga_jax.attention.streaming_blocks import cut_blocks, StreamingBlocks
from dga_jax.attention.visibility import streaming_visibility, Visibility
from dga_jax.config import DGAConfig
from pallas_kernels.segmented_top_k import Segments


class StreamingMetadata(NamedTuple):
  """Of streaming selection.

  Attributes:
    blocks: of every document.
    visibility: of causal attention, which does not depend on the choice; else None.
  """

  blocks: StreamingBlocks
  visibility: Visibility | None


class RankingMetadata(NamedTuple):
  """Of global and random selection.

  Attributes:
    quotas: start, length and number of focal tokens of each document.
    samples: the queries that rank the keys; None under random selection.
  """

  quotas: Segments
  samples: SampledQueries | None


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["documents", "invalid", "by_selection"],
  meta_fields=["config", "max_documents", "sizes"],
)
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
  """Everything that follows from lengths, segment ids and config alone. A pytree.

  The first axis of every array is the batch.

  Attributes:
    documents: the document of every token.
    invalid: tokens of documents beyond max_documents; None where there can be none.
    by_selection: what the kind of selection needs.
    config: settings of the mechanism. Static.
    max_documents: upper bound on the documents of a row. Static.
    sizes: static sizes of the lists of focal tokens and groups.
  """

  documents: Documents
  invalid: Bool[Array, "B L"] | None
  by_selection: StreamingMetadata | RankingMetadata
  config: DGAConfig
  max_documents: int
  sizes: Sizes


def prepare(documents: Documents, config: DGAConfig) -> AttentionMetadata:
  """The metadata of a forward, for every layer and head.

  Raises:
    ValueError: rows hold more documents than config.max_documents, or the bound is missing.
  """
  max_documents = document_bound(documents, config)
  sizes = static_sizes(documents, max_documents, config)
  by_selection: StreamingMetadata | RankingMetadata
  if config.selection == "streaming":
    blocks = cut_blocks(documents, sizes.groups, config)
    visibility = streaming_visibility(documents, blocks, config) if config.causal else None
    by_selection = StreamingMetadata(blocks, visibility)
  else:
    is_global = config.selection == "global"
    by_selection = RankingMetadata(
      quotas=document_quotas(documents, max_documents, config),
      samples=sample_queries(documents, max_documents, config) if is_global else None,
    )
  return AttentionMetadata(
    documents=documents,
    invalid=beyond_bound(documents, config),
    by_selection=by_selection,
    config=config,
    max_documents=max_documents,
    sizes=sizes,
  )


def document_bound(documents: Documents, config: DGAConfig) -> int:
  """Static upper bound on the documents of a row.

  Raises:
    ValueError: rows hold more than config.max_documents, or nothing bounds their number.
  """
  bound, count = config.max_documents, documents.count
  if documents.rows != "packed":
    return 1
  if count is not None:
    if bound is not None and count > bound:
      raise ValueError(
        f"segment_ids has {count} documents in a row; DGAConfig.max_documents is {bound}. Set"
        f" max_documents to at least {count}, or pack fewer documents."
      )
    return max(1, bound or count)
  if bound is not None:
    return bound
  if config.selection == "streaming" and config.sink_tokens == 0:
    return documents.index.shape[1]
  raise ValueError(
    "segment_ids or lengths are traced, as under jit, so documents cannot be counted, and"
    " DGAConfig.max_documents is None. Set max_documents to the most documents that a row packs:"
    " dataclasses.replace(config, max_documents=...)."
  )


def beyond_bound(documents: Documents, config: DGAConfig) -> Bool[Array, "B L"] | None:
  """Tokens of documents beyond config.max_documents; None where the bound is already checked."""
  if documents.rows != "packed" or documents.count is not None or config.max_documents is None:
    return None
  return documents.index >= config.max_documents

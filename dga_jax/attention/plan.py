"""The plan: which tokens stay focal, which are merged together, and what each query sees."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention import validation
from dga_jax.attention.layout import global_layout, Sizes, streaming_layout, StreamingBlocks
from dga_jax.attention.scores import importance_scores, random_scores, select_focal
from dga_jax.attention.segments import Documents, find_documents
from dga_jax.attention.visibility import Visibility
from dga_jax.config import DGAConfig
from pallas_kernels.group_merge import choose_in_blocks


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "focal_mask",
    "documents",
    "focal_index",
    "member_index",
    "group_query",
    "bounds",
    "broken",
  ],
  meta_fields=["config", "padded"],
)
@dataclasses.dataclass(frozen=True)
class GroupPlan:
  """The split of each row and KV head into focal tokens and groups. A pytree.

  Index arrays point into the row; entries that a row does not fill hold L.

  Attributes:
    focal_mask: the tokens that keep their own key and value.
    documents: where documents lie in the rows.
    focal_index: positions of the focal tokens, in order.
    member_index: positions of each group's members, in order.
    group_query: position of the query whose attention weighs a group's members.
    bounds: what each query sees; its window runs over the members (global, random) or over the
      row itself (streaming).
    broken: queries whose row or document broke a static bound under jit, which is found out
      only there; the op makes them NaN rather than wrong. None where no bound can break.
    config: what the plan was made with.
    padded: whether it was made with lengths or segment ids.
  """

  focal_mask: Bool[Array, "B N L"]
  documents: Documents
  focal_index: Int[Array, "B N r"]
  member_index: Int[Array, "B N k m"]
  group_query: Int[Array, "B N k"]
  bounds: Visibility
  broken: Bool[Array, "B L"] | None
  config: DGAConfig
  padded: bool

  @classmethod
  def from_focal_mask(
    cls,
    focal_mask: Bool[Array, "B N L"],
    *,
    config: DGAConfig,
    lengths: Int[Array, "B"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    max_focal: int | None = None,
  ) -> "GroupPlan":
    """The plan of any focal mask. A trailing partial group of a document stays raw.

    Args:
      focal_mask: True for tokens to keep. Under streaming selection every complete block
        must hold f of them after the sinks; tokens of incomplete blocks do not count.
      config: its selection says how groups are laid out (streaming: by block).
      lengths: row lengths, for right padding.
      segment_ids: documents packed in the rows.
      max_focal: bound on the focal tokens of a row and head. Needed under jit (global and
        random); outside, the mask is counted.

    Raises:
      ValueError: for a mask that is not bool [B, N, L], for one that does not fit the config
        or the bound, or if a bound is missing under jit.
    """
    validation.focal_mask(focal_mask)
    B, _, L = focal_mask.shape
    rows = Rows.of(B, L, config, lengths, segment_ids)
    focal_mask = focal_mask & rows.documents.is_token[:, None]
    if config.selection == "streaming":
      validation.focal_in_blocks(focal_mask, rows.documents, config)
      return _lay_out(focal_mask, rows, config)
    focal_B = focal_mask.sum(axis=-1).max(axis=-1)
    most, broken = validation.focal_bound(focal_B, max_focal), rows.broken
    if validation.is_traced(focal_B):
      broken = (focal_B > most)[:, None] | (False if broken is None else broken)
      fewest = 0
    else:
      fewest = int(focal_mask.sum(axis=-1).min())
    groups = math.ceil((L - fewest) / config.group_size) + rows.max_documents - 1
    rows = rows._replace(sizes=Sizes(focal=most, groups=groups), broken=broken)
    return _lay_out(focal_mask, rows, config)


def plan_groups(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  *,
  config: DGAConfig,
  lengths: Int[Array, "B"] | None = None,
  segment_ids: Int[Array, "B L"] | None = None,
) -> GroupPlan:
  """Chooses focal tokens and groups for every row, document and KV head.

  Global selection ranks keys by what sampled queries pay to them (Eq. 16, 17 of the paper);
  streaming selection lets the last query of each block choose in it; random selection draws.
  Each row and document is planned exactly as it would be alone. No gradient flows through.

  Args:
    query: any float dtype. Query head h belongs to KV head ⌊h / (H/N)⌋.
    key: same dtype as query.
    config: see `DGAConfig`.
    lengths: tokens of each row, the rest being right padding. Default: all L.
    segment_ids: runs of equal ids are documents packed in a row; a negative id is padding.

  Raises:
    ValueError: names the argument that does not fit and what it must be.
  """
  validation.query_and_key(query, key)
  B, L, _, _ = query.shape
  N = key.shape[2]
  query, key = jax.lax.stop_gradient((query, key))
  rows = Rows.of(B, L, config, lengths, segment_ids)
  if config.selection == "streaming":
    start_Bxk = rows.block_starts(config)
    chosen_BxNxkxf = choose_in_blocks(
      query, key, start_Bxk, size=config.block_size, focal=config.focal_in_block
    )
    return plan_chosen_blocks(rows, start_Bxk, chosen_BxNxkxf, config)
  if config.selection == "global":
    scores_BxNxL = importance_scores(query, key, rows.documents, rows.max_documents, config)
  else:
    scores_BxNxL = random_scores(rows.documents, N, config.seed)
  focal_BxNxL = select_focal(scores_BxNxL, rows.documents, rows.max_documents, config)
  return _lay_out(focal_BxNxL, rows, config)


def plan_chosen_blocks(
  rows: "Rows",
  start_Bxk: Int[Array, "B k"],
  chosen_BxNxkxf: Int[Array, "B N k f"],
  config: DGAConfig,
) -> GroupPlan:
  """The streaming plan whose block at start_Bxk keeps its tokens at the chosen places."""
  B, N, _, _ = chosen_BxNxkxf.shape
  sink_BxL = StreamingBlocks.of(rows.documents, config).sink
  focal_BxNxkf = (start_Bxk[:, None, :, None] + chosen_BxNxkxf).reshape(B, N, -1)
  row_Bx1, head_1xN = jnp.arange(B)[:, None, None], jnp.arange(N)[None, :, None]
  L = sink_BxL.shape[1]
  # One more entry for what lies beyond the row: see pallas_kernels/compact_indices/xla.py.
  mask = jnp.pad(jnp.broadcast_to(sink_BxL[:, None], (B, N, L)), ((0, 0), (0, 0), (0, 1)))
  mask = mask.at[row_Bx1, head_1xN, jnp.minimum(focal_BxNxkf, L)].set(
    True, mode="promise_in_bounds"
  )
  return _lay_out(mask[..., :L], rows, config)


class Rows(NamedTuple):
  """What a plan knows of its rows before anything is selected."""

  documents: Documents
  max_documents: int
  sizes: Sizes
  broken: Array | None  # where a promised bound was found broken
  padded: bool

  @classmethod
  def of(
    cls,
    batch: int,
    length: int,
    config: DGAConfig,
    lengths: Int[Array, "B"] | None,
    segment_ids: Int[Array, "B L"] | None,
  ) -> "Rows":
    """Checks and reads row lengths and segment ids.

    Raises:
      ValueError: names the argument that does not fit and what it must be.
    """
    validation.rows(batch, length, lengths, segment_ids)
    documents = find_documents(batch, length, lengths, segment_ids)
    padded = lengths is not None or segment_ids is not None
    max_documents = validation.document_bound(config, length, documents, segment_ids)
    return cls(
      documents=documents,
      max_documents=max_documents,
      sizes=static_sizes(config, length, max_documents, exact=not padded),
      broken=too_many_documents(documents, config, segment_ids),
      padded=padded,
    )

  def block_starts(self, config: DGAConfig) -> Int[Array, "B k"]:
    """First position of every complete streaming block, L for none."""
    if self.documents.whole_rows:
      blocks = jnp.arange(self.sizes.groups, dtype=jnp.int32)
      start_k = config.sink_tokens + config.block_size * blocks
      return jnp.broadcast_to(start_k, (self.documents.index.shape[0], *start_k.shape))
    return StreamingBlocks.of(self.documents, config).starts(self.sizes.groups)


def static_sizes(config: DGAConfig, length: int, max_documents: int, *, exact: bool) -> Sizes:
  """How many focal tokens and groups a row of `length` can have at most.

  Args:
    exact: every row is one document of the full length, and the sizes are exact.
  """
  m = config.group_size
  if config.selection == "streaming":
    sinks = min(length, config.sink_tokens)
    in_one = (length - sinks) // config.block_size
    blocks = in_one if max_documents == 1 else length // config.block_size
    return Sizes(
      focal=min(length, sinks * max_documents + config.focal_in_block * blocks),
      groups=blocks,
    )
  quotas = config.focal_quota(length)
  if exact:
    return Sizes(focal=int(quotas[-1]), groups=(length - int(quotas[-1])) // m)
  if max_documents == 1:
    groups = (np.arange(length + 1) - quotas) // m
    return Sizes(focal=int(quotas.max()), groups=int(groups.max()))
  at_rate = int(config.focal_at_rate(np.array(length)))
  each = max(config.min_focal_tokens, config.sink_tokens) + m
  return Sizes(focal=min(length, at_rate + max_documents * each), groups=(length - at_rate) // m)


def too_many_documents(
  documents: Documents, config: DGAConfig, segment_ids: Array | None
) -> Bool[Array, "B L"] | None:
  """Documents beyond the promised bound; None where there is no promise or it was checked."""
  if config.max_documents is None or segment_ids is None or not validation.is_traced(segment_ids):
    return None
  return documents.index >= config.max_documents


def _lay_out(focal_BxNxL: Array, rows: Rows, config: DGAConfig) -> GroupPlan:
  lay_out = streaming_layout if config.selection == "streaming" else global_layout
  layout = lay_out(focal_BxNxL, rows.documents, rows.sizes, config)
  return GroupPlan(
    focal_mask=focal_BxNxL,
    documents=rows.documents,
    focal_index=layout.focal_index,
    member_index=layout.member_index,
    group_query=layout.group_query,
    bounds=layout.bounds,
    broken=rows.broken,
    config=config,
    padded=rows.padded,
  )

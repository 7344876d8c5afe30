"""GroupPlan: the selection, layout and visibility of a batch in one record."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention import validation
from dga_jax.attention.bidirectional import (
  bidirectional_plan,
  keep_incomplete_blocks,
  keep_partial_groups,
)
from dga_jax.attention.layout import (
  global_layout,
  Layout,
  list_positions,
  Sizes,
  streaming_layout,
)
from dga_jax.attention.metadata import AttentionMetadata, prepare, StreamingMetadata
from dga_jax.attention.segments import Documents, find_documents, IntArray, is_traced
from dga_jax.attention.selection import Selection
from dga_jax.attention.validation import Lengths, SegmentIds
from dga_jax.attention.visibility import global_visibility, Visibility
from dga_jax.config import DGAConfig


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["documents", "selection", "layout", "visibility", "invalid"],
  meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True)
class GroupPlan:
  """The split of each row and KV head into focal tokens and groups. A pytree.

  Made by `plan_groups`, which chooses focal tokens, or by `from_focal_mask`.

  Attributes:
    documents: the document of every token.
    selection: which tokens are focal.
    layout: positions of focal tokens and group members.
    visibility: the range of each key/value source that a query sees.
    invalid: queries whose row or document exceeds a static bound, known only at run time. The op
      returns NaN for them. None where no bound can be exceeded.
    config: settings of the mechanism. Static.
  """

  documents: Documents
  selection: Selection
  layout: Layout
  visibility: Visibility
  invalid: Bool[Array, "B L"] | None
  config: DGAConfig

  @property
  def focal_mask(self) -> Bool[Array, "B N L"]:
    """True for tokens that keep their own key and value."""
    return self.selection.focal_mask

  @property
  def window_lists_members(self) -> bool:
    """Whether the window source is the list of group members, or else the row itself."""
    return self.config.selection != "streaming" or not self.config.causal

  @classmethod
  def from_focal_mask(
    cls,
    focal_mask: Bool[Array, "B N L"],
    *,
    config: DGAConfig,
    lengths: Lengths | None = None,
    segment_ids: SegmentIds | None = None,
    max_focal: int | None = None,
  ) -> "GroupPlan":
    """The plan of any focal mask. A trailing partial group of a document stays raw.

    In bidirectional attention the members of a trailing partial group are focal, as are the tokens
    of an incomplete streaming block.

    Args:
      focal_mask: True for focal tokens. Under streaming selection every complete block must hold f
        of them after the sinks; tokens of incomplete blocks do not count.
      config: its selection decides how groups are laid out (streaming: by block).
      lengths: tokens of each row; later tokens are padding. Default: all L.
      segment_ids: runs of equal ids are documents packed in a row; negative ids are padding.
      max_focal: static upper bound on the focal tokens of a row and head. Required where the mask
        is traced, as under jit (global and random selection); else the mask is counted.

    Raises:
      ValueError: the mask is not bool [B, N, L], does not fit the config or the bound, or a bound
        is missing under jit.
    """
    validation.focal_mask(focal_mask)
    validation.config_type(config)
    if not is_traced(focal_mask):
      focal_mask = jnp.asarray(np.asarray(focal_mask))  # Counted on one device, whatever its mesh.
    B, _, L = focal_mask.shape
    lengths, segment_ids = validation.rows(B, L, lengths, segment_ids)
    metadata = prepare(find_documents(B, L, lengths, segment_ids), config)
    selection = Selection(focal_mask & metadata.documents.is_token[:, None])
    if isinstance(metadata.by_selection, StreamingMetadata):
      validation.focal_in_blocks(selection.focal_mask, metadata.by_selection.blocks, config)
    else:
      if not config.causal:
        selection = keep_partial_groups(selection, metadata.documents, config.group_size)
      metadata = _with_counted_sizes(metadata, selection, max_focal)
    return cls.from_selection(selection, metadata)

  @classmethod
  def from_selection(cls, selection: Selection, metadata: AttentionMetadata) -> "GroupPlan":
    """The layout and visibility of a selection, which must fit metadata.sizes."""
    documents, config, sizes = metadata.documents, metadata.config, metadata.sizes
    rule = metadata.by_selection
    blocks = rule.blocks if isinstance(rule, StreamingMetadata) else None
    if not config.causal:
      if blocks is not None:
        selection = keep_incomplete_blocks(selection, documents, blocks)
      layout, visibility = bidirectional_plan(selection, documents, blocks, sizes, config)
    elif isinstance(rule, StreamingMetadata):
      assert rule.visibility is not None  # Causal streaming selection has it.
      layout = streaming_layout(selection, rule.blocks, sizes, config)
      visibility = rule.visibility
    else:
      positions = list_positions(selection, documents, config.group_size)
      layout = global_layout(selection, positions, sizes, config)
      visibility = global_visibility(selection, positions, documents, config)
    return cls(
      documents=documents,
      selection=selection,
      layout=layout,
      visibility=visibility,
      invalid=metadata.invalid,
      config=config,
    )

  def check_fits(
    self,
    query: Float[Array, "B L H D"],
    key: Float[Array, "B L N D"],
    config: DGAConfig,
    *,
    lengths: Int[IntArray, "B"] | None = None,
    segment_ids: Int[IntArray, "B L"] | None = None,
  ) -> None:
    """Checks that the plan was made for these shapes, this config and these rows.

    Args:
      query: of the call.
      key: of the call.
      config: of the call.
      lengths: of the call; a call without lengths and segment ids takes the plan's rows.
      segment_ids: of the call.

    Raises:
      ValueError: the plan differs in one of them. Rows are compared where their values are known.
    """
    expected = (query.shape[0], key.shape[2], query.shape[1])
    if self.focal_mask.shape != expected:
      raise ValueError(
        f"plan.focal_mask has shape {self.focal_mask.shape}; for this query and key it must be"
        f" [batch, KV heads, length] = {expected}. Make the plan from them with plan_groups."
      )
    if self.config != config:
      names = [f.name for f in dataclasses.fields(config)]
      names = [name for name in names if getattr(self.config, name) != getattr(config, name)]
      made, given = (
        ", ".join(f"{name}={getattr(c, name)!r}" for name in names) for c in (self.config, config)
      )
      raise ValueError(
        f"plan was made with {made}, and config has {given}. Pass config=plan.config, or make the"
        " plan with this config."
      )
    if lengths is None and segment_ids is None:
      return
    B, L = query.shape[:2]
    documents = find_documents(B, L, lengths, segment_ids)
    if is_traced(documents.index) or is_traced(self.documents.index):
      return
    if not np.array_equal(documents.index, self.documents.index):
      raise ValueError(
        "plan was made for other lengths or segment_ids than the call's. Leave them out of the"
        " call, or make the plan with them."
      )


def _with_counted_sizes(
  metadata: AttentionMetadata, selection: Selection, max_focal: int | None
) -> AttentionMetadata:
  """The static sizes of a given focal mask, which need not keep to any quota.

  Raises:
    ValueError: the mask exceeds `max_focal`, or is traced and `max_focal` is None.
  """
  L, m = selection.focal_mask.shape[-1], metadata.config.group_size
  count_BxN = selection.focal_mask.sum(axis=-1)
  most, invalid = validation.focal_bound(count_BxN, max_focal), metadata.invalid
  if is_traced(count_BxN):
    exceeds_Bx1 = (count_BxN.max(axis=-1) > most)[:, None]
    invalid = exceeds_Bx1 if invalid is None else exceeds_Bx1 | invalid
    fewest = 0
  else:
    fewest = int(count_BxN.min())
  # Every document but the last may leave a partial group.
  groups = math.ceil((L - fewest) / m) + metadata.max_documents - 1
  return dataclasses.replace(metadata, sizes=Sizes(focal=most, groups=groups), invalid=invalid)

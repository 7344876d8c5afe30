"""All heads of a layer in one call of `grouped_attention`, each class of heads under its setting.

A call for each class needs slices of query, keys and values, and joins the outputs: copies of all
heads, which take up to half as long as the attention itself on a GPU. Here the kernels read and
write the arrays of all heads. Merging takes the range of heads of a class, the focal tokens and
groups of the classes are padded to one size, and every KV head has ranges of its own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dga_jax.attention.array_parts import put_part, take_part
from dga_jax.attention.attend import attention_kwargs, merge_tokens, zero_padding
from dga_jax.attention.block_entries import for_kernel
from dga_jax.attention.dense import causal_sources, dense_attention
from dga_jax.attention.head_classes import HeadClasses
from dga_jax.attention.metadata import AttentionMetadata
from dga_jax.attention.segments import Documents
from dga_jax.attention.sink_window import sink_window_sources, SinkWindowMetadata
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import HeadSetting
from pallas_kernels import dispatch
from pallas_kernels.dispatch import find_target, Implementation
from pallas_kernels.grouped_attention import grouped_attention, HeadOrder, KVSource, KVSources
from pallas_kernels.grouped_attention.block_sizes import H100_MULTIPROCESSORS
from pallas_kernels.head_range import HeadRange

# Full heads are part of the joint call up to this many tokens, if their tiles of keys occupy all
# multiprocessors: the call has one list of work for all heads, sorted by cost, where cuDNN leaves
# multiprocessors idle. On an H200 with 3 of 32 heads full, both passes take 2.20 ms instead of 2.49
# at 8K and 13.4 instead of 14.2 at 32K; at 128K, 148 instead of 139.
_MOST_TOKENS = 65536
_KEY_TILE = 128

# The metadata of one setting: of its attention, or the documents for "full".
type SettingMetadata = AttentionMetadata | SinkWindowMetadata | Documents
type MetadataOfSettings = Mapping[int, SettingMetadata] | Sequence[SettingMetadata]


def attends_jointly(
  query: Float[Array, "B L H D"],
  classes: HeadClasses,
  settings: Sequence[HeadSetting],
  implementation: Implementation = None,
) -> bool:
  """Whether `attend_jointly` is for a call; else each setting has a call of its own.

  Args:
    query: of the call, as the following arguments are.
    classes: the setting of every KV head.
    settings: of the heads.
    implementation: of `grouped_attention`.
  """
  choice = dispatch.choose("attend_heads", None, query, classes, settings, implementation)
  return choice == "one_call"


def _joint_refusal(
  query: Array,
  classes: HeadClasses,
  settings: Sequence[HeadSetting],
  implementation: Implementation,
) -> str | None:
  """Why one call cannot compute all heads; None if it can."""
  D, own = query.shape[-1], [settings[index] for index in classes.settings]
  if len(own) == 1:
    return "all heads have one setting"
  if not classes.are_adjacent:
    return "the heads of a setting are not adjacent"
  if implementation not in (None, "mosaic_gpu", ("mosaic_gpu",)):
    return f"implementation is {implementation!r}; it must be None or 'mosaic_gpu'"
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"query is {query.dtype}; it must be bfloat16 or float16"
  if D not in (64, 128):
    return f"head_dim is {D}; it must be 64 or 128"
  if any(isinstance(one, DGAConfig) and one.group_logit_bias != "none" for one in own):
    return "a setting has group_logit_bias, which would be that of all heads"
  return None


# The kernels of `grouped_attention` for all heads, or a call for each setting.
dispatch.define(
  "attend_heads",
  dispatch.Backend("one_call", dispatch.HOPPER, None, _joint_refusal),
  dispatch.Backend("each_setting", dispatch.ANY, None),
)


class _Tokens(NamedTuple):
  """The arrays of all heads. Each step takes parts of them and passes them on; see `take_part`."""

  query: Array
  key: Array
  value: Array

  def take_heads(self, heads: HeadRange) -> tuple["_Tokens", "_Tokens"]:
    """The arrays to pass on, and the heads of a class."""
    B, L, N, _ = self.key.shape
    pairs = []
    for x in self:
      ratio = x.shape[2] // N
      pairs.append(take_part(x, (0, 0, heads.first * ratio), (B, L, heads.size * ratio)))
    whole, part = zip(*pairs, strict=True)
    return _Tokens(*whole), _Tokens(*part)


class JointAttention(NamedTuple):
  """The output of all heads, and for each setting with a `DGAConfig` its merged tokens."""

  out: Float[Array, "B L H D"]
  merged: dict[int, KVSources]


def attend_jointly(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  classes: HeadClasses,
  metadata: MetadataOfSettings,
  *,
  focal_scores: Float[Array, "B L N"] | None = None,
  scale: Any = None,
  implementation: Implementation = None,
) -> JointAttention:
  """Attention of every head under the setting of its KV head.

  Heads with the setting "full" are one more class of the joint call, with a window that begins at
  their document, or take cuDNN's kernel on a copy of these heads; see `_full_heads_join`.

  Args:
    query: any float dtype, which all arrays share.
    key: N KV heads.
    value: as key.
    classes: the setting of every KV head; the heads of a setting are adjacent.
    metadata: of each setting: from `prepare`, from `prepare_sink_window`, or the documents. Groups
      have no logit bias.
    focal_scores: float32, if a setting has the selector "fitted".
    scale: of the attention logits, default 1/√D.
    implementation: of `grouped_attention`.
  """
  documents = _documents(metadata[classes.settings[0]])
  tokens = _Tokens(*zero_padding(documents, query, key, value))
  parts: list[tuple[HeadRange, KVSources]] = []
  dense: list[tuple[HeadRange, _Tokens]] = []
  order = _Order([], [], [])
  all_merged: dict[int, KVSources] = {}
  max_window = 1
  for index in classes.settings:
    heads, own = classes.heads_of(index), metadata[index]
    if isinstance(own, AttentionMetadata):
      own_scores = None
      if focal_scores is not None and own.config.selector == "fitted":
        own_scores = focal_scores[..., heads.first : heads.first + heads.size]
      merged = merge_tokens(
        *tokens,
        own,
        heads=heads,
        focal_scores=own_scores,
        implementation=implementation,
      )
      tokens = _Tokens(merged.query, merged.sources.window.key, merged.sources.window.value)
      all_merged[index] = merged.sources
      sources = for_kernel(query, merged.sources, own)
      most = attention_kwargs(query, own.config, scale)["max_window"]
      order.others.append(heads)
    elif isinstance(own, SinkWindowMetadata):
      sources = sink_window_sources(tokens.key, tokens.value, own, heads=heads)
      tokens = _Tokens(tokens.query, sources.window.key, sources.window.value)
      most = min(own.window, key.shape[1])
      order.others.append(heads)
    else:
      is_joint = _full_heads_join(query, heads, own)
      own_key, own_value = (heads.of(x, key.shape[2]) for x in (tokens.key, tokens.value))
      sources = causal_sources(own_key, own_value, own, empty=not is_joint)
      if is_joint:
        most = key.shape[1]
        order.full.append(heads)
      else:
        most = 1
        order.without_keys.append(heads)
        tokens, part = tokens.take_heads(heads)
        dense.append((heads, part))
    max_window = max(max_window, most)
    parts.append((heads, sources))
  out_BxLxHxD = grouped_attention(
    tokens.query,
    _join_sources(sorted(parts, key=lambda part: part[0].first), tokens),
    scale=query.shape[-1] ** -0.5 if scale is None else scale,
    max_window=max_window,
    head_order=order.for_kernels,
    implementation=implementation,
  )
  for heads, part in dense:
    full = dense_attention(*part, documents, scale=scale)
    out_BxLxHxD = put_part(out_BxLxHxD, full, (0, 0, heads.first * query.shape[2] // key.shape[2]))
  return JointAttention(_nan_where_invalid(out_BxLxHxD, classes, metadata), all_merged)


class _Order(NamedTuple):
  """Classes of heads in the order of falling numbers of keys that a query sees."""

  full: list[HeadRange]
  others: list[HeadRange]
  without_keys: list[HeadRange]

  @property
  def for_kernels(self) -> HeadOrder | None:
    """The order of work; None where all heads see about as many keys."""
    if not self.full and not self.without_keys:
      return None
    return HeadOrder(
      keys=(*self.full, *self.others, *self.without_keys),
      entries=(*self.others, *self.full, *self.without_keys),
    )


def _full_heads_join(query: Array, heads: HeadRange, documents: Documents) -> bool:
  """Whether full heads are part of the joint call. cuDNN does not take packed documents."""
  B, L = query.shape[:2]
  tiles = B * heads.size * math.ceil(L / _KEY_TILE)
  fills_gpu = tiles >= (find_target(query).num_cores or H100_MULTIPROCESSORS)
  return documents.rows == "packed" or (L <= _MOST_TOKENS and fills_gpu)


def _documents(metadata: SettingMetadata) -> Documents:
  return metadata if isinstance(metadata, Documents) else metadata.documents


def _join_sources(parts: Sequence[tuple[HeadRange, KVSources]], tokens: _Tokens) -> KVSources:
  """The sources of all heads from those of each class, in the order of the heads."""

  def ranges(name: str, bound: str) -> Array:
    each = [(heads, getattr(getattr(sources, name), bound)) for heads, sources in parts]
    return jnp.concatenate(
      [jnp.broadcast_to(x, (x.shape[0], heads.size, x.shape[2])) for heads, x in each], axis=1
    )

  def entries(name: str, kind: str) -> Array:
    arrays = [getattr(getattr(sources, name), kind) for _, sources in parts]
    most = max(x.shape[1] for x in arrays)
    padding = [(0, 0), (0, 0), (0, 0)]
    return jnp.concatenate(
      [jnp.pad(x, [padding[0], (0, most - x.shape[1]), *padding[1:]]) for x in arrays], axis=2
    )

  def source(name: str) -> KVSource:
    is_window = name == "window"
    return KVSource(
      tokens.key if is_window else entries(name, "key"),
      tokens.value if is_window else entries(name, "value"),
      ranges(name, "start"),
      ranges(name, "end"),
    )

  return KVSources(*map(source, KVSources._fields))


def _nan_where_invalid(
  out_BxLxHxD: Array, classes: HeadClasses, metadata: MetadataOfSettings
) -> Array:
  """NaN for the heads and queries whose document exceeds the static bound of their setting."""
  ratio = out_BxLxHxD.shape[2] // len(classes.row)
  setting_H = jnp.repeat(jnp.asarray(classes.row, jnp.int32), ratio)
  for index in classes.settings:
    own = metadata[index]
    if isinstance(own, AttentionMetadata) and own.invalid is not None:
      is_invalid = own.invalid[:, :, None, None] & (setting_H == index)[None, None, :, None]
      out_BxLxHxD = jnp.where(is_invalid, jnp.nan, out_BxLxHxD)
  return out_BxLxHxD

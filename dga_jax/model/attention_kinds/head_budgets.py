"""Attention whose KV heads have settings of their own: full, DGA and window heads in one layer.

Layers with the same settings of heads share a row. A scan over layers has one branch for each
distinct row, and the caches of the layers of a row are stacked. So a layer costs what its own heads
cost, and the cache holds the sum of the heads' caches.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from dga_jax.attention.head_classes import HeadClasses, switch_rows
from dga_jax.attention.joint_heads import attend_jointly, attends_jointly
from dga_jax.attention.segments import Documents
from dga_jax.choices import CacheDtypeName
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import HeadBudgets, HeadRow, HeadSetting, SinkWindow, split_row
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.model.attention_kinds.dense import DenseAttention
from dga_jax.model.attention_kinds.dga import DynamicGroupAttention
from dga_jax.model.attention_kinds.head_class import (
  attend_class,
  Options,
  own_scores,
  prefill_class,
  QKV,
  with_channel,
  write_layer,
)
from dga_jax.model.attention_kinds.joint_decode import decode_jointly
from dga_jax.model.attention_kinds.sink_window import SinkWindowAttention
from dga_jax.sharding import head_part

# For each distinct row, and each class of its heads: the cache of that class, stacked over the
# layers of the row.
type HeadCaches = tuple[tuple[Any, ...], ...]


def kind_of_setting(
  setting: HeadSetting, cache_dtype: CacheDtypeName | None = None
) -> AttentionKind:
  """The attention kind of the KV heads that follow a setting.

  Args:
    setting: of the heads.
    cache_dtype: see `HeadBudgets`; a `DGAConfig` has its own.
  """
  if isinstance(setting, DGAConfig):
    return DynamicGroupAttention(setting)
  if isinstance(setting, SinkWindow):
    return SinkWindowAttention(
      "sink_window", setting.window, setting.sinks, cache_dtype=cache_dtype
    )
  return DenseAttention(cache_dtype=cache_dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rank"], meta_fields=["row"])
@dataclasses.dataclass(frozen=True)
class LayerPlace:
  """A layer whose settings are known while tracing.

  Attributes:
    row: the setting of each KV head. Static.
    rank: how many earlier layers have the same row.
  """

  row: HeadRow
  rank: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class HeadBudgetsAttention(AttentionKind):
  """Every KV head, with its query heads, attends under its own setting of `HeadBudgets`."""

  name = "head_budgets"
  layers_differ = True

  budgets: HeadBudgets

  @functools.cached_property
  def kinds(self) -> tuple[AttentionKind, ...]:
    """The attention kind of each setting."""
    dtype = self.budgets.cache_dtype
    return tuple(kind_of_setting(setting, dtype) for setting in self.budgets.settings)

  @property
  def takes_focal_scores(self) -> bool:
    """Whether a setting has the selector "fitted"."""
    return any(kind.takes_focal_scores for kind in self.kinds)

  @functools.cached_property
  def rows(self) -> tuple[HeadRow, ...]:
    """The distinct rows of the assignment, in the order of their first layers."""
    return tuple(dict.fromkeys(self.budgets.assignment))

  @property
  def branches(self) -> int:
    """One for each distinct row."""
    return len(self.rows)

  def has_equal_parts(self, parts: int) -> bool:
    """Whether all parts of each row are equal."""
    return all(len(set(split_row(row, parts))) == 1 for row in self.rows)

  def layer_index(self, index: int) -> LayerPlace:
    """The row of a layer, and its rank among the layers of that row."""
    row = self.budgets.assignment[index]
    return LayerPlace(row, jnp.int32(self.budgets.assignment[:index].count(row)))

  def prepare(self, documents: Documents) -> tuple[Any, ...]:
    """The metadata of every setting."""
    return tuple(kind.prepare(documents) for kind in self.kinds)

  def at_layer(self, layer: Int[Array, ""] | int | LayerPlace) -> "LayerHeads":
    """The heads of one layer."""
    return LayerHeads(self, layer)

  def init_caches(
    self,
    num_layers: int,
    batch: int,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
  ) -> HeadCaches:
    """Empty caches of all layers: arrays [layers of a row, B, heads of a class, ...]."""
    return tuple(
      tuple(
        self.kinds[setting].init_caches(
          self.budgets.assignment.count(row),
          batch,
          max_length,
          HeadClasses(row).count(setting),
          head_dim,
          dtype,
        )
        for setting in HeadClasses(row).settings
      )
      for row in self.rows
    )

  def decode(
    self,
    q_BxHxD: Float[Array, "B H D"],
    k_BxNxD: Float[Array, "B N D"],
    v_BxNxD: Float[Array, "B N D"],
    cache: HeadCaches,
    layer: Int[Array, ""] | LayerPlace,
    *,
    focal_scores: Float[Array, "B N"] | None = None,
  ) -> tuple[Float[Array, "B H D"], HeadCaches]:
    """Appends one token to the cache of every class of heads and attends."""

    def decode(setting: int, qkv: QKV, options: Options, cache: Any, rank: Array) -> Any:
      return self.kinds[setting].decode(*qkv, cache, rank, **options)

    qkv = (q_BxHxD, k_BxNxD, v_BxNxD)
    return self.at_layer(layer).update(cache, decode, qkv, focal_scores, jointly=decode_jointly)

  def extend(
    self,
    q_BxTxHxD: Float[Array, "B T H D"],
    k_BxTxNxD: Float[Array, "B T N D"],
    v_BxTxNxD: Float[Array, "B T N D"],
    cache: HeadCaches,
    layer: Int[Array, ""] | LayerPlace,
    *,
    lengths: Int[Array, "B"],
    focal_scores: Float[Array, "B T N"] | None = None,
  ) -> tuple[Float[Array, "B T H D"], HeadCaches]:
    """Appends several tokens to the cache of every class of heads and attends."""

    def extend(setting: int, qkv: QKV, options: Options, cache: Any, rank: Array) -> Any:
      return self.kinds[setting].extend(*qkv, cache, rank, lengths=lengths, **options)

    qkv = (q_BxTxHxD, k_BxTxNxD, v_BxTxNxD)
    return self.at_layer(layer).update(cache, extend, qkv, focal_scores)


@dataclasses.dataclass(frozen=True)
class LayerHeads(AttentionKind):
  """The heads of one layer.

  Attributes:
    kind: of all layers.
    layer: its index, traced or not, or a `LayerPlace`.
  """

  name = "head_budgets"

  kind: HeadBudgetsAttention
  layer: Int[Array, ""] | int | LayerPlace

  @property
  def takes_focal_scores(self) -> bool:
    """As the kind of all layers."""
    return self.kind.takes_focal_scores

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: tuple[Any, ...],
    focal_scores: Float[Array, "B L N"] | None = None,
  ) -> Float[Array, "B L H D"]:
    """Attention over whole sequences; inside a `jax.shard_map`, of the device's heads."""
    settings = self.kind.budgets.settings

    def attend(setting: int, *heads: Array) -> Array:
      return attend_class(self.kind.kinds[setting], metadata[setting], *heads)

    def attend_row(row: HeadRow, q: Array, k: Array, v: Array, *scores: Array) -> Array:
      classes = HeadClasses(row)
      if attends_jointly(q, classes, settings):
        own = scores[0][..., 0] if scores else None
        return attend_jointly(q, k, v, classes, metadata, focal_scores=own).out
      return classes.map(attend, q, k, v, *scores)

    return self._switch(
      attend_row,
      q_BxLxHxD,
      k_BxLxNxD,
      v_BxLxNxD,
      *with_channel(focal_scores),
    )

  def attend_sharded(
    self,
    q_BxPxHxD: Float[Array, "B P H D"],
    k_BxPxNxD: Float[Array, "B P N D"],
    v_BxPxNxD: Float[Array, "B P N D"],
    metadata: tuple[Any, ...],
    *,
    axis_name: str,
    focal_scores: Float[Array, "B P N"] | None = None,
  ) -> Float[Array, "B P H D"]:
    """Attention on this device's part of the sequences.

    Only the heads with the setting "full" send all of their keys and values to all devices.

    Raises:
      ValueError: the devices that split heads have different settings. Each device would wait for
        collectives that the others do not run.
    """
    _, parts = head_part()
    for row in self.kind.rows:
      if len(set(split_row(row, parts))) > 1:
        raise ValueError(
          f"head_budgets has a layer with the settings {row}, and {parts} devices split its heads "
          "while others split sequences; every device must have the same settings. The trainer and "
          f"apply_budgets(model, budgets, parts={parts}) order the heads so if {parts} divides the "
          "number of heads of every setting in every layer. Choose such budgets, or split heads "
          "over fewer devices (config.mesh.tensor in training)."
        )

    def attend(setting: int, q: Array, k: Array, v: Array, *scores: Array) -> Array:
      kind: Any = self.kind.kinds[setting]
      options = {"axis_name": axis_name, **own_scores(kind, scores)}
      return kind.attend_sharded(q, k, v, metadata[setting], **options)

    return self._switch(
      lambda row, *heads: HeadClasses(row).map(attend, *heads),
      q_BxPxHxD,
      k_BxPxNxD,
      v_BxPxNxD,
      *with_channel(focal_scores),
    )

  def prefill_into(
    self,
    caches: HeadCaches,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: tuple[Any, ...],
    *,
    max_length: int,
    focal_scores: Float[Array, "B L N"] | None = None,
  ) -> tuple[Float[Array, "B L H D"], HeadCaches]:
    """Attends over right-padded prompts and writes them to this layer's part of empty caches."""

    def prefill(setting: int, qkv: QKV, options: Options, cache: Any, rank: Array) -> Any:
      kind = self.kind.kinds[setting]
      out, prompt = prefill_class(kind, max_length, metadata[setting], options, qkv)
      return out, write_layer(cache, prompt, rank)

    def prefill_jointly(
      q: Array,
      k: Array,
      v: Array,
      caches: tuple[Any, ...],
      classes: HeadClasses,
      settings: Sequence[HeadSetting],
      rank: Array,
      *,
      focal_scores: Array | None,
    ) -> tuple[Array, tuple[Any, ...]] | None:
      if not attends_jointly(q, classes, settings):
        return None
      joint = attend_jointly(q, k, v, classes, metadata, focal_scores=focal_scores)

      def write(setting: int, cache: Any) -> Any:
        kind: Any = self.kind.kinds[setting]
        own_k, own_v, *scores = (
          classes.take(x, setting) for x in (k, v, *with_channel(focal_scores))
        )
        options = own_scores(kind, scores)
        if setting in joint.merged:
          options["sources"] = joint.merged[setting]
        prompt = kind.cache_prompt(
          own_k, own_v, metadata[setting], max_length=max_length, **options
        )
        return write_layer(cache, prompt, rank)

      return joint.out, tuple(map(write, classes.settings, caches))

    qkv = (q_BxLxHxD, k_BxLxNxD, v_BxLxNxD)
    return self.update(caches, prefill, qkv, focal_scores, jointly=prefill_jointly)

  def update(
    self,
    caches: HeadCaches,
    function: Callable[..., tuple[Array, Any]],
    qkv: QKV,
    focal_scores: Array | None,
    *,
    jointly: Callable[..., tuple[Array, tuple[Any, ...]] | None] | None = None,
  ) -> tuple[Array, HeadCaches]:
    """Attends and updates this layer's part of the caches.

    Args:
      caches: of all layers.
      function: (setting, (q, k, v) of a class, its `focal_options`, its stacked cache, rank of the
        layer) to the output and the updated cache.
      qkv: queries, keys and values.
      focal_scores: of all KV heads, or None.
      jointly: as `decode_jointly`, for all classes at once; replaces `function` unless it returns
        None.
    """
    _, parts = head_part()

    def run(row: HeadRow, caches: HeadCaches, rank: Array, *heads: Array) -> Any:
      # Where devices split the caches, the parts of a row are equal; see `has_equal_parts`.
      of_device = [split_row(whole, parts)[0] for whole in self.kind.rows]
      place, classes = of_device.index(row), HeadClasses(row)
      before, after = caches[:place], caches[place + 1 :]
      if jointly is not None:
        q, k, v, *scores = heads
        own = scores[0][..., 0] if scores else None
        settings = self.kind.budgets.settings
        stepped = jointly(q, k, v, caches[place], classes, settings, rank, focal_scores=own)
        if stepped is not None:
          out, joint = stepped
          return out, (*before, joint, *after)
      outs, updated = [], []
      for setting, cache in zip(classes.settings, caches[place], strict=True):
        q, k, v, *scores = (classes.take(x, setting) for x in heads)
        options = own_scores(self.kind.kinds[setting], scores)
        out, cache = function(setting, (q, k, v), options, cache, rank)
        outs.append(out)
        updated.append(cache)
      return classes.join(outs), (*before, tuple(updated), *after)

    if isinstance(self.layer, LayerPlace):
      rank: Array = self.layer.rank
    else:
      layers = range(self.kind.budgets.num_layers)
      rank = jnp.stack([self.kind.layer_index(layer).rank for layer in layers])[self.layer]
    heads = (*qkv, *with_channel(focal_scores))
    result: tuple[Array, HeadCaches] = self._switch(run, caches, rank, *heads)
    return result

  def _switch(self, function: Callable[..., Any], *args: Any) -> Any:
    """function(row, *args) with the row of this layer, or of the device's part of it."""
    (part, parts), assignment = head_part(), self.kind.budgets.assignment
    if isinstance(self.layer, LayerPlace):
      return switch_rows(split_row(self.layer.row, parts), part, function, *args)
    rows = [piece for row in assignment for piece in split_row(row, parts)]
    return switch_rows(rows, self.layer * parts + part, function, *args)

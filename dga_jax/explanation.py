"""`dga_jax.explain`: the implementation of every op that a call uses, as a record that prints."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from dga_jax.api import dynamic_group_attention
from dga_jax.attention import validation
from dga_jax.attention.validation import Lengths, SegmentIds
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import HeadBudgets
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.model.attention_kinds.head_budgets import HeadBudgetsAttention, kind_of_setting
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation, Report

ArrayOrShape = Array | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class OpChoice:
  """The implementation that one op runs.

  Attributes:
    op: name of the op, a folder or function of `pallas_kernels`.
    runs: the implementation.
    why_not: (implementation, reason) of each other one, in order of preference. The reason is None
      for an implementation that could run the call and comes later in the order.
  """

  op: str
  runs: str
  why_not: tuple[tuple[str, str | None], ...]

  def reason(self, name: str) -> str | None:
    """Why an implementation does not run; None for one that could. KeyError if there is none."""
    return dict(self.why_not)[name]


@dataclasses.dataclass(frozen=True)
class Explanation:
  """The implementation of every op of a call. Prints as a short table.

  Attributes:
    device: the device that the call is for.
    ops: in the order in which the call runs them, then the ops of a decoding step. An op that runs
      twice in the same way is listed once.
  """

  device: str
  ops: tuple[OpChoice, ...]

  @classmethod
  def from_reports(cls, device: str, reports: list[Report]) -> "Explanation":
    """The explanation of a traced call.

    Args:
      device: the device that the call is for.
      reports: from `pallas_kernels.dispatch.collect_reports`.
    """
    choices = (
      OpChoice(
        op=report.op,
        runs=report.chosen,
        why_not=tuple(
          (name, reason) for name, reason in report.reasons.items() if name != report.chosen
        ),
      )
      for report in reports
    )
    return cls(device, tuple(dict.fromkeys(choices)))

  def __getitem__(self, op: str) -> OpChoice:
    """The first choice of an op; raises KeyError for an op that the call does not use."""
    for choice in self.ops:
      if choice.op == op:
        return choice
    raise KeyError(op)

  def __str__(self) -> str:
    """One line for each op: what runs, and the implementations that do not, in order."""
    first, second = (
      max(len(name), *(len(getattr(choice, name)) for choice in self.ops))
      for name in ("op", "runs")
    )
    lines = [f"{'op':<{first}}  {'runs':<{second}}  cannot run"]
    for choice in self.ops:
      refused = ", ".join(name for name, reason in choice.why_not if reason) or "-"
      lines.append(f"{choice.op:<{first}}  {choice.runs:<{second}}  {refused}")
    return "\n".join((f"for {self.device}; explanation.details() has the reasons", *lines))

  def details(self) -> str:
    """The reason of each implementation that does not run, one a line."""
    return "\n".join(
      f"{choice.op}: {name}: {reason or 'could run the call, and comes later in the order'}"
      for choice in self.ops
      for name, reason in choice.why_not
    )


def explain(
  query: Float[ArrayOrShape, "B L H D"],
  key: Float[ArrayOrShape, "B L N D"],
  value: Float[ArrayOrShape, "B L N D"],
  *,
  config: DGAConfig | HeadBudgets,
  lengths: Lengths | None = None,
  segment_ids: SegmentIds | None = None,
  focal_scores: Float[ArrayOrShape, "B L N"] | None = None,
  sharding: NamedSharding | None = None,
  implementation: Implementation = None,
) -> Explanation:
  """Which implementation runs each op of a call, and why not the others. Computes nothing.

      print(dga_jax.explain(query, key, value, config=config))

  The ops are those of `dynamic_group_attention` with these arguments, and those of the decoder's
  step over the cache of such prompts, which bidirectional attention does not have. The call is
  traced for its device, and every op adds its choice to the explanation.

  Args:
    query: of the call, or its `jax.ShapeDtypeStruct`.
    key: likewise.
    value: likewise.
    config: as for `dynamic_group_attention`.
    lengths: likewise.
    segment_ids: likewise.
    focal_scores: likewise.
    sharding: likewise.
    implementation: likewise.

  Raises:
    ValueError: as for `dynamic_group_attention`.
    NotImplementedError: likewise.
  """
  validation.query_and_key(query, key)
  validation.config_type(config, (DGAConfig, HeadBudgets))
  (B, L, _, D), N, dtype = query.shape, key.shape[2], key.dtype
  is_bidirectional = isinstance(config, DGAConfig) and not config.causal
  own = None if validation.is_traced(query) else getattr(query, "sharding", None)
  if sharding is None and isinstance(own, NamedSharding) and own.mesh.abstract_mesh.auto_axes:
    sharding = own  # Tracing hides it.

  def decode(query: Array, key: Array, value: Array) -> Any:
    kind: AttentionKind = (
      HeadBudgetsAttention(config) if isinstance(config, HeadBudgets) else kind_of_setting(config)
    )
    caches = kind.init_caches(1, B, L + 1, N, D, dtype)
    options = kind.focal_options(jnp.zeros((B, N)))
    token = (query[:, 0], key[:, 0], value[:, 0])
    return kind.decode(*token, caches, kind.layer_index(0), **options)

  call = functools.partial(
    dynamic_group_attention,
    config=config,
    lengths=lengths,
    segment_ids=segment_ids,
    sharding=sharding,
    implementation=implementation,
  )
  # A step of decoding is explained for one device: it takes no split arrays.
  unsplit = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)]
  target = dispatch.find_target(query, key, value)
  with dispatch.collect_reports(target) as reports:
    jax.eval_shape(call, query, key, value, focal_scores=focal_scores)
    if not is_bidirectional:
      jax.eval_shape(decode, *unsplit)
  return Explanation.from_reports(str(target), reports)

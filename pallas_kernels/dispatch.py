"""Chooses the backend of an op: one table of backends, and the device that a call is for.

Every entry point of `pallas_kernels` calls `run` with the name of its op. `collect_reports` tells
which backend each op of a traced function would run, and why not the others.
"""

import contextlib
import contextvars
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from pallas_kernels.target import find_target, Target

__all__ = [
  "OPS",
  "Backend",
  "Implementation",
  "Report",
  "Target",
  "check_implementation",
  "choose",
  "collect_reports",
  "find_target",
  "record",
  "refuse",
  "report",
  "run",
]

# None for the first backend that can run the call; a name; or names in order of preference.
type Implementation = str | tuple[str, ...] | None


class Requirement(NamedTuple):
  """The device that a backend needs."""

  device: str
  is_met_by: Callable[[Target], bool]


_ANY = Requirement("any device", lambda target: True)
_AMPERE = Requirement("an Ampere or newer GPU", lambda target: target.runs_triton)
_HOPPER = Requirement("a Hopper GPU", lambda target: target.capability == 9.0)
_TPU = Requirement("a TPU", lambda target: target.platform == "tpu")


class Backend(NamedTuple):
  """One implementation of an op.

  Functions are given as "module:name" below `pallas_kernels` and imported when a call for the
  right device needs them: kernel modules load compilers that most machines never use.
  """

  name: str
  requirement: Requirement
  function: str
  # A function of the op's arguments that returns why this backend cannot run them, or None.
  refusal: str | None = None
  # Why the backend runs only if it is named; None if it may be chosen by default.
  only_by_name: str | None = None


# For each op its backends, the preferred one first. The last serves any device.
OPS: dict[str, tuple[Backend, ...]] = {
  "grouped_attention": (
    Backend(
      "mosaic_gpu",
      _HOPPER,
      "grouped_attention.mosaic_gpu_attention:grouped_attention_mosaic_gpu",
      "grouped_attention.mosaic_gpu_attention:refusal",
    ),
    Backend(
      "mosaic_tpu",
      _TPU,
      "grouped_attention.mosaic_tpu_attention:grouped_attention_mosaic_tpu",
      "grouped_attention.mosaic_tpu_attention:refusal",
    ),
    Backend(
      "triton",
      _AMPERE,
      "grouped_attention.triton_attention:grouped_attention_triton",
      "grouped_attention.triton_attention:refusal",
    ),
    Backend(
      "jax_triton",
      _AMPERE,
      "grouped_attention.jax_triton_forward:grouped_attention_jax_triton",
      "grouped_attention.jax_triton_forward:refusal",
      only_by_name="it has no backward pass",
    ),
    Backend(
      "reference",
      _ANY,
      "grouped_attention.reference:grouped_attention_reference",
      only_by_name="it is the slow oracle of the tests",
    ),
    Backend("xla", _ANY, "grouped_attention.xla:grouped_attention_xla"),
  ),
  "merge_groups": (
    Backend(
      "triton",
      _AMPERE,
      "group_merge.triton_group_merge:merge_groups_triton",
      "group_merge.triton_group_merge:merge_groups_refusal",
    ),
    Backend(
      "mosaic_tpu",
      _TPU,
      "group_merge.mosaic_tpu_group_merge:merge_groups_mosaic_tpu",
      "group_merge.mosaic_tpu_group_merge:merge_groups_refusal",
    ),
    Backend("xla", _ANY, "group_merge.xla:merge_groups_xla"),
  ),
  "merge_blocks": (
    Backend(
      "triton",
      _AMPERE,
      "group_merge.triton_group_merge:merge_blocks_triton",
      "group_merge.triton_group_merge:merge_blocks_refusal",
    ),
    Backend(
      "mosaic_tpu",
      _TPU,
      "group_merge.mosaic_tpu_group_merge:merge_blocks_mosaic_tpu",
      "group_merge.mosaic_tpu_group_merge:merge_blocks_refusal",
    ),
    Backend("xla", _ANY, "group_merge.xla:merge_blocks_xla"),
  ),
  "sampled_importance": (
    Backend(
      "triton",
      _AMPERE,
      "importance.triton_importance:sampled_importance_triton",
      "importance.triton_importance:refusal",
    ),
    Backend(
      "mosaic_tpu",
      _TPU,
      "importance.mosaic_tpu_importance:sampled_importance_mosaic_tpu",
      "importance.mosaic_tpu_importance:refusal",
    ),
    Backend("xla", _ANY, "importance.xla:sampled_importance_xla"),
  ),
  "segmented_top_k": (
    Backend(
      "triton",
      _AMPERE,
      "segmented_top_k.triton_top_k:segmented_top_k_triton",
      "segmented_top_k.triton_top_k:refusal",
    ),
    Backend(
      "mosaic_tpu",
      _TPU,
      "segmented_top_k.mosaic_tpu_top_k:segmented_top_k_mosaic_tpu",
      "segmented_top_k.mosaic_tpu_top_k:refusal",
    ),
    Backend("xla", _ANY, "segmented_top_k.xla:segmented_top_k_xla"),
  ),
  "compact_indices": (
    Backend(
      "mosaic_tpu",
      _TPU,
      "compact_indices.mosaic_tpu_compact_indices:compact_indices_mosaic_tpu",
      "compact_indices.mosaic_tpu_compact_indices:refusal",
    ),
    Backend("xla", _ANY, "compact_indices.xla:compact_indices_xla"),
  ),
  "decode_attention": (
    Backend(
      "mosaic_tpu",
      _TPU,
      "decode.mosaic_tpu_decode:decode_attention_mosaic_tpu",
      "decode.api:attention_refusal",
    ),
    Backend("xla", _ANY, "decode.xla:decode_attention_xla"),
  ),
  # "triton" is one kernel for a whole step. The others are `decode_attention`, and XLA appends
  # the token and merges complete blocks.
  "decode_step": (
    Backend("triton", _AMPERE, "decode.triton_step:step_triton", "decode.api:step_refusal"),
    Backend(
      "mosaic_tpu",
      _TPU,
      "decode.mosaic_tpu_decode:decode_attention_mosaic_tpu",
      "decode.api:attention_refusal",
    ),
    Backend("xla", _ANY, "decode.xla:decode_attention_xla"),
  ),
  "dense_decode_step": (
    Backend(
      "triton", _AMPERE, "decode.triton_dense:dense_step_triton", "decode.triton_dense:refusal"
    ),
    Backend("xla", _ANY, "decode.xla_dense:dense_step_xla"),
  ),
  "quantized_product": (
    Backend(
      "triton",
      _AMPERE,
      "quantized_product.triton_product:quantized_product_triton",
      "quantized_product.api:refusal",
    ),
    Backend("xla", _ANY, "quantized_product.xla:quantized_product_xla"),
  ),
  "rms_norm": (
    Backend("triton", _AMPERE, "rms_norm.triton_rms_norm:rms_norm_triton", "rms_norm.api:refusal"),
    Backend("xla", _ANY, "rms_norm.xla:rms_norm_xla"),
  ),
}


class Report(NamedTuple):
  """Which backend one call of an op runs, and why not the others."""

  op: str
  target: Target
  # In the table's order: None for a backend that could run the call, else why it could not or
  # why it is not chosen by default.
  reasons: dict[str, str | None]
  chosen: str


_assumed: contextvars.ContextVar[Target | None] = contextvars.ContextVar("assumed", default=None)
_reports: contextvars.ContextVar[list[Report] | None] = contextvars.ContextVar(
  "reports", default=None
)

_TRACES = jax.make_user_context(None)


@contextlib.contextmanager
def collect_reports(target: Target | None = None) -> Iterator[list[Report]]:
  """Collects a `Report` of every op call that is traced or run inside the context, in order.

  Under `jax.eval_shape` nothing is computed:

      with collect_reports(find_target(query)) as reports:
        jax.eval_shape(function, query)

  Args:
    target: the device that calls are for, instead of the one that `find_target` finds; tracing
      hides on which device a concrete array is.
  """
  reports: list[Report] = []
  tokens = _reports.set(reports), _assumed.set(target or _assumed.get())
  try:
    # A cached trace of a jitted function would report nothing. A new context has no cached traces.
    with _TRACES(object()):
      yield reports
  finally:
    _reports.reset(tokens[0])
    _assumed.reset(tokens[1])


def run(op: str, implementation: Implementation, *args: Any, **options: Any) -> Any:
  """Calls the backend that `choose` returns with the op's arguments."""
  name = choose(op, implementation, *args, **options)
  function = next(backend.function for backend in OPS[op] if backend.name == name)
  return _load(function)(*args, **options)


def choose(op: str, implementation: Implementation, *args: Any, **options: Any) -> str:
  """The name of the backend that runs this call of an op.

  Args:
    op: a key of `OPS`.
    implementation: None for the first backend that can run the call and need not be named; a
      name; or a tuple of names, of which the first that can run the call is taken.
    args: the op's positional arguments, or their shapes.
    options: the op's keyword arguments.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named backend can run the call; the message says why not.
  """
  if _reports.get() is not None:
    return report(op, implementation, *args, **options).chosen
  target = _assumed.get() or find_target(*args)
  refused: dict[str, str] = {}
  for backend in _candidates(op, implementation):
    reason = _reason(backend, target, args, options)
    if reason is None:
      logging.getLogger(__name__).debug("%s runs %s; refused: %s", op, backend.name, refused)
      return backend.name
    refused[backend.name] = reason
  raise NotImplementedError(_message(op, implementation, refused))


def report(op: str, implementation: Implementation, *args: Any, **options: Any) -> Report:
  """As `choose`, with the reason of every backend; the call is not run.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named backend can run the call.
  """
  target = _assumed.get() or find_target(*args)
  reasons = {backend.name: _reason(backend, target, args, options) for backend in OPS[op]}
  candidates = [backend.name for backend in _candidates(op, implementation)]
  chosen = next((name for name in candidates if reasons[name] is None), None)
  if chosen is None:
    refused = {name: reasons[name] or "" for name in candidates}
    raise NotImplementedError(_message(op, implementation, refused))
  by_default = {
    backend.name: reasons[backend.name]
    or (backend.only_by_name and f"runs only if it is named: {backend.only_by_name}")
    for backend in OPS[op]
  }
  found = Report(op, target, by_default | {chosen: None}, chosen)
  record(found)
  return found


def record(found: Report) -> None:
  """Adds a report to those of `collect_reports`, for an op that chooses outside of `OPS`."""
  collected = _reports.get()
  if collected is not None:
    collected.append(found)


def check_implementation(op: str, implementation: Implementation) -> None:
  """Raises ValueError unless `implementation` is None, a backend of the op, or a tuple of them."""
  _candidates(op, implementation)


def _candidates(op: str, implementation: Implementation) -> list[Backend]:
  """The backends to try, in order."""
  table = {backend.name: backend for backend in OPS[op]}
  if implementation is None:
    return [backend for backend in table.values() if backend.only_by_name is None]
  names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
  if not names or not set(names) <= set(table):
    raise ValueError(
      f"implementation is {implementation!r}; for {op} it must be None, one of {tuple(table)} or a "
      "tuple of them."
    )
  return [table[name] for name in names]


def _reason(backend: Backend, target: Target, args: Any, options: Any) -> str | None:
  """Why a backend cannot run a call; None if it can."""
  if not backend.requirement.is_met_by(target):
    return f"runs on {backend.requirement.device}, and this call is for {target}"
  try:
    _load(backend.function)
  except ModuleNotFoundError as missing:
    if missing.name is None or missing.name.startswith("pallas_kernels"):
      raise
    return f"needs the package {missing.name}, which is not installed"
  if backend.refusal is None:
    return None
  reason: str | None = _load(backend.refusal)(*args, **options)
  return reason


def _message(op: str, implementation: Implementation, refused: dict[str, str]) -> str:
  reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
  return (
    f"implementation is {implementation!r}, which cannot run this call of {op} ({reasons}). "
    "implementation=None takes the first backend that can."
  )


def _load(function: str) -> Any:
  module, name = function.split(":")
  return getattr(importlib.import_module(f"pallas_kernels.{module}"), name)


def refuse(reason: str | None) -> None:
  """Raises NotImplementedError with a refusal's reason; None passes.

  Raises:
    NotImplementedError: if there is a reason.
  """
  if reason is not None:
    raise NotImplementedError(f"{reason}.")

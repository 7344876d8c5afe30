"""Chooses the backend of an op from the table of `backends.py`, by the device that a call is for.

Every entry point of `pallas_kernels` calls `run` with the name of its op. Higher layers add their
ops with `define`. `collect_reports` tells which backend each op of a traced function would run, and
why not the others.
"""

import contextlib
import contextvars
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from pallas_kernels.backends import AMPERE, ANY, Backend, HOPPER, OPS, Requirement, TPU
from pallas_kernels.target import assume_target, find_target, Target

__all__ = [
  "AMPERE",
  "ANY",
  "HOPPER",
  "OPS",
  "TPU",
  "Backend",
  "Implementation",
  "Report",
  "Requirement",
  "Target",
  "check_implementation",
  "choose",
  "collect_reports",
  "define",
  "find_target",
  "refusal",
  "refuse",
  "report",
  "run",
]

# None for the first backend that can run the call; a name; or names in order of preference.
type Implementation = str | tuple[str, ...] | None


class Report(NamedTuple):
  """Which backend one call of an op runs, and why not the others."""

  op: str
  target: Target
  # In the table's order: None for a backend that could run the call, else why it could not or
  # why it is not chosen by default.
  reasons: dict[str, str | None]
  chosen: str


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
  token = _reports.set(reports)
  assumed = contextlib.nullcontext() if target is None else assume_target(target)
  try:
    # A cached trace of a jitted function would report nothing. A new context has no cached traces.
    with _TRACES(object()), assumed:
      yield reports
  finally:
    _reports.reset(token)


def define(op: str, *backends: Backend) -> None:
  """Adds an op to `OPS`; the last backend serves any device."""
  OPS[op] = backends


def run(op: str, implementation: Implementation, *args: Any, **options: Any) -> Any:
  """Calls the backend that `choose` returns with the op's arguments."""
  name = choose(op, implementation, *args, **options)
  backend = next(backend for backend in OPS[op] if backend.name == name)
  if backend.host_refusal is not None and backend.host_refusal() is not None:
    backend = OPS[op][-1]  # Of an explained call, whose results have the same shapes.
  return _load(backend.function)(*args, **options)


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
  name, refused = _first(op, implementation, args, options)
  if name is None:
    raise NotImplementedError(_message(op, implementation, refused))
  logging.getLogger(__name__).debug("%s runs %s; refused: %s", op, name, refused)
  return name


def refusal(op: str, implementation: Implementation, *args: Any, **options: Any) -> str | None:
  """Why `choose` would raise NotImplementedError; None if it would not. It adds no report."""
  name, refused = _first(op, implementation, args, options)
  return None if name is not None else _reasons(refused)


def _first(
  op: str, implementation: Implementation, args: Any, options: Any
) -> tuple[str | None, dict[str, str]]:
  """The first candidate that can run a call, and the reasons of those before it."""
  target = find_target(*args)
  refused: dict[str, str] = {}
  for backend in _candidates(op, implementation):
    reason = _reason(backend, target, args, options)
    if reason is None:
      return backend.name, refused
    refused[backend.name] = reason
  return None, refused


def report(op: str, implementation: Implementation, *args: Any, **options: Any) -> Report:
  """As `choose`, with the reason of every backend; the call is not run.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named backend can run the call.
  """
  target = find_target(*args)
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
  collected = _reports.get()
  if collected is not None:
    collected.append(found)
  return found


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
  is_explained = _reports.get() is not None
  if not is_explained and backend.host_refusal is not None and (here := backend.host_refusal()):
    return here
  try:
    if backend.function is not None:
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
  return (
    f"implementation is {implementation!r}, which cannot run this call of {op} "
    f"({_reasons(refused)}). implementation=None takes the first backend that can."
  )


def _reasons(refused: dict[str, str]) -> str:
  return "; ".join(f"{name}: {reason}" for name, reason in refused.items())


def _load(function: str | Callable[..., Any] | None) -> Any:
  if not isinstance(function, str):
    return function
  module, name = function.split(":")
  return getattr(importlib.import_module(f"pallas_kernels.{module}"), name)


def refuse(reason: str | None) -> None:
  """Raises NotImplementedError with a refusal's reason; None passes.

  Raises:
    NotImplementedError: if there is a reason.
  """
  if reason is not None:
    raise NotImplementedError(f"{reason}.")

"""Run-time checks of the jaxtyping annotations of public functions and methods.

`install` affects the modules of PACKAGES that are imported afterwards. Each call of a public
function or method with a jaxtyping annotation is checked: shapes, dtypes, and dimensions that
arguments and result share. Arguments may be NumPy arrays, results may not. Private and nested
functions are not checked. jaxtyping's own import hook checks them too, and makes the tests 1.5
times as slow.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import operator
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jaxtyping
import numpy as np
from beartype import beartype, BeartypeConf

PACKAGES = ("dga_jax", "pallas_kernels", "train")

# An int is valid for an annotation of float (PEP 484).
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
  """Turns on the checks for all modules of PACKAGES that are imported after this call."""
  sys.meta_path.insert(0, _Finder())


def check_module(module: types.ModuleType) -> None:
  """Wraps the public functions and the methods of public classes of a module with checks."""
  for name, value in list(vars(module).items()):
    if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
      continue
    if inspect.isfunction(value):
      setattr(module, name, _checked(value))
    elif inspect.isclass(value):
      _check_methods(value)


def _check_methods(cls: type) -> None:
  for name, value in list(vars(cls).items()):
    if name.startswith("_") and name != "__call__":
      continue
    if inspect.isfunction(value):
      setattr(cls, name, _checked(value))
    elif isinstance(value, (classmethod, staticmethod)):
      setattr(cls, name, type(value)(_checked(value.__func__)))
    elif isinstance(value, property) and value.fget is not None:
      setattr(cls, name, property(_checked(value.fget), value.fset, value.fdel))


def _checked(function: Any) -> Any:
  annotations = inspect.get_annotations(function)
  if not any(map(_has_array, annotations.values())):
    return function
  # A signature is read from the function inside of a decorator.
  inspect.unwrap(function).__annotations__ = {
    name: annotation if name == "return" else _or_numpy(annotation)
    for name, annotation in annotations.items()
  }
  return jaxtyping.jaxtyped(function, typechecker=_check)


def _or_numpy(annotation: Any) -> Any:
  """The annotation of an argument, extended to NumPy arrays, which JAX functions accept."""
  if annotation is jax.Array:
    return jax.Array | np.ndarray
  if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
    dtype: Any = annotation.dtype
    return dtype[_or_numpy(annotation.array_type), annotation.dim_str]
  options = typing.get_args(annotation)
  if typing.get_origin(annotation) in (types.UnionType, typing.Union):
    return functools.reduce(operator.or_, map(_or_numpy, options))
  if typing.get_origin(annotation) is tuple:
    return tuple[tuple(option if option is ... else _or_numpy(option) for option in options)]
  return annotation


def _has_array(annotation: Any) -> bool:
  """Whether an annotation contains a jaxtyping annotation."""
  if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
    return True
  annotation = getattr(annotation, "__value__", annotation)  # The value of `type X = ...`.
  return any(map(_has_array, typing.get_args(annotation)))


class _Finder(importlib.abc.MetaPathFinder):
  def find_spec(
    self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
  ) -> importlib.machinery.ModuleSpec | None:
    if fullname.partition(".")[0] not in PACKAGES:
      return None
    spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
    if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
      spec.loader = _Loader(spec.loader.name, spec.loader.path)
    return spec


class _Loader(importlib.machinery.SourceFileLoader):
  def exec_module(self, module: types.ModuleType) -> None:
    super().exec_module(module)
    check_module(module)

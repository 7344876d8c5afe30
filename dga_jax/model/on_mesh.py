"""The model on a mesh whose axes are Explicit, or that only the types of its arrays name."""

import functools
import inspect
from collections.abc import Callable
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dga_jax.sharding import ShardingRules, use_rules

type Method = Callable[..., Array]


def on_mesh(*names: str | EllipsisType | None) -> Callable[[Method], Method]:
  """Decorates a method of the model, so that it runs on any mesh of its parameters and inputs.

  The model computes with Auto axes, over which the compiler partitions it by `ShardingRules`.
  Where mesh axes are Explicit, the types of the parameters and of the first argument give the
  rules, and the result has an Explicit type again.

  Args:
    names: the logical name of each axis of the result; "..." for axes split as those of the first
      argument are.
  """

  def decorate(method: Method) -> Method:
    first = list(inspect.signature(method).parameters)[1]

    @functools.wraps(method)
    def run(model: nnx.Module, *args: Array, **rows: Any) -> Array:
      inputs = args[0] if args else rows.pop(first)
      mesh = jax.sharding.get_abstract_mesh()
      in_force = not mesh.empty
      mesh = mesh if in_force else _mesh_of_types(model, inputs)
      if mesh.explicit_axes:
        return _run_on_explicit_axes(method, names, mesh, model, inputs, rows)
      if in_force or mesh.empty or not isinstance(inputs, jax.core.Tracer):
        return method(model, inputs, **rows)
      with jax.sharding.use_abstract_mesh(mesh):
        return method(model, inputs, **rows)

    return run

  return decorate


def _run_on_explicit_axes(
  method: Method,
  names: tuple[str | EllipsisType | None, ...],
  mesh: AbstractMesh,
  model: nnx.Module,
  inputs: Array,
  rows: dict[str, Any],
) -> Array:
  rules = _rules_of_types(model, inputs)
  structure, params = nnx.split(model)
  rows = {name: x if x is None else jnp.asarray(x) for name, x in rows.items()}

  def run(params: nnx.State, inputs: Array, rows: dict[str, Any]) -> Array:
    with use_rules(rules):
      return method(nnx.merge(structure, params), inputs, **rows)

  own = _axes_of(inputs)
  axes: list[tuple[str, ...]] = []
  for name in names:
    axes += own[:-1] if name is ... else [rules.activations.get(name or "", ())]
  out = NamedSharding(mesh, PartitionSpec(*(entry or None for entry in axes)))
  auto = jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=out)
  result: Array = auto(params, inputs, rows)
  return result


def _rules_of_types(model: nnx.Module, inputs: Array) -> ShardingRules:
  """The rules by which the types of parameters and inputs are split over Explicit axes."""
  found: dict[str, tuple[str, ...]] = {}
  for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    names = param.get_metadata()["out_sharding"]
    for name, axes in zip(names, _axes_of(param[...]), strict=True):
      if axes:
        found.setdefault(name, axes)
  batch, length, *_ = [*_axes_of(inputs), (), ()]
  return ShardingRules(
    batch=batch,
    length=length,
    residual_length=length,
    heads=found.get("heads", ()),
    mlp=found.get("mlp", ()),
    vocab=found.get("vocab", ()),
    stored_embed=found.get("embed", ()),
  )


def _mesh_of_types(model: nnx.Module, inputs: Array) -> AbstractMesh:
  """The mesh of the first array that is on one; an empty mesh without such an array."""
  mesh = jax.sharding.get_abstract_mesh()
  for x in (inputs, *jax.tree.leaves(nnx.state(model, nnx.Param))):
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.empty:
      break
  return mesh


def _axes_of(x: Array) -> list[tuple[str, ...]]:
  """The Explicit mesh axes that split each axis of an array."""
  spec = jax.typeof(x).sharding.spec
  named = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
  return [*named, *[()] * (len(x.shape) - len(named))]

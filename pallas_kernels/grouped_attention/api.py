"""The one entry to grouped attention: checks shapes, picks an implementation, says which."""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import find_target, Target
from pallas_kernels.grouped_attention.kv_sources import KVSources
from pallas_kernels.grouped_attention.reference import grouped_attention_reference
from pallas_kernels.grouped_attention.xla import grouped_attention_xla


def _mosaic_gpu(query: Array, sources: KVSources, **options: Any) -> Array:
  # Imported when used: it loads a compiler that most machines have no use for.
  from pallas_kernels.grouped_attention.mosaic_gpu_attention import grouped_attention_mosaic_gpu

  return grouped_attention_mosaic_gpu(query, sources, **options)


def _mosaic_tpu(query: Array, sources: KVSources, **options: Any) -> Array:
  from pallas_kernels.grouped_attention.mosaic_tpu_attention import grouped_attention_mosaic_tpu

  return grouped_attention_mosaic_tpu(query, sources, **options)


def _triton(query: Array, sources: KVSources, **options: Any) -> Array:
  from pallas_kernels.grouped_attention.triton_attention import grouped_attention_triton

  return grouped_attention_triton(query, sources, **options)


def _jax_triton(query: Array, sources: KVSources, **options: Any) -> Array:
  try:
    from pallas_kernels.grouped_attention.jax_triton_forward import grouped_attention_jax_triton
  except ModuleNotFoundError as missing:
    raise NotImplementedError(f"{missing.name} is not installed; see WORKSPACE.md") from missing
  return grouped_attention_jax_triton(query, sources, **options)


class _Backend(NamedTuple):
  attend: Callable[..., Array]
  runs_on: Callable[[Target], bool]
  wants: str
  by_name_only: str | None = None  # why it is not chosen by itself


# In the order in which they are tried when none is named. "reference" is never chosen by itself.
_BACKENDS = {
  "mosaic_gpu": _Backend(_mosaic_gpu, lambda t: t.capability == 9.0, "a Hopper GPU"),
  "mosaic_tpu": _Backend(_mosaic_tpu, lambda t: t.platform == "tpu", "a TPU"),
  "triton": _Backend(_triton, lambda t: (t.capability or 0) >= 8.0, "an Ampere or newer GPU"),
  "jax_triton": _Backend(
    _jax_triton,
    lambda t: (t.capability or 0) >= 8.0,
    "an Ampere or newer GPU",
    by_name_only="chosen by name alone: it has no backward pass",
  ),
  "xla": _Backend(grouped_attention_xla, lambda t: True, "any device"),
}
IMPLEMENTATIONS = ("reference", *_BACKENDS)


def grouped_attention(
  query: Float[Array, "B L H D"],
  sources: KVSources,
  *,
  scale: float,
  max_window: int,
  group_bias: float = 0.0,
  implementation: str | None = None,
) -> Float[Array, "B L H D"]:
  """One softmax per query over one range of each of three key/value sources.

  For query (b, i) of head h, KV head n = ⌊h / (H / N)⌋, and s over the tokens [start, end) that
  the query sees of the focal, the group and the window source:

      out = Σ_s softmax_s(scale · q·k_s + bias_s) v_s,   bias_s = group_bias for groups, else 0

  Softmax statistics are float32. A query whose three ranges are empty gives 0, in value and
  gradient. Differentiable in the query, keys and values.

  Args:
    query: any float dtype; all keys and values share it.
    sources: keys, values and int32 ranges; see `KVSources`. A token outside all ranges must be
      finite.
    scale: multiplies the logits.
    max_window: static upper bound on end − start of one query's range of the window.
    group_bias: added to the logits of groups.
    implementation: a name of `IMPLEMENTATIONS`, or None for the first that applies and is
        not marked as chosen by name only.

  Raises:
    ValueError: if the implementation is unknown.
    NotImplementedError: if it cannot compute this call; the message says why.
  """
  options: dict[str, Any] = {
    "scale": scale,
    "group_bias": group_bias,
    "max_window": max_window,
  }
  if implementation == "reference":
    return grouped_attention_reference(query, sources, **options)
  if implementation is not None and implementation not in _BACKENDS:
    raise ValueError(
      f"implementation is {implementation!r}; it must be None or one of {IMPLEMENTATIONS}."
    )
  target = find_target(query, *jax.tree.leaves(sources))
  if implementation is not None:
    return _attend(implementation, target, query, sources, **options)
  refusals = []
  for name, backend in _BACKENDS.items():
    try:
      if backend.by_name_only is not None:
        raise NotImplementedError(backend.by_name_only)
      out = _attend(name, target, query, sources, **options)
    except NotImplementedError as refusal:
      refusals.append(f"{name}: {refusal}")
    else:
      logging.getLogger(__name__).debug("took %s; refused: %s", name, refusals or "none")
      return out
  raise NotImplementedError("; ".join(refusals))


def refusals(
  target: Target, query: Array, sources: KVSources, **options: Any
) -> dict[str, str | None]:
  """Why each implementation is not taken by itself, None for those that apply; runs nothing.

  Args:
    target: the device it is for.
    query: as in `grouped_attention`, or its shape.
    sources: likewise.
    options: its keyword arguments but for `implementation`.
  """
  reasons: dict[str, str | None] = {}
  for name, backend in _BACKENDS.items():
    try:
      jax.eval_shape(functools.partial(_attend, name, target, **options), query, sources)
      reasons[name] = backend.by_name_only
    except NotImplementedError as refusal:
      reasons[name] = str(refusal)
  return reasons


def _attend(name: str, target: Target, query: Array, sources: KVSources, **options: Any) -> Array:
  backend = _BACKENDS[name]
  if not backend.runs_on(target):
    raise NotImplementedError(
      f"{name} runs on {backend.wants}, and this call is for {target}; see dga_jax.explain"
    )
  return backend.attend(query, sources, **options)

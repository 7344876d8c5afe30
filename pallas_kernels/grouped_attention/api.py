"""The one entry to grouped attention: checks shapes, picks an implementation, says which."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.grouped_attention.bounds import Bounds
from pallas_kernels.grouped_attention.reference import grouped_attention_reference
from pallas_kernels.grouped_attention.xla import grouped_attention_xla

# In the order in which they are tried when none is named. "reference" is never chosen by itself.
_BACKENDS: dict[str, Callable[..., Any]] = {
    "xla": grouped_attention_xla,
}
IMPLEMENTATIONS = ("reference", *_BACKENDS)


def grouped_attention(
    query: Float[Array, "B L H D"],
    focal_key: Float[Array, "B r N D"],
    focal_value: Float[Array, "B r N D"],
    group_key: Float[Array, "B k N D"],
    group_value: Float[Array, "B k N D"],
    window_key: Float[Array, "B w N D"],
    window_value: Float[Array, "B w N D"],
    bounds: Bounds,
    *,
    scale: float,
    max_window: int,
    group_bias: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "B L H D"]:
    """One softmax per query over a range of each of three key sources.

    With s over focal [focal_start, focal_end), groups [group_start, group_end) and window
    [window_start, window_end) of query (b, i) and KV head n = ⌊h / R⌋:

        out = Σ_s softmax_s(scale · q·k_s + bias_s) v_s,   bias_s = group_bias for groups, else 0

    Softmax statistics are float32. Queries that see nothing give 0, in value and gradient.

    Args:
      query: any float dtype; all arrays share it.
      bounds: int32 ranges per query; see `Bounds`. Entries outside all ranges must be finite.
      scale: of the logits.
      max_window: static bound on window_end − window_start of one query.
      group_bias: added to the logits of groups.
      implementation: a name of `IMPLEMENTATIONS`, or None for the fastest that applies.

    Raises:
      ValueError: if the implementation is unknown.
      NotImplementedError: if it cannot compute this call; the message says why.
    """
    arrays = (query, focal_key, focal_value, group_key, group_value, window_key, window_value)
    options = {"scale": scale, "group_bias": group_bias, "max_window": max_window}
    if implementation == "reference":
        return grouped_attention_reference(*arrays, bounds, **options)
    if implementation is not None:
        if implementation not in _BACKENDS:
            raise ValueError(
                f"implementation is {implementation!r}; it must be None or one of"
                f" {IMPLEMENTATIONS}."
            )
        return _BACKENDS[implementation](*arrays, bounds, **options)
    refusals = []
    for name, backend in _BACKENDS.items():
        try:
            return backend(*arrays, bounds, **options)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError("no implementation applies: " + "; ".join(refusals))

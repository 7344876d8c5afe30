"""RoPE's base and scaling in a config.json, in each form in which transformers stores them."""

from collections.abc import Collection

from dga_jax.conversion.errors import conversion_errors, ConversionError, shown
from dga_jax.conversion.hugging_face_keys import LAYER_TYPES, ROPE
from dga_jax.conversion.known_keys import Values
from dga_jax.model import RopeScaling

_DEFAULT_BASE = 10000.0


def read_rope(
  values: Values, layer_type: str, ignored_keys: Collection[str] = ()
) -> tuple[float, RopeScaling | None]:
  """The base of the wavelengths, and the scaling of the frequencies.

  transformers 4 has `rope_theta` beside `rope_scaling`, transformers 5 has one object
  `rope_parameters`, or one for each type of layer in it. Where a file has more than one form, they
  must agree.

  Args:
    values: config.json.
    layer_type: "full_attention" or "sliding_attention", the type of all layers.
    ignored_keys: unknown keys that change nothing, such as "rope_scaling.note".

  Raises:
    ConversionError: an unknown key or type, a factor without a type, a missing or odd value, or
      forms that disagree.
  """
  stored = [_of_layer_type(values, key, layer_type) for key in ("rope_scaling", "rope_parameters")]
  found: list[Values | None] = [rope for rope in stored if rope is not None]
  results = [_read(values, rope, ignored_keys) for rope in found or [None]]
  if results[0] != results[-1]:
    raise ConversionError(
      f"{values.where} has both rope_scaling and rope_parameters, and they differ; delete one."
    )
  return results[0]


def rope_scaling_values(scaling: RopeScaling | None) -> dict[str, object] | None:
  """The `rope_scaling` of a config.json; the inverse of `read_rope`."""
  if scaling is None:
    return None
  if scaling.kind == "linear":
    return {"rope_type": "linear", "factor": scaling.factor}
  return {
    "rope_type": "llama3",
    "factor": scaling.factor,
    "low_freq_factor": scaling.low_freq_factor,
    "high_freq_factor": scaling.high_freq_factor,
    "original_max_position_embeddings": scaling.original_max_position,
  }


def _of_layer_type(values: Values, key: str, layer_type: str) -> Values | None:
  """The RoPE object under `key` that holds for the layers; None where there is none."""
  rope = values.mapping(key)
  if rope is None or not any(name in LAYER_TYPES for name in rope):
    return rope
  if flat := [name for name in rope if name not in LAYER_TYPES]:
    raise ConversionError(
      f"{rope.where} has {shown(flat)} in {key} beside objects for types of layers; it must have "
      "either."
    )
  nested = rope.mapping(layer_type)
  if nested is None:
    raise ConversionError(
      f"{rope.where} has no {key}.{layer_type}, the type of all layers of this model."
    )
  return nested


def _read(
  values: Values, rope: Values | None, ignored_keys: Collection[str]
) -> tuple[float, RopeScaling | None]:
  top = values.number("rope_theta", _DEFAULT_BASE)
  if rope is None:
    return top, None
  kind = _type(rope)
  ROPE[kind].check(rope, ignored_keys)
  base = rope.number("rope_theta", top)
  if "rope_theta" in values and base != top:
    raise ConversionError(
      f"{values.where} has rope_theta={top}, but {rope.prefix}rope_theta={base}; delete one."
    )
  if kind == "default":
    return base, None
  if kind == "linear":
    with conversion_errors(rope.where):
      return base, RopeScaling("linear", rope.number("factor"))
  length = _original_length(values, rope)
  with conversion_errors(rope.where):
    return base, RopeScaling(
      "llama3",
      rope.number("factor"),
      rope.number("low_freq_factor"),
      rope.number("high_freq_factor"),
      length,
    )


def _original_length(values: Values, rope: Values) -> int:
  """The context length before the stretch, in the order in which transformers looks for it."""
  key = "original_max_position_embeddings"
  for holder in (values, rope):
    if key in holder:
      return holder.integer(key)
  return values.integer("max_position_embeddings")


def _type(rope: Values) -> str:
  kind = rope.string("rope_type", rope.string("type", "default"))
  if "type" in rope and rope["type"] != kind:
    raise ConversionError(
      f"{rope.where} has {rope.prefix}rope_type={shown(kind)}, but {rope.prefix}type="
      f"{shown(rope['type'])}; delete one."
    )
  if kind not in ROPE:
    raise ConversionError(
      f"{rope.where} has the rope type {shown(kind)}; supported are {', '.join(map(repr, ROPE))}."
    )
  if "rope_type" not in rope and "type" not in rope and rope.number("factor", 1.0) != 1:
    raise ConversionError(
      f"{rope.where} has {rope.prefix}factor={shown(rope['factor'])} without a rope_type; write "
      '"rope_type": "linear" if the factor divides every frequency.'
    )
  return kind

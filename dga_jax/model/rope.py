"""Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split form of LLaMA."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dga_jax.choices import RopeKind
from dga_jax.config_dataclasses import require_choice, require_int, require_number


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Scaling of the rotary frequencies beyond the context that a model was trained on.

  Attributes:
    kind: "linear" divides every frequency by `factor`; "llama3" divides the low frequencies,
      keeps the high ones and interpolates between them (see `inverse_frequencies`).
    factor: growth of the context, at least 1.
    low_freq_factor: wavelengths above original_max_position / low_freq_factor are scaled.
    high_freq_factor: wavelengths below original_max_position / high_freq_factor are kept.
    original_max_position: context length in tokens of the training before scaling.

  Raises:
    ValueError: names the field, its value and the values it takes.
  """

  kind: RopeKind
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position: int = 8192

  def __post_init__(self) -> None:
    require_choice(self, "kind", RopeKind)
    require_number(self, "factor", least=1)
    require_number(self, "low_freq_factor", above=0)
    require_number(self, "high_freq_factor", above=self.low_freq_factor)
    require_int(self, "original_max_position", least=1)


class RopeTable(NamedTuple):
  """Cosines and sines of each position's angles, float32; C = D/2 channel pairs."""

  cos: Float[Array, "B L C"]
  sin: Float[Array, "B L C"]


def inverse_frequencies(
  head_dim: int, *, base: float, scaling: RopeScaling | None = None
) -> np.ndarray:
  """Angles per position ω_c, in radians, of the D/2 channel pairs.

  ω_c = base^(−2c/D). "linear" scaling takes ω_c/factor. "llama3" scaling (LLaMA 3.1) depends on
  the wavelength λ = 2π/ω: with s = (original_max_position/λ − low_freq_factor) /
  (high_freq_factor − low_freq_factor) clipped to [0, 1], it takes (1 − s)·ω/factor + s·ω.

  Args:
    head_dim: D, even.
    base: base of the wavelengths.
    scaling: None for unscaled frequencies.

  Returns:
    float64 [D/2]; positions multiply it in float32.
  """
  omega_C = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if scaling is None:
    return omega_C
  if scaling.kind == "linear":
    return omega_C / scaling.factor
  turns_C = scaling.original_max_position * omega_C / (2 * math.pi)  # original length over λ
  span = scaling.high_freq_factor - scaling.low_freq_factor
  keep_C = np.clip((turns_C - scaling.low_freq_factor) / span, 0.0, 1.0)
  return (1 - keep_C) * omega_C / scaling.factor + keep_C * omega_C


def rope_table(positions_BxL: Int[Array, "B L"], inverse_frequencies_C: np.ndarray) -> RopeTable:
  """Cosines and sines of position·ω_c, float32 for every compute dtype.

  Args:
    positions_BxL: position of each token in its document.
    inverse_frequencies_C: ω [D/2], from `inverse_frequencies`.
  """
  omega_C = jnp.asarray(inverse_frequencies_C, jnp.float32)
  angle_BxLxC = positions_BxL.astype(jnp.float32)[:, :, None] * omega_C[None, None, :]
  return RopeTable(jnp.cos(angle_BxLxC), jnp.sin(angle_BxLxC))


def apply_rope(x_BxLxHxD: Float[Array, "B L H D"], table: RopeTable) -> Float[Array, "B L H D"]:
  """Rotates channel c with channel c + D/2 by the angle of each position.

  Args:
    x_BxLxHxD: queries or keys, any float dtype.
    table: of the same positions.

  Returns:
    The rotated array in the input's dtype; the rotation is computed in float32.
  """
  x1, x2 = jnp.split(x_BxLxHxD.astype(jnp.float32), 2, axis=-1)
  cos, sin = table.cos[:, :, None, :], table.sin[:, :, None, :]
  rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  return rotated.astype(x_BxLxHxD.dtype)

"""Attention to the first tokens (sinks) and to a window of the last ones, at true positions."""

import dataclasses

from jaxtyping import Array, Float

from dga_jax.attention.context_parallel.sink_window import sink_window_attend_sharded
from dga_jax.attention.segments import Documents
from dga_jax.attention.sink_window import (
  attend_sink_window,
  prepare_sink_window,
  SinkWindowMetadata,
)
from dga_jax.model.attention_kinds.sink_window_cache import SinkWindowCacheAttention


@dataclasses.dataclass(frozen=True)
class SinkWindowAttention(SinkWindowCacheAttention):
  """Each query sees the first `sinks` tokens of its document and the last `window` others.

  The rule of sliding-window attention, and of the heads that are not full in DuoAttention (Xiao et
  al., arXiv 2410.10819). Keys keep their RoPE positions.
  """

  def prepare(self, documents: Documents) -> SinkWindowMetadata:
    """The sinks and the window of every token."""
    return prepare_sink_window(documents, sinks=self.sinks, window=self.window)

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: SinkWindowMetadata,
  ) -> Float[Array, "B L H D"]:
    """Attention inside each document; padding outputs 0."""
    return attend_sink_window(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata)

  def attend_sharded(
    self,
    q_BxPxHxD: Float[Array, "B P H D"],
    k_BxPxNxD: Float[Array, "B P N D"],
    v_BxPxNxD: Float[Array, "B P N D"],
    metadata: SinkWindowMetadata,
    *,
    axis_name: str,
  ) -> Float[Array, "B P H D"]:
    """Attention of this device's part of the sequences; sinks alone go to all devices."""
    return sink_window_attend_sharded(
      q_BxPxHxD, k_BxPxNxD, v_BxPxNxD, metadata, axis_name=axis_name
    )

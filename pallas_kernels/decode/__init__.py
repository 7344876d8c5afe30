"""Attention of one query per sequence to a compact cache and the raw tokens beside it."""

from pallas_kernels.decode.api import decode_attention
from pallas_kernels.decode.entries import GroupBias, Visible

__all__ = ["GroupBias", "Visible", "decode_attention"]

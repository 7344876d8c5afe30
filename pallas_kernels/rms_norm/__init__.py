"""RMSNorm of a few rows, with the residual sum before it."""

from pallas_kernels.rms_norm.api import rms_norm

__all__ = ["rms_norm"]

"""Products of a few rows with weights in 8 bits, which are read from memory in 8 bits."""

from pallas_kernels.quantized_product.api import quantized_product

__all__ = ["quantized_product"]

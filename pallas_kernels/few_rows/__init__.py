"""Products of a few rows with weights: what a decoder layer does for one token of each sequence."""

from pallas_kernels.few_rows.api import add_product, few_rows_refusal, gated_product, Norm, products

__all__ = ["Norm", "add_product", "few_rows_refusal", "gated_product", "products"]

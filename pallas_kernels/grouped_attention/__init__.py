"""Attention over [focal tokens | merged groups | a raw window], each a range per query."""

from pallas_kernels.grouped_attention.api import grouped_attention
from pallas_kernels.grouped_attention.kv_sources import HeadOrder, KVSource, KVSources

__all__ = ["HeadOrder", "KVSource", "KVSources", "grouped_attention"]

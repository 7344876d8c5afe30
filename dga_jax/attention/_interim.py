"""Interim: the interface of KVSources over seven arrays and bounds."""

from typing import NamedTuple

from jaxtyping import Array

from pallas_kernels import grouped_attention as ga
from pallas_kernels.grouped_attention import Bounds


class KVSource(NamedTuple):
  key: Array
  value: Array
  start: Array
  end: Array


class KVSources(NamedTuple):
  focal: KVSource
  group: KVSource
  window: KVSource


def _unpack(s):
  arrays = [x for one in s for x in (one.key, one.value)]
  return *arrays, Bounds(*[x for one in s for x in (one.start, one.end)])


def grouped_attention(query, sources, **kw):
  return ga.grouped_attention(query, *_unpack(sources), **kw)


def refusals(target, query, sources, **kw):
  return ga.refusals(target, query, *_unpack(sources), **kw)

"""Tests of GPU time in collectives, read from a profile, and of the NVLink counters."""

import pytest
from jax.profiler import ProfileData

from benchmarks._collectives import parse_nvlink_bytes, read_profile

# A matrix product runs from 0 to 4 ms and an NCCL kernel from 3 to 6 ms. "XLA Ops" repeats them.
PROFILE = """
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #1(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000000 }
  }
  lines {
    name: "Stream #2" timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 3000000000 duration_ps: 3000000000 }
  }
  lines {
    name: "XLA Ops" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000000 }
  }
  event_metadata { key: 1 value { id: 1 name: "gemm" } }
  event_metadata { key: 2 value { id: 2 name: "ncclDevKernel_AllGather_RING_LL" } }
}
planes { name: "/host:CPU" }
"""
LINKS = """GPU 0: NVIDIA H100 80GB HBM3
\t Link 0: Data Tx: 7 KiB
\t Link 0: Data Rx: 30 KiB
\t Link 1: Data Tx: 7 KiB
\t Link 1: Data Rx: 12 KiB
"""


def profile_of(text: str) -> ProfileData:
  return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))


def test_time_in_collectives_and_their_exposed_part() -> None:
  profile = read_profile(profile_of(PROFILE))
  assert profile.busy == pytest.approx(6e-3)
  assert profile.collectives == pytest.approx(3e-3)
  assert profile.exposed == pytest.approx(2e-3)
  assert profile.kernels == pytest.approx({"gemm": 4e-3, "ncclDevKernel_AllGather_RING_LL": 3e-3})


def test_a_profile_without_gpu_kernels_is_an_error() -> None:
  with pytest.raises(RuntimeError, match="no GPU kernels"):
    read_profile(profile_of('planes { name: "/host:CPU" }'))


def test_nvlink_bytes_are_summed_over_the_links() -> None:
  assert parse_nvlink_bytes(LINKS) == 42 * 1024
  assert parse_nvlink_bytes("Unable to retrieve NVLink information") is None

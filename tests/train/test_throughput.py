"""Measured step times, and the peak FLOP/s of devices."""

from types import SimpleNamespace

import jax
import pytest

from train import throughput
from train.throughput import peak_flops, StepTimer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
  clock = SimpleNamespace(now=100.0)
  monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
  return clock


def lap(timer: StepTimer, clock: SimpleNamespace, seconds: float) -> None:
  clock.now += seconds
  timer.lap()


def test_step_time_is_the_recent_median_without_pauses(clock: SimpleNamespace) -> None:
  timer = StepTimer(tokens_per_step=100, flops_per_token=3.0, peak_flops=1000.0)
  lap(timer, clock, 30.0)  # The first step compiles.
  assert timer.speed() is None
  for seconds in (2.0, 2.0, 9.0):
    lap(timer, clock, seconds)
  timer.pause()
  lap(timer, clock, 50.0)
  lap(timer, clock, 2.0)
  speed = timer.speed()
  assert speed is not None
  assert (speed.step_seconds, speed.tokens_per_second) == (2.0, 50.0)
  assert speed.mfu == pytest.approx(0.15)


def test_old_steps_are_forgotten(clock: SimpleNamespace) -> None:
  timer = StepTimer(tokens_per_step=1, flops_per_token=1.0, peak_flops=1.0)
  for seconds in [5.0] * 100 + [1.0] * 100:
    lap(timer, clock, seconds)
  speed = timer.speed()
  assert speed is not None
  assert speed.step_seconds == 1.0


@pytest.mark.parametrize(
  ("kind", "expected"),
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
  ],
)
def test_known_devices(kind: str, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
  devices = [SimpleNamespace(device_kind=kind, platform="gpu")] * 4
  monkeypatch.setattr(jax, "devices", lambda: devices)
  assert peak_flops("bfloat16") == 4 * expected


def test_the_peak_of_an_unknown_device_is_measured_and_logged(
  caplog: pytest.LogCaptureFixture,
) -> None:
  with caplog.at_level("INFO"):
    assert 1e8 < peak_flops("float32") < 1e15
  assert "measured" in caplog.text

"""Metrics for Prometheus."""

from collections.abc import Iterable, Mapping

import prometheus_client
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dga_jax.generation import Engine

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)


class Metrics:
  """Counters and histograms of a server, and gauges of its engines.

  Args:
    engines: by the name of their model.
  """

  def __init__(self, engines: Mapping[str, Engine]) -> None:
    self.registry = registry = prometheus_client.CollectorRegistry()
    self.requests = prometheus_client.Counter(
      "dga_requests", "HTTP requests by path and status.", ["path", "status"], registry=registry
    )
    self.prompt_tokens = prometheus_client.Counter(
      "dga_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry
    )
    self.cached_tokens = prometheus_client.Counter(
      "dga_cached_tokens", "Tokens of prompts found in kept caches.", ["model"], registry=registry
    )
    self.new_tokens = prometheus_client.Counter(
      "dga_generated_tokens", "Tokens of answers.", ["model"], registry=registry
    )
    self.first_token = prometheus_client.Histogram(
      "dga_time_to_first_token_seconds",
      "From the request to its first token.",
      ["model"],
      buckets=_SECONDS,
      registry=registry,
    )
    self.between_tokens = prometheus_client.Histogram(
      "dga_time_between_tokens_seconds",
      "Mean time between the tokens of an answer.",
      ["model"],
      buckets=_SECONDS,
      registry=registry,
    )
    registry.register(_EngineGauges(engines))

  def text(self) -> bytes:
    """All metrics in Prometheus's text format."""
    return prometheus_client.generate_latest(self.registry)


class _EngineGauges(Collector):
  """The status of every engine when the metrics are read."""

  def __init__(self, engines: Mapping[str, Engine]) -> None:
    self._engines = engines

  def collect(self) -> Iterable[Metric]:
    names = {
      "running": ("dga_requests_running", "Requests in slots."),
      "waiting": ("dga_requests_waiting", "Requests that wait or whose prompt is being read."),
      "kept": ("dga_kept_caches", "Caches kept for later requests."),
      "slot_bytes": ("dga_slot_bytes", "Bytes of the caches of all slots."),
      "kept_device_bytes": ("dga_kept_device_bytes", "Bytes of kept caches on the device."),
      "kept_host_bytes": ("dga_kept_host_bytes", "Bytes of kept caches on the host."),
    }
    gauges = {
      field: GaugeMetricFamily(name, help_text, labels=["model"])
      for field, (name, help_text) in names.items()
    }
    for model, engine in self._engines.items():
      status = engine.status()
      for field, gauge in gauges.items():
        gauge.add_metric([model], getattr(status, field))
    return gauges.values()

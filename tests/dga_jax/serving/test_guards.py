"""API keys of the command line, and the count of requests that end in a fault of the server."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.testclient import TestClient

from dga_jax.serving.http_guards import Guard, read_api_key
from dga_jax.serving.metrics import Metrics


def test_the_flag_comes_before_the_environment():
  assert read_api_key("a", {"DGA_API_KEY": "b"}) == "a"
  assert read_api_key(None, {"DGA_API_KEY": "b"}) == "b"
  assert read_api_key(None, {}) is None


@pytest.mark.parametrize("key", ["", "a\n", " a", "ä"])
def test_a_key_that_no_client_can_send_is_refused(key: str):
  with pytest.raises(ValueError, match=r"^--api_key "):
    read_api_key(key, {"DGA_API_KEY": "b"})
  with pytest.raises(ValueError, match=r"^\$DGA_API_KEY "):
    read_api_key(None, {"DGA_API_KEY": key})


def test_a_fault_of_the_server_is_counted():
  async def broken(_):
    raise ZeroDivisionError

  metrics = Metrics({})
  app = Starlette(
    routes=[Route("/health", broken)],
    middleware=[Middleware(Guard, api_key=None, metrics=metrics)],
  )
  assert TestClient(app, raise_server_exceptions=False).get("/health").status_code == 500
  assert b'dga_requests_total{path="/health",status="500"} 1.0' in metrics.text()

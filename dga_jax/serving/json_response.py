"""JSON out: ASCII with escapes, so that no text can be invalid UTF-8."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


def json_response(
  value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
  """A response with a JSON value."""
  return Response(to_json(value), status, dict(headers or {}), "application/json")


def to_json(value: Any) -> bytes:
  """JSON on one line."""
  return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")

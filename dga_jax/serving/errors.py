"""Errors of the interface, in OpenAI's JSON shape."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from dga_jax.serving.json_response import json_response


class APIError(Exception):
  """An error that the client sees.

  Args:
    status: of HTTP.
    message: the fault and its remedy.
    param: the field of the request that is wrong.
    code: identifies the kind of error for programs.
    headers: further headers of the response.
  """

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ) -> None:
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.headers = dict(headers or {})

  def body(self) -> dict[str, Any]:
    """The JSON object."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
    return {
      "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
    }

  def response(self) -> Response:
    """The HTTP response."""
    return json_response(self.body(), self.status, self.headers)


def invalid(param: str | None, message: str, code: str | None = "invalid_value") -> APIError:
  """The error 400 of a wrong field."""
  return APIError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> APIError:
  """The error 400 of a field, or a value of it, that this server does not support."""
  return APIError(400, message, param=param, code="unsupported_parameter")

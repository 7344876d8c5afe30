"""The application: routes, errors, and the life of the engines."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dga_jax.serving.endpoints import answer, Prompt
from dga_jax.serving.errors import APIError
from dga_jax.serving.formats import ChatFormat, CompletionFormat, Echo
from dga_jax.serving.http_guards import Guard, read_json
from dga_jax.serving.json_response import json_response
from dga_jax.serving.metrics import Metrics
from dga_jax.serving.parameters import parse_chat, parse_completion
from dga_jax.serving.served_model import ServedModel

_PAGE_POLICY = (
  "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self';"
  " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


@dataclasses.dataclass(frozen=True)
class AppSettings:
  """Settings of the application.

  Attributes:
    api_key: that clients must give; None for none.
    max_body_bytes: bound on the body of a request.
  """

  api_key: str | None = None
  max_body_bytes: int = 16 << 20


def make_app(models: Sequence[ServedModel], settings: AppSettings) -> Starlette:
  """The application that serves some models; it starts their engines and closes them.

  Args:
    models: with different names; the first is the page's.
    settings: see `AppSettings`.
  """
  metrics = Metrics({model.name: model.engine for model in models})
  handlers = _Handlers(models, settings, metrics)

  @contextlib.asynccontextmanager
  async def lifespan(_: Starlette) -> AsyncIterator[None]:
    for model in models:
      model.engine.start()
    yield
    for model in models:
      await asyncio.to_thread(model.engine.close)

  return Starlette(
    routes=[
      Route("/", handlers.page),
      Route("/health", handlers.health),
      Route("/metrics", handlers.metrics),
      Route("/v1/models", handlers.models),
      Route("/v1/models/{name:path}", handlers.model),
      Route("/v1/completions", handlers.completions, methods=["POST"]),
      Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
    ],
    middleware=[Middleware(Guard, api_key=settings.api_key, metrics=metrics)],
    exception_handlers={APIError: _api_error, HTTPException: _http_error, Exception: _bug},
    lifespan=lifespan,
  )


class _Handlers:
  def __init__(
    self, models: Sequence[ServedModel], settings: AppSettings, metrics: Metrics
  ) -> None:
    self._models = {model.name: model for model in models}
    self._settings, self._metrics = settings, metrics
    self._page = resources.files("dga_jax.serving").joinpath("index.html").read_bytes()

  async def page(self, _: Request) -> Response:
    headers = {"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
    return Response(self._page, media_type="text/html", headers=headers)

  async def health(self, _: Request) -> Response:
    if any(model.engine.error is not None for model in self._models.values()):
      return json_response({"status": "failed"}, 503)
    return json_response({"status": "ok"})

  async def metrics(self, _: Request) -> Response:
    return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

  async def models(self, _: Request) -> Response:
    entries = [_model_entry(model) for model in self._models.values()]
    return json_response({"object": "list", "data": entries})

  async def model(self, http: Request) -> Response:
    return json_response(_model_entry(self._find(http.path_params["name"])))

  async def completions(self, http: Request) -> Response:
    parameters = parse_completion(await read_json(http, self._settings.max_body_bytes))
    served, prompts, echoes = self._find(parameters.model), [], []
    wants_logprobs = parameters.sampling.top_logprobs is not None
    for given in parameters.prompts:
      if isinstance(given, str):
        tokens = await asyncio.to_thread(served.encode_text, given)
        echo = Echo(given, tokens[len(served.tokenizer.start_ids) :])
      else:
        served.check_ids(given)
        tokens = list(given)
        echo = Echo(served.tokenizer.decode(given) if parameters.echo else "", tokens)
      prompts.append(Prompt(tokens, logprobs=parameters.echo and wants_logprobs))
      echoes += [echo if parameters.echo else Echo("", ())] * parameters.choices
    style = CompletionFormat(served.tokenizer, echoes, wants_logprobs)
    return await answer(http, served, parameters, prompts, style, self._metrics)

  async def chat(self, http: Request) -> Response:
    parameters = parse_chat(await read_json(http, self._settings.max_body_bytes))
    served = self._find(parameters.model)
    prompt = Prompt(*await asyncio.to_thread(served.encode_messages, parameters.messages))
    wants_logprobs = parameters.sampling.top_logprobs is not None
    style = ChatFormat(served.tokenizer, parameters.choices, wants_logprobs)
    return await answer(http, served, parameters, [prompt], style, self._metrics)

  def _find(self, name: str) -> ServedModel:
    if name not in self._models:
      raise APIError(
        404,
        f"There is no model {name!r}; this server has {sorted(self._models)}.",
        param="model",
        code="model_not_found",
      )
    return self._models[name]


def _model_entry(model: ServedModel) -> dict[str, object]:
  return {
    "id": model.name,
    "object": "model",
    "created": model.created,
    "owned_by": "dga-jax",
    "max_model_len": model.engine.max_length,
  }


async def _api_error(_: Request, error: Exception) -> Response:
  assert isinstance(error, APIError)
  return error.response()


async def _http_error(_: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  return APIError(error.status_code, error.detail, headers=error.headers).response()


async def _bug(_: Request, error: Exception) -> Response:
  del error  # Starlette logs it.
  return APIError(500, "The server has a fault; its log has the details.").response()

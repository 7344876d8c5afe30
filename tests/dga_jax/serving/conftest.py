"""One server process for the tests of this folder."""

import functools
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from dga_jax.generation import Engine
from tests.dga_jax.serving.load import continue_alone, make_engine
from tests.dga_jax.serving.tiny_server import serve, Server, write_chat_checkpoint


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return write_chat_checkpoint(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture(scope="session")
def server(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
  log = tmp_path_factory.mktemp("server") / "log"
  flags = ("--slots=3", "--max_waiting=5", "--prompt_chunk=64", "--max_body_mb=0.1")
  with serve(workdir, log, *flags) as running:
    yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
  with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
    yield client


@pytest.fixture(scope="session")
def engine_alone() -> Engine:
  return make_engine()


@pytest.fixture(scope="session")
def continue_text(engine_alone: Engine):
  """(prompt, number of tokens, sampling) -> the continuation, without a server."""
  return functools.partial(continue_alone, engine_alone)

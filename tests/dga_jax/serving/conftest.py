"""One server process for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from dga_jax.generation import ContinuousBatching, Request, Sampling
from tests.dga_jax.evaluation.tiny import CONFIG, TOKENIZER
from tests.dga_jax.model.random_decoder import random_decoder
from tests.dga_jax.serving.tiny_server import MAX_LENGTH, serve, Server, write_chat_checkpoint

_GREEDY = Sampling(temperature=0.0)


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
def continue_text():
  """(prompt, number of tokens) -> the text of the most likely continuation, without a server."""
  model, batches = random_decoder(CONFIG), {}

  def run(prompt: str, new: int, sampling: Sampling = _GREEDY) -> str:
    tokens = [*TOKENIZER.start_ids, *TOKENIZER.encode(prompt)]
    key = (prompt, new, sampling)
    if key not in batches:
      batch = ContinuousBatching(
        model,
        [Request(tokens, new, sampling)],
        slots=1,
        stop_ids=TOKENIZER.stop_ids,
        prompt_chunk=64,
        max_length=MAX_LENGTH,
      )
      batches[key] = batch.run().tokens[0]
    return TOKENIZER.decode(batches[key])

  return run

"""HTTP clients of the serving benchmark, which run in a process separate from the server's."""

import asyncio
import json
import random
import time
from typing import NamedTuple

import httpx


class Load(NamedTuple):
  """A load on the server: concurrent clients, each of which sends its requests one after another.

  Attributes:
    url: base URL of the server.
    model: name of the served model.
    vocab_size: upper bound of the random token ids of prompts.
    banned: token ids that are never sampled, so that no answer ends early.
    clients: number of concurrent clients.
    requests: number of requests of each client.
    prompt_tokens: length of each prompt.
    new_tokens: number of tokens of each answer.
    seed: seed of the prompts.
  """

  url: str
  model: str
  vocab_size: int
  banned: tuple[int, ...]
  clients: int
  requests: int
  prompt_tokens: int
  new_tokens: int
  seed: int


class Arrival(NamedTuple):
  """Tokens that arrived together.

  Attributes:
    seconds: since the request was sent.
    tokens: number of tokens.
  """

  seconds: float
  tokens: int


class Answer(NamedTuple):
  """The measured times of one answer.

  Attributes:
    sent: time of the request, in seconds of `time.perf_counter`.
    arrivals: at least one; the first one has the first token.
    cached: number of prompt tokens whose cache the server had kept.
  """

  sent: float
  arrivals: list[Arrival]
  cached: int

  @property
  def first(self) -> float:
    """Seconds to the first token."""
    return self.arrivals[0].seconds

  @property
  def tokens(self) -> int:
    """Number of tokens of the answer."""
    return sum(arrival.tokens for arrival in self.arrivals)

  @property
  def between(self) -> list[float]:
    """Seconds before each token but those of the first arrival.

    The tokens of an arrival share the time since the arrival before it.
    """
    pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
    return [
      (later.seconds - earlier.seconds) / later.tokens
      for earlier, later in pairs
      for _ in range(later.tokens)
    ]


def run_load(load: Load) -> tuple[float, list[Answer]]:
  """Sends the load; returns its total seconds and all answers."""
  return asyncio.run(_run(load))


def ask(load: Load, prompt: list[int]) -> Answer:
  """Sends one prompt."""

  async def run() -> Answer:
    async with _client(load) as http:
      return await _ask(http, load, prompt)

  return asyncio.run(run())


async def _run(load: Load) -> tuple[float, list[Answer]]:
  async with _client(load) as http:
    begin = time.perf_counter()
    rows = await asyncio.gather(*(_one_client(http, load, i) for i in range(load.clients)))
    return time.perf_counter() - begin, [answer for row in rows for answer in row]


async def _one_client(http: httpx.AsyncClient, load: Load, number: int) -> list[Answer]:
  rng = random.Random(f"{load.seed} {number}")
  prompts = (random_tokens(load.vocab_size, load.prompt_tokens, rng) for _ in range(load.requests))
  return [await _ask(http, load, prompt) for prompt in prompts]


def _client(load: Load) -> httpx.AsyncClient:
  limits = httpx.Limits(max_connections=load.clients)
  return httpx.AsyncClient(base_url=load.url, timeout=3600, limits=limits)


def random_tokens(vocab_size: int, length: int, rng: random.Random) -> list[int]:
  """Token ids drawn uniformly."""
  return [rng.randrange(vocab_size) for _ in range(length)]


async def _ask(http: httpx.AsyncClient, load: Load, prompt: list[int]) -> Answer:
  body = {
    "model": load.model,
    "prompt": prompt,
    "max_tokens": load.new_tokens,
    "temperature": 0,
    "logit_bias": {str(token): -100 for token in load.banned},
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
  }
  sent, tokens, cached = time.perf_counter(), 0, 0
  arrivals: list[Arrival] = []
  async with http.stream("POST", "/v1/completions", json=body) as answer:
    answer.raise_for_status()
    async for line in answer.aiter_lines():
      if not line.startswith("data: {"):
        continue
      event, now = json.loads(line[6:]), time.perf_counter()
      if "error" in event:
        raise RuntimeError(f"The server has failed: {event['error']['message']}")
      new = event["usage"]["completion_tokens"] - tokens
      if new:
        arrivals.append(Arrival(now - sent, new))
        tokens += new
        cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
  if tokens != load.new_tokens:
    raise RuntimeError(f"The answer has {tokens} tokens instead of {load.new_tokens}.")
  return Answer(sent, arrivals, cached)

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
    clients: number of concurrent clients.
    requests: number of requests of each client.
    prompt_tokens: length of each prompt.
    new_tokens: maximum number of tokens of each answer.
    seed: seed of the prompts.
  """

  url: str
  model: str
  vocab_size: int
  clients: int
  requests: int
  prompt_tokens: int
  new_tokens: int
  seed: int


class Answer(NamedTuple):
  """The measured times of one answer.

  Attributes:
    first: seconds to the first token.
    events: for each event after the first one, the seconds since the previous event and the number
      of tokens.
    tokens: number of new tokens.
    cached: number of prompt tokens that the server had cached.
  """

  first: float
  events: list[tuple[float, int]]
  tokens: int
  cached: int


def run_load(load: Load) -> tuple[float, list[Answer]]:
  """Sends the load; returns its total seconds and all answers."""
  return asyncio.run(_run(load))


def ask_twice(load: Load, *, same: bool) -> tuple[Answer, Answer]:
  """Sends two prompts one after the other. With `same` the second starts with the first."""
  return asyncio.run(_ask_twice(load, same))


async def _run(load: Load) -> tuple[float, list[Answer]]:
  async with _client(load) as http:
    begin = time.perf_counter()
    rows = await asyncio.gather(*(_one_client(http, load, i) for i in range(load.clients)))
    return time.perf_counter() - begin, [answer for row in rows for answer in row]


async def _one_client(http: httpx.AsyncClient, load: Load, number: int) -> list[Answer]:
  rng = random.Random(f"{load.seed} {number}")
  return [
    await _ask(http, load, _prompt(rng, load, load.prompt_tokens)) for _ in range(load.requests)
  ]


async def _ask_twice(load: Load, same: bool) -> tuple[Answer, Answer]:
  rng = random.Random(load.seed)
  async with _client(load) as http:
    first = _prompt(rng, load, load.prompt_tokens)
    before = await _ask(http, load, first)
    begin = first if same else _prompt(rng, load, load.prompt_tokens)
    return before, await _ask(http, load, [*begin, *_prompt(rng, load, 32)])


def _client(load: Load) -> httpx.AsyncClient:
  limits = httpx.Limits(max_connections=load.clients)
  return httpx.AsyncClient(base_url=load.url, timeout=3600, limits=limits)


def _prompt(rng: random.Random, load: Load, length: int) -> list[int]:
  return [rng.randrange(load.vocab_size) for _ in range(length)]


async def _ask(http: httpx.AsyncClient, load: Load, prompt: list[int]) -> Answer:
  body = {
    "model": load.model,
    "prompt": prompt,
    "max_tokens": load.new_tokens,
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
  }
  begin = last = time.perf_counter()
  first, tokens, events, cached = 0.0, 0, [], 0
  async with http.stream("POST", "/v1/completions", json=body) as answer:
    answer.raise_for_status()
    async for line in answer.aiter_lines():
      if not line.startswith("data: {"):
        continue
      usage, now = json.loads(line[6:])["usage"], time.perf_counter()
      new = usage["completion_tokens"] - tokens
      if new and not tokens:
        first, cached = now - begin, usage["prompt_tokens_details"]["cached_tokens"]
      elif new:
        events.append((now - last, new))
      if new:
        tokens, last = usage["completion_tokens"], now
  return Answer(first, events, tokens, cached)

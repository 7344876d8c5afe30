"""Clients that send random requests, read slowly, disconnect, and compare every answer."""

import asyncio
import contextlib
import dataclasses
import json
import random
import time
from collections import Counter
from collections.abc import Sequence

import httpx

from dga_jax.generation import Engine, Request, Sampling
from tests.dga_jax.evaluation.tiny import CONFIG, STORY, TOKENIZER
from tests.dga_jax.model.random_decoder import random_decoder
from tests.dga_jax.serving.tiny_server import MAX_LENGTH, NAME

GREEDY = Sampling(temperature=0.0)
PROMPT_CHUNK = 64
# Half of the prompts begin with this text, as with a system prompt.
_SHARED = STORY[:150]


@dataclasses.dataclass(frozen=True)
class Job:
  """A greedy request, and its answer in an engine without other requests."""

  prompt: str
  max_tokens: int
  answer: str


@dataclasses.dataclass
class Tally:
  """The clients' requests, and wrong answers."""

  counts: Counter[str] = dataclasses.field(default_factory=Counter)
  wrong: list[str] = dataclasses.field(default_factory=list)


def make_engine() -> Engine:
  """An engine with the tiny model, for one request at a time."""
  return Engine(random_decoder(CONFIG), slots=1, max_length=MAX_LENGTH, prompt_chunk=PROMPT_CHUNK)


def make_jobs(engine: Engine, count: int, seed: int) -> list[Job]:
  """Random jobs. Half of the conversations have a second turn, half of these with the answer."""
  rng = random.Random(seed)
  jobs: list[Job] = []
  while len(jobs) < count:
    begin = rng.randrange(len(STORY))
    prompt = rng.choice(["", _SHARED]) + (STORY * 3)[begin : begin + rng.randint(1, 150)]
    jobs.append(_job(engine, prompt, rng.randint(1, 60)))
    if rng.random() < 0.5:
      answer = jobs[-1].answer if rng.random() < 0.5 else ""
      turn = f"{prompt}{answer[:20]} {rng.randint(0, 99)}"
      jobs.append(_job(engine, turn, rng.randint(1, 40)))
  return jobs[:count]


def _job(engine: Engine, prompt: str, max_tokens: int) -> Job:
  return Job(prompt, max_tokens, continue_alone(engine, prompt, max_tokens))


def continue_alone(
  engine: Engine, prompt: str, max_tokens: int, sampling: Sampling = GREEDY
) -> str:
  """The continuation of a prompt in an engine without other requests or kept caches."""
  engine.reset()
  tokens = [*TOKENIZER.start_ids, *TOKENIZER.encode(prompt)]
  engine.submit(Request(tokens, max_tokens, sampling, stop_ids=TOKENIZER.stop_ids))
  answer: list[int] = []
  while engine.busy:
    answer += [token for emitted in engine.step() for token in emitted.tokens]
  return TOKENIZER.decode(answer)


async def run_clients(
  url: str, jobs: Sequence[Job], *, clients: int, seconds: float, seed: int
) -> Tally:
  """Runs concurrent clients for some seconds."""
  tally, end = Tally(), time.monotonic() + seconds
  limits = httpx.Limits(max_connections=2 * clients)
  async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
    await asyncio.gather(
      *(_client(http, jobs, tally, end, random.Random(seed + i)) for i in range(clients))
    )
  return tally


async def _client(
  http: httpx.AsyncClient, jobs: Sequence[Job], tally: Tally, end: float, rng: random.Random
) -> None:
  while time.monotonic() < end:
    job = rng.choice(jobs)
    way = rng.choice(["whole", "stream", "slow", "leaves", "leaves whole"])
    body = {"model": NAME, "prompt": job.prompt, "max_tokens": job.max_tokens, "temperature": 0}
    if way == "whole":
      text = await _whole(http, body)
    elif way == "leaves whole":
      text = None
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(rng.random() * 0.3):
          await _whole(http, body)
    else:
      stop_after = rng.randint(0, 5) if way == "leaves" else None
      text = await _stream(http, body, stop_after, pause=0.05 if way == "slow" else 0)
    if text == "busy":
      tally.counts["429"] += 1
      await asyncio.sleep(rng.random() * 0.2)
      continue
    tally.counts[way] += 1
    if text is not None and text != job.answer:
      tally.wrong.append(f"{way}: {job} got {text!r}")


async def _whole(http: httpx.AsyncClient, body: dict[str, object]) -> str:
  answer = await http.post("/v1/completions", json=body)
  if answer.status_code == 429:
    return "busy"
  answer.raise_for_status()
  return str(answer.json()["choices"][0]["text"])


async def _stream(
  http: httpx.AsyncClient, body: dict[str, object], stop_after: int | None, pause: float
) -> str | None:
  """The text; None if the client has disconnected."""
  text, events = "", 0
  async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
    if answer.status_code == 429:
      return "busy"
    answer.raise_for_status()
    async for line in answer.aiter_lines():
      if line.startswith("data: {"):
        text += json.loads(line[6:])["choices"][0]["text"]
        events += 1
      await asyncio.sleep(pause)
      if stop_after is not None and events >= stop_after:
        return None
  return text

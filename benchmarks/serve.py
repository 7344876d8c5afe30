"""The HTTP server under load: tokens/s, time to first token, time between tokens, cached sessions.

    ./workspace bench serve
    ./workspace bench serve --model=llama2-7b --cache_gb=60
    ./workspace bench serve --clients=1,8 --prompts=1024 --kinds=dga,dense --slots=8

One server serves the model with each attention kind, and with --budgets if given. The clients run
in a separate process. Prompts are random tokens, so that the server has kept no cache of them; the
table of second turns is the exception. The kinds alternate. The model is SmolLM2-135M-Instruct
(Q4_1, downloaded), a checkpoint (--workdir), or LLaMA2-7B's shape with random weights in bfloat16.
--cache_gb gives every kind the same memory: each gets as many slots as fit, up to --slots.

The time between tokens is the time between two events, divided by the number of tokens of the
second event. The overhead compares the server with its engine alone, without HTTP: as many requests
as slots, with prompts of one short chunk, and the time between tokens while all of them run.

--output appends each result to a file as one line of JSON, with the device and the versions.
"""

import concurrent.futures
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from absl import app, flags, logging
from flax import nnx
from tqdm import tqdm

from benchmarks._resident_sessions import known_models, resident_sessions
from benchmarks._serve_clients import Answer, ask, Load, random_tokens, run_load
from benchmarks._serve_models import (
  first_layers,
  load_model,
  run_in_engine,
  run_server,
  serve_model,
)
from benchmarks.timing import environment
from dga_jax.choices import AttentionName
from dga_jax.files.path_flags import define_path
from dga_jax.generation.prompt_reader import piece_lengths
from dga_jax.generation.weights import compute_weights
from dga_jax.head_budgets import HeadBudgets, read_head_budgets
from dga_jax.model import Decoder
from dga_jax.serving.served_model import ServedModel
from dga_jax.tokenizer import Tokenizer

_TABLES = ["overhead", "second_turn", "load", "sessions"]
_MESSAGE_TOKENS = 32  # Of the second turn's message, and of the overhead's prompts.

_MODEL = flags.DEFINE_enum("model", "smollm2", ["smollm2", "llama2-7b"], "model to serve")
_WORKDIR = define_path("workdir", None, "checkpoint to serve in place of SmolLM2")
_LAYERS = flags.DEFINE_integer(
  "layers", None, "first layers of the model alone, for a quick run", lower_bound=1
)
_KINDS = flags.DEFINE_list("kinds", ["dga", "dense"], "attention kinds that the server serves")
_BUDGETS = define_path("budgets", None, "HeadBudgets of the model, served beside the kinds")
_TABLES_FLAG = flags.DEFINE_multi_enum("table", _TABLES, _TABLES, "tables to measure; repeatable")
_CLIENTS = flags.DEFINE_list("clients", ["1", "8", "32", "64"], "numbers of concurrent clients")
_PROMPTS = flags.DEFINE_list("prompts", ["4096", "16384"], "prompt lengths in tokens")
_NEW = flags.DEFINE_integer("new_tokens", 64, "tokens of an answer", lower_bound=2)
_REQUESTS = flags.DEFINE_integer("requests", 2, "requests of each client", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 16, "largest number of slots of a kind", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length", None, "tokens of a slot; default: as many as the prompts and answers need"
)
_CACHE_GB = flags.DEFINE_float("cache_gb", None, "GB of caches of each kind; default: all slots")
_MEMORY_GB = flags.DEFINE_float("memory_gb", 64.0, "GB of caches in the table of sessions")
_SESSION_LENGTH = flags.DEFINE_integer("session_length", 16384, "tokens of its sessions")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds of second turns and of the overhead")
_PROMPT_CHUNK = flags.DEFINE_integer("prompt_chunk", 256, "tokens of a prefill chunk")
_DECODE_CHUNK = flags.DEFINE_integer("decode_chunk", 4, "decode steps in one program")
_OUTPUT = define_path("output", None, "file to which results are appended as JSON lines")


def main(argv: list[str]) -> None:
  """Prints tables of load, second turns, HTTP overhead and cache sizes."""
  del argv
  logging.set_verbosity(logging.WARNING)  # The checkpoint library logs every read.
  print(f"{environment()}, {_versions()}", flush=True)
  tables, lengths = set(_TABLES_FLAG.value), list(map(int, _PROMPTS.value))
  if "sessions" in tables:
    _print_sessions()
  if tables <= {"sessions"}:
    return
  models = _models(_MAX_LENGTH.value or _longest(lengths))
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool, run_server(models) as url:
    for model in models:  # The first request of a process is slower.
      pool.submit(run_load, _load(model, url, min(lengths))).result()
    if "overhead" in tables:
      _print_overhead(pool, models, url)
    if "second_turn" in tables:
      _print_second_turn(pool, models, url, lengths)
    if "load" in tables:
      _print_load(pool, models, url, lengths)


def _longest(lengths: list[int]) -> int:
  """Tokens of the longest sequence: a second turn, or a request of the overhead."""
  turns = max(lengths) + 2 * _NEW.value
  overhead = _SLOTS.value * _DECODE_CHUNK.value + _NEW.value
  return max(turns, overhead) + 2 * _MESSAGE_TOKENS


def _versions() -> str:
  names = ("jaxlib", "flax", "starlette", "uvicorn", "httpx")
  return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def _models(max_length: int) -> list[ServedModel]:
  kinds: list[tuple[str, AttentionName | None, HeadBudgets | None]] = []
  for kind in _KINDS.value:
    if kind not in get_args(AttentionName):
      raise app.UsageError(f"--kinds has {kind!r}; it takes {', '.join(get_args(AttentionName))}.")
    kinds.append((kind, cast(AttentionName, kind), None))
  if _BUDGETS.value is not None:
    kinds.append(("budgets", None, read_head_budgets(_BUDGETS.value)))
  loaded = [
    load_model(_MODEL.value, _WORKDIR.value, attention, budgets) for _, attention, budgets in kinds
  ]
  if _LAYERS.value is not None:
    loaded = [(first_layers(model, _LAYERS.value), tokenizer) for model, tokenizer in loaded]
  shared = compute_weights(loaded[0][0]) if _KINDS.value else None

  def serve(kind: tuple[Any, ...], model: tuple[Decoder, Tokenizer]) -> ServedModel:
    name, _, budgets = kind
    # Budgets change the order of heads.
    return _serve(name, *model, weights=None if budgets else shared, max_length=max_length)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(serve, kinds, loaded))


def _serve(
  name: str, model: Decoder, tokenizer: Tokenizer, *, weights: nnx.State | None, max_length: int
) -> ServedModel:
  """A model with its engine, and a line with the time of its compilation."""
  begin = time.perf_counter()
  served = serve_model(
    name,
    model,
    tokenizer,
    slots=_SLOTS.value,
    weights=weights,
    max_length=max_length,
    kept=2 if "second_turn" in _TABLES_FLAG.value else 0,  # Of a prompt, and of its answer.
    cache_bytes=None if _CACHE_GB.value is None else int(_CACHE_GB.value * 1e9),
    prompt_chunk=_PROMPT_CHUNK.value,
    decode_chunk=_DECODE_CHUNK.value,
  )
  seconds, engine = time.perf_counter() - begin, served.engine
  tqdm.write(
    f"{name}: {engine.slots} slots of {max_length} tokens,"
    f" {engine.status().slot_bytes / 1e6:.1f} MB of caches, compiled in {seconds:.0f} s"
  )
  return served


def _print_load(
  pool: concurrent.futures.Executor, models: list[ServedModel], url: str, lengths: list[int]
) -> None:
  _print_head(
    "prompt | clients | kind | new tokens/s | first token, s: p50, p99 | between tokens, ms: p50,"
    " p99"
  )
  loads = sorted(  # The shortest first.
    itertools.product(lengths, map(int, _CLIENTS.value)), key=math.prod
  )
  jobs = [(length, clients, model) for length, clients in loads for model in models]
  for length, clients, model in _progress(jobs, "loads"):
    load = _load(model, url, length, clients=clients, requests=_REQUESTS.value)
    seconds, answers = pool.submit(run_load, load).result()
    first = np.percentile([answer.first for answer in answers], [50, 99]).tolist()
    between = [1e3 * time for answer in answers for time in answer.between]
    p50, p99 = np.percentile(between, [50, 99]).tolist()
    rate = sum(answer.tokens for answer in answers) / seconds
    _print_row(
      f"{length} | {clients} | {model.name} | {rate:.1f} | {first[0]:.2f}, {first[1]:.2f} |"
      f" {p50:.1f}, {p99:.1f}"
    )
    _record(
      "load", model, prompt=length, clients=clients, requests=_REQUESTS.value, tokens_per_s=rate,
      first_s_p50=first[0], first_s_p99=first[1], between_ms_p50=p50, between_ms_p99=p99,
    )  # fmt: skip


def _print_second_turn(
  pool: concurrent.futures.Executor, models: list[ServedModel], url: str, lengths: list[int]
) -> None:
  """A first turn in the engine, then a second turn over HTTP that continues it, or does not."""
  _print_head(
    "prompt | kind | second turn, s to first token: nothing kept, prompt kept, answer kept | times"
  )
  jobs = [(length, model) for length in lengths for model in models]
  for length, model in _progress(jobs, "second turns"):
    rounds = [_second_turn(pool, model, url, length) for _ in range(_ROUNDS.value)]
    none, prompt, answer = (statistics.median(column) for column in zip(*rounds, strict=True))
    _print_row(
      f"{length} + {_NEW.value} | {model.name} | {none:.3f}, {prompt:.3f}, {answer:.3f} |"
      f" {none / prompt:.1f}, {none / answer:.1f}"
    )
    _record(
      "second_turn", model, prompt=length, nothing_kept_s=none, prompt_kept_s=prompt,
      answer_kept_s=answer, rounds=_ROUNDS.value,
    )  # fmt: skip


def _second_turn(
  pool: concurrent.futures.Executor, model: ServedModel, url: str, length: int
) -> tuple[float, float, float]:
  """Seconds to the second turn's first token with nothing, the prompt, and the answer kept."""
  rng, size = random.Random(), model.engine.config.vocab_size
  load, seconds = _load(model, url, length), []
  # The last token of an answer is not in its cache.
  for cached in (0, length, length + _NEW.value - 1):
    first = random_tokens(size, length, rng)
    ((_, answer),) = run_in_engine(model, [first], _NEW.value)
    if cached == 0:
      first = random_tokens(size, length, rng)
    if cached == length:
      answer = [(answer[0] + 1) % size, *answer[1:]]
    message = random_tokens(size, _MESSAGE_TOKENS, rng)
    result = pool.submit(ask, load, [*first, *answer, *message]).result()
    if result.cached != cached:
      raise RuntimeError(f"{result.cached} tokens of a second turn were kept instead of {cached}.")
    seconds.append(result.first)
  return seconds[0], seconds[1], seconds[2]


def _print_overhead(pool: concurrent.futures.Executor, models: list[ServedModel], url: str) -> None:
  """Compares the server with its engine alone, with as many requests as slots."""
  _print_head("kind | slots | between tokens, ms: server, engine alone | overhead")
  for model in _progress(models, "overhead"):
    slots, size, rng = model.engine.slots, model.engine.config.vocab_size, random.Random()
    # Each prompt is one piece, and the prompts enter the slots one by one between decode chunks.
    length = min(_MESSAGE_TOKENS, piece_lengths(_PROMPT_CHUNK.value)[-1])
    new_tokens = slots * _DECODE_CHUNK.value + _NEW.value
    served, alone = [], []
    for _ in range(_ROUNDS.value):  # Server and engine alternate.
      load = _load(model, url, length, clients=slots, new_tokens=new_tokens)
      _, answers = pool.submit(run_load, load).result()
      served.append(_between_while_all_run(answers))
      prompts = [random_tokens(size, length, rng) for _ in range(slots)]
      results = run_in_engine(model, prompts, new_tokens)
      alone.append(_between_while_all_run([answer for answer, _ in results]))
    server, engine = (1e3 * statistics.median(row) for row in (served, alone))
    overhead = 100 * (server / engine - 1)
    _print_row(f"{model.name} | {slots} | {server:.2f}, {engine:.2f} | {overhead:+.1f} %")
    _record("overhead", model, server_ms=server, engine_ms=engine, percent=overhead)


def _between_while_all_run(answers: list[Answer]) -> float:
  """Mean seconds between tokens, from the last first token to the first last token of all answers.

  Raises:
    RuntimeError: the answers did not run at the same time.
  """
  begin = max(answer.sent + answer.first for answer in answers)
  end = min(answer.sent + answer.arrivals[-1].seconds for answer in answers)
  means = []
  for answer in answers:
    times = [(answer.sent + seconds, tokens) for seconds, tokens in answer.arrivals]
    inside = [(at, tokens) for at, tokens in times if begin <= at <= end]
    tokens = sum(tokens for _, tokens in inside[1:])
    if tokens:
      means.append((inside[-1][0] - inside[0][0]) / tokens)
  if not means:
    raise RuntimeError("No decode step had all requests in it; raise --new_tokens.")
  return statistics.mean(means)


def _print_sessions() -> None:
  """Sessions whose caches fit into the same memory: arithmetic on the shapes of caches."""
  memory, length = int(_MEMORY_GB.value * 1e9), _SESSION_LENGTH.value
  _print_head(
    f"model, bfloat16 | kind | MB of a session of {length} tokens | sessions in"
    f" {_MEMORY_GB.value:g} GB | slots with cache_bytes of {_MEMORY_GB.value:g} GB"
    " | times dense: bytes, sessions"
  )
  for name, kinds in known_models().items():
    for one in resident_sessions(name, kinds, length, memory):
      _print_row(
        f"{one.model} | {one.kind} | {one.session_bytes / 1e6:.1f} | {one.sessions} |"
        f" {one.slots} | {one.times_dense:.2f}, {one.sessions_of_dense:.2f}"
      )
      _record("sessions", None, memory_bytes=memory, **one._asdict())


def _load(
  model: ServedModel,
  url: str,
  length: int,
  *,
  clients: int = 1,
  requests: int = 1,
  new_tokens: int | None = None,
) -> Load:
  return Load(
    url=url,
    model=model.name,
    vocab_size=model.engine.config.vocab_size,
    banned=tuple(model.tokenizer.stop_ids),
    clients=clients,
    requests=requests,
    prompt_tokens=length,
    new_tokens=new_tokens or _NEW.value,
    seed=random.randrange(2**32),
  )


def _progress[Job](jobs: list[Job], label: str) -> "tqdm[Job]":
  """A progress bar on a terminal."""
  return tqdm(jobs, desc=label, leave=False, disable=None)


def _print_head(columns: str) -> None:
  print(f"\n| {columns} |")
  print("|" + " --- |" * (columns.count(" | ") + 1), flush=True)


def _print_row(cells: str) -> None:
  tqdm.write(f"| {cells} |")
  sys.stdout.flush()


def _record(table: str, served: ServedModel | None, /, **values: object) -> None:
  """Appends a result to --output."""
  if _OUTPUT.value is None:
    return
  given: dict[str, object] = {"table": table, "device": environment(), "versions": _versions()}
  if served is not None:
    given |= {"model": _WORKDIR.value or _MODEL.value, "kind": served.name}
    given |= {"layers": served.engine.config.num_layers}
    given |= {"new_tokens": _NEW.value, "slots": served.engine.slots}
  with Path(_OUTPUT.value).open("a", encoding="utf-8") as file:
    file.write(json.dumps(given | values) + "\n")


if __name__ == "__main__":
  app.run(main)

"""The HTTP server under load: tokens/s, time to first token, time between tokens, cached sessions.

    ./workspace bench serve
    ./workspace bench serve --clients=1,8 --prompts=1024 --kinds=dga,dense --slots=8

One server serves the model with each attention kind. The clients run in a separate process and send
random prompts, so that the server has cached no prompt. The table of second turns is an exception.
The kinds alternate. The model is SmolLM2-135M-Instruct (Q4_1, downloaded), or LLaMA2-7B's shape
with random weights in bfloat16 (--model=llama2-7b).

The time between tokens is the time between two events, divided by the number of tokens of the
second event. The overhead compares the server with the engine alone, without HTTP, with all slots
in use and prompts of equal length. It uses the mean of the shorter half of the times between
tokens, which excludes steps that also prefill a prompt.
"""

import concurrent.futures
import multiprocessing
import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import uvicorn
from absl import app, flags
from flax import nnx
from tqdm import tqdm

from benchmarks._serve_clients import Answer, ask_twice, Load, run_load
from benchmarks.timing import environment
from dga_jax import DGAConfig, smollm2_demo
from dga_jax.generation import Emitted, Engine, Request, Sampling
from dga_jax.generation.cache_shapes import CacheShapes, dense_bytes
from dga_jax.loading import load_with_facts
from dga_jax.model import Decoder, ModelConfig
from dga_jax.serving.app import AppSettings, make_app
from dga_jax.serving.served_model import ServedModel
from dga_jax.tokenizer import Tokenizer

_MODEL = flags.DEFINE_enum("model", "smollm2", ["smollm2", "llama2-7b"], "model to serve")
_WORKDIR = flags.DEFINE_string("workdir", None, "checkpoint to serve in place of SmolLM2")
_KINDS = flags.DEFINE_list("kinds", ["dga", "dense"], "attention kinds that the server serves")
_CLIENTS = flags.DEFINE_list("clients", ["1", "8", "32", "64"], "numbers of concurrent clients")
_PROMPTS = flags.DEFINE_list("prompts", ["4096", "16384"], "prompt lengths in tokens")
_NEW = flags.DEFINE_integer("new_tokens", 64, "maximum number of tokens of an answer")
_REQUESTS = flags.DEFINE_integer("requests", 2, "requests of each client")
_SLOTS = flags.DEFINE_integer("slots", 16, "slots of each kind's engine")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds of the comparison with the engine alone")
_PROMPT_CHUNK = flags.DEFINE_integer("prompt_chunk", 256, "tokens of a prefill chunk")
_DECODE_CHUNK = flags.DEFINE_integer("decode_chunk", 4, "decode steps in one program")


def main(argv: list[str]) -> None:
  """Prints tables of load, second turns, HTTP overhead and cache sizes."""
  del argv
  print(environment())
  lengths = [int(length) for length in _PROMPTS.value]
  max_length = max(lengths) + _NEW.value + 64
  models = [_serve_kind(kind, max_length) for kind in _KINDS.value]
  pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
  with pool, _server(models) as url:
    _print_load(pool, models, url, lengths)
    _print_second_turn(pool, models, url, lengths)
    _print_overhead(pool, models, url, min(lengths))
  _print_sessions(models, lengths)


def _serve_kind(kind: str, max_length: int) -> ServedModel:
  if _MODEL.value == "smollm2":
    workdir = _WORKDIR.value or smollm2_demo.prepare(smollm2_demo.cache_folder())
    loaded = load_with_facts(workdir, attention=kind)
    model, tokenizer = loaded.model, loaded.tokenizer
  else:
    model, tokenizer = _llama2_7b(kind), Tokenizer.byte_level()
  engine = Engine(
    model,
    slots=_SLOTS.value,
    max_length=max_length,
    prompt_chunk=_PROMPT_CHUNK.value,
    decode_chunk=_DECODE_CHUNK.value,
    cache_bytes=CacheShapes(model, max_length).row_bytes * (_SLOTS.value + 4),
    host_bytes=8 * 10**9,
    max_waiting=1024,
    logprobs=True,
    progress=lambda jobs: tqdm(jobs, desc=f"compiling {kind}", unit="program"),
  )
  return ServedModel(kind, engine, tokenizer, None, 0)


def _llama2_7b(kind: str) -> Decoder:
  config = ModelConfig(
    vocab_size=32000,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    mlp_dim=11008,
    attention=kind,
    dga=DGAConfig(selection="streaming", group_size=16, focal_per_block=2),
    dtype="bfloat16",
    param_dtype="bfloat16",
  )
  return nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


@contextmanager
def _server(models: list[ServedModel]) -> Iterator[str]:
  """Runs the server in a thread; yields its URL."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  config = uvicorn.Config(
    make_app(models, AppSettings()), port=port, log_level="warning", access_log=False
  )
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    while not server.started:
      time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
  finally:
    server.should_exit = True
    thread.join()


def _load(model: ServedModel, url: str, clients: int, length: int, requests: int = 1) -> Load:
  return Load(
    url=url,
    model=model.name,
    vocab_size=model.engine.config.vocab_size,
    clients=clients,
    requests=requests,
    prompt_tokens=length,
    new_tokens=_NEW.value,
    seed=random.randrange(2**32),
  )


def _print_load(
  pool: concurrent.futures.Executor, models: list[ServedModel], url: str, lengths: list[int]
) -> None:
  print("\n| prompt | clients | kind | new tokens/s | first token, s: p50, p99 |", end="")
  print(" between tokens, ms: p50, p99 |\n| --- | --- | --- | --- | --- | --- |")
  for length in lengths:
    for clients in map(int, _CLIENTS.value):
      for model in models:
        load = _load(model, url, clients, length, _REQUESTS.value)
        seconds, answers = pool.submit(run_load, load).result()
        first = np.percentile([answer.first for answer in answers], [50, 99])
        between = 1e3 * np.percentile(_between(answers), [50, 99])
        rate = sum(answer.tokens for answer in answers) / seconds
        print(
          f"| {length} | {clients} | {model.name} | {rate:.1f} | {first[0]:.2f}, {first[1]:.2f} |"
          f" {between[0]:.1f}, {between[1]:.1f} |",
          flush=True,
        )


def _between(answers: list[Answer]) -> list[float]:
  """Seconds before each token of the answers, without their first tokens."""
  events = [event for answer in answers for event in answer.events]
  return [seconds / count for seconds, count in events for _ in range(count)]


def _print_second_turn(
  pool: concurrent.futures.Executor, models: list[ServedModel], url: str, lengths: list[int]
) -> None:
  print("\n| prompt | kind | second turn, s to first token: cached, not cached | times |")
  print("| --- | --- | --- | --- |")
  for length in lengths:
    for model in models:
      times = []
      for same in (True, False):
        load = _load(model, url, 1, length)
        _, second = pool.submit(ask_twice, load, same=same).result()
        assert (second.cached >= length) is same
        times.append(second.first)
      print(
        f"| {length} | {model.name} | {times[0]:.3f}, {times[1]:.3f} | {times[1] / times[0]:.1f} |",
        flush=True,
      )


def _print_overhead(
  pool: concurrent.futures.Executor, models: list[ServedModel], url: str, length: int
) -> None:
  """Compares the server with the engine alone, with as many requests as slots."""
  print("\n| kind | between tokens, ms: server, engine alone | overhead |\n| --- | --- | --- |")
  for model in models:
    served, alone = [], []
    for _ in range(_ROUNDS.value):  # Server and engine alternate.
      _, answers = pool.submit(run_load, _load(model, url, _SLOTS.value, length)).result()
      served.append(statistics.mean(_after_prompts(_between(answers))))
      alone.append(statistics.mean(_after_prompts(_engine_alone(model, length))))
    times = [1e3 * statistics.median(row) for row in (served, alone)]
    print(
      f"| {model.name} | {times[0]:.2f}, {times[1]:.2f} |"
      f" {100 * (times[0] / times[1] - 1):+.1f} % |"
    )


def _after_prompts(seconds: list[float]) -> list[float]:
  """The shorter half of the times. The other half contains the steps that prefill a prompt."""
  return sorted(seconds)[: len(seconds) // 2]


def _engine_alone(model: ServedModel, length: int) -> list[float]:
  """Seconds before each token but the first, measured in the engine's thread."""
  rng, last, seconds = np.random.default_rng(), {}, []
  left, done = threading.Semaphore(0), _SLOTS.value

  def deliver(emitted: Emitted) -> None:
    now, number = time.perf_counter(), emitted.request
    if number in last and emitted.tokens:
      seconds.extend([(now - last[number]) / len(emitted.tokens)] * len(emitted.tokens))
    last[number] = now
    if emitted.done:
      left.release()

  for _ in range(done):
    prompt = rng.integers(0, model.engine.config.vocab_size, length).tolist()
    stop_ids = model.tokenizer.stop_ids
    request = Request(prompt, _NEW.value, Sampling(temperature=0.0), stop_ids=stop_ids)
    model.engine.submit(request, deliver)
  for _ in range(done):
    left.acquire()
  return seconds


def _print_sessions(models: list[ServedModel], lengths: list[int]) -> None:
  print("\n| tokens | kind | MB per session's cache | sessions in the memory of a dense session |")
  print("| --- | --- | --- | --- |")
  for length in lengths:
    for model in models:
      own, config = model.engine.cache_bytes(length), model.engine.config
      ratio = dense_bytes(config, length) / own
      print(f"| {length} | {model.name} | {own / 1e6:.2f} | {ratio:.1f} |")


if __name__ == "__main__":
  app.run(main)

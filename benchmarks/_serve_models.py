"""The models of the serving benchmark: their engines, the server, and requests without HTTP."""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator

import jax
import uvicorn
from flax import nnx
from tqdm import tqdm

from benchmarks._decoder_inputs import LLAMA2_7B
from benchmarks._serve_clients import Answer, Arrival
from dga_jax import DGAConfig, smollm2_demo
from dga_jax.checkpoint import abstract_decoder
from dga_jax.choices import AttentionName
from dga_jax.generation import Emitted, Engine, Request, Sampling
from dga_jax.generation.cache_shapes import CacheShapes
from dga_jax.head_budgets import HeadBudgets
from dga_jax.loading import load_with_facts
from dga_jax.model import apply_budgets, Decoder, ModelConfig
from dga_jax.serving.app import AppSettings, make_app
from dga_jax.serving.served_model import ServedModel
from dga_jax.tokenizer import Tokenizer

# DGA's settings in the benchmarks of LLaMA2-7B.
_PAPER = DGAConfig(selection="streaming", group_size=16, focal_per_block=2)
_PROMPT_ROWS = 2  # Caches of the two prompts being read.


def llama2_7b(attention: AttentionName) -> ModelConfig:
  """LLaMA2-7B's shapes in bfloat16."""
  return ModelConfig(
    **LLAMA2_7B,
    attention=attention,
    dga=_PAPER,
    dtype="bfloat16",
    param_dtype="bfloat16",
  )


def load_model(
  name: str, workdir: str | None, attention: AttentionName | None, budgets: HeadBudgets | None
) -> tuple[Decoder, Tokenizer]:
  """SmolLM2 or a checkpoint, or LLaMA2-7B with random weights.

  Args:
    name: "smollm2" or "llama2-7b".
    workdir: checkpoint in place of SmolLM2; None for SmolLM2.
    attention: attention kind; None with `budgets`.
    budgets: settings of all KV heads; None with `attention`.
  """
  if name == "smollm2":
    workdir = workdir or str(smollm2_demo.prepare(smollm2_demo.cache_folder()))
    loaded = load_with_facts(workdir, attention=attention, budgets=budgets)
    return loaded.model, loaded.tokenizer
  config = llama2_7b(attention or "dense")
  model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
  if budgets is not None:
    model = apply_budgets(model, budgets)
  return model, Tokenizer.byte_level()


def first_layers(model: Decoder, count: int) -> Decoder:
  """The decoder with its first layers alone, for a quick run."""
  config = dataclasses.replace(model.config, num_layers=count)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  params["layers"] = jax.tree.map(lambda x: x[:count], params["layers"])
  shortened: Decoder = nnx.merge(abstract_decoder(config)[0], params)
  return shortened


def serve_model(
  name: str,
  model: Decoder,
  tokenizer: Tokenizer,
  *,
  weights: nnx.State | None,
  slots: int,
  max_length: int,
  kept: int,
  cache_bytes: int | None,
  prompt_chunk: int,
  decode_chunk: int,
) -> ServedModel:
  """A model with its engine, which has as many slots as `cache_bytes` has room for.

  Args:
    name: of the served model.
    model: the decoder.
    tokenizer: of the model.
    weights: see `Engine`.
    slots: largest number of slots.
    max_length: tokens of a prompt and its answer.
    kept: kept caches for which the device has room.
    cache_bytes: bound on all caches on the device; None for `slots` slots.
    prompt_chunk: tokens of a prefill chunk.
    decode_chunk: decode steps in one program.

  Raises:
    ValueError: `cache_bytes` has no room for one slot.
  """
  row, others = CacheShapes(model, max_length).row_bytes, _PROMPT_ROWS + kept
  if cache_bytes is not None:
    slots = min(slots, cache_bytes // row - others)
  if slots < 1:
    raise ValueError(
      f"cache_gb is too small: one slot and {others} other caches of {name} take"
      f" {(1 + others) * row / 1e9:.1f} GB."
    )
  engine = Engine(
    model,
    slots=slots,
    max_length=max_length,
    prompt_chunk=prompt_chunk,
    decode_chunk=decode_chunk,
    cache_bytes=row * (slots + others),
    host_bytes=0,
    max_waiting=1024,
    logprobs=True,
    weights=weights,
    progress=lambda jobs: tqdm(jobs, desc=f"compiling {name}", unit="program"),
  )
  return ServedModel(name, engine, tokenizer, None, int(time.time()))


@contextlib.contextmanager
def run_server(models: list[ServedModel]) -> Iterator[str]:
  """Runs the server in a thread; yields its URL."""
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(make_app(models, AppSettings()), log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
      while not server.started:
        if not thread.is_alive():
          raise RuntimeError("The server could not start; its log is above.")
        time.sleep(0.01)
      yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
      server.should_exit = True
      thread.join()


def run_in_engine(
  model: ServedModel, prompts: list[list[int]], new_tokens: int
) -> list[tuple[Answer, list[int]]]:
  """Runs prompts at the same time in the engine of a running server, without HTTP.

  Returns:
    For each prompt: the times at which the engine delivered tokens, and the tokens.
  """
  sent, done = time.perf_counter(), threading.Semaphore(0)
  arrivals: list[list[Arrival]] = [[] for _ in prompts]
  tokens: list[list[int]] = [[] for _ in prompts]
  cached = [0] * len(prompts)

  def submit(i: int) -> None:
    def deliver(emitted: Emitted) -> None:
      if emitted.tokens:
        arrivals[i].append(Arrival(time.perf_counter() - sent, len(emitted.tokens)))
        tokens[i].extend(emitted.tokens)
        cached[i] = emitted.cached_tokens
      if emitted.done:
        done.release()

    bias = tuple((token, -100.0) for token in model.tokenizer.stop_ids)
    sampling = Sampling(temperature=0.0, logit_bias=bias)
    model.engine.submit(Request(prompts[i], new_tokens, sampling), deliver)

  for i in range(len(prompts)):
    submit(i)
  for _ in prompts:
    done.acquire()
  if any(len(row) != new_tokens for row in tokens):
    raise RuntimeError(f"The engine of {model.name} has failed: {model.engine.error}")
  answers = [Answer(sent, *row) for row in zip(arrivals, cached, strict=True)]
  return list(zip(answers, tokens, strict=True))

"""Jobs: each measures one result, and a result that the file has is not measured again."""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from dga_jax.config import DGAConfig
from dga_jax.evaluation import longbench, lost_in_the_middle
from dga_jax.evaluation.ablation import AblatedDGA, swaps
from dga_jax.evaluation.answers import answer
from dga_jax.evaluation.layerwise import losses_by_kinds
from dga_jax.evaluation.losses import batches, fill
from dga_jax.evaluation.perplexity import measure_perplexity, parts, PerplexitySettings
from dga_jax.evaluation.results import environment, Results
from dga_jax.evaluation.retrieval import exact_match, Haystack, NEW_TOKENS
from dga_jax.evaluation.ruler import RulerPart
from dga_jax.evaluation.variants import Family, Variant
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.model.attention_kinds.dense import DenseAttention
from dga_jax.tokenizer import Tokenizer

type Tick = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Job:
  """The measurement of one result.

  Attributes:
    fields: the columns that identify the result in tables: task, variant, length and others.
    depends_on: everything else that the result depends on, as JSON values; part of the key.
    ticks: how often `run` calls its argument, for a progress bar.
    run: measures the result and returns its fields.
    origin: what is measured, if it is not the checkpoint of `run_jobs`.
  """

  fields: dict[str, Any]
  depends_on: Any
  ticks: int
  run: Callable[[Tick], dict[str, Any]]
  origin: str | None = None

  @property
  def key(self) -> str:
    """The key of the result in the file of results."""
    digest = hashlib.sha256(json.dumps([self.fields, self.depends_on]).encode()).hexdigest()
    return f"{self.label} {digest[:10]}"

  @property
  def label(self) -> str:
    """The columns that identify the result, in words, for messages."""
    return " ".join(map(str, self.fields.values()))


def run_jobs(
  jobs: Sequence[Job],
  results: Results,
  *,
  origin: str,
  minutes: float | None = None,
  workers: int = 1,
) -> int:
  """Runs the jobs whose results are missing, and stores each result as soon as it is measured.

  A job fails if the device cannot run it, for example for lack of memory, or if the model's numbers
  are not finite. The reason is printed, the result stays missing, and the other jobs run. Any other
  error ends the run.

  Args:
    jobs: in the order in which they start.
    results: the file of results.
    origin: the checkpoint that is measured, stored with every result whose job has no origin.
    minutes: no job starts after that time; None for no bound.
    workers: jobs that run at the same time. The host compiles several programs at once, and the
      device runs one; the memory that the jobs need on the device adds up.

  Returns:
    How many results are still missing.
  """
  missing = [job for job in jobs if job.key not in results]
  begin, left = time.perf_counter(), len(missing)

  def measure(job: Job) -> tuple[Job, dict[str, Any] | None]:
    job_begin = time.perf_counter()
    if minutes is not None and job_begin - begin > 60 * minutes:
      return job, None
    try:
      measured = job.run(bar.update)
    except (jax.errors.JaxRuntimeError, FloatingPointError) as error:
      tqdm.write(f"{job.label} failed: {str(error).partition(chr(10))[0]}", file=sys.stderr)
      return job, None
    return job, measured | {"seconds": time.perf_counter() - job_begin}

  with (
    tqdm(total=sum(job.ticks for job in missing), unit="batch", disable=None) as bar,
    concurrent.futures.ThreadPoolExecutor(workers) as pool,
  ):
    futures = [pool.submit(measure, job) for job in missing]
    try:
      for future in concurrent.futures.as_completed(futures):
        job, measured = future.result()
        if measured is not None:
          bar.set_description_str(job.label)
          common = {
            "origin": job.origin or origin,
            "environment": environment(),
            "depends_on": job.depends_on,
          }
          results.add(job.key, job.fields | measured | common)
          left -= 1
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  return left


def perplexity_job(
  family: Family,
  variant: Variant,
  rows: Int[np.ndarray, "B T"],
  settings: PerplexitySettings,
) -> Job:
  """The job of `measure_perplexity` for one variant and rows of one length."""
  length = rows.shape[1] - 1
  return Job(
    fields={"task": "perplexity", "variant": variant.name, "length": length, "rows": len(rows)},
    depends_on=[
      variant.config(family.config, length).to_dict(),
      [settings.targets, list(settings.contexts), settings.buckets, settings.always_decode],
      _rows_digest(rows),
    ],
    ticks=parts(family, variant, length, len(rows), settings),
    run=lambda tick: measure_perplexity(family, variant, rows, settings, tick),
  )


@dataclasses.dataclass(frozen=True)
class RetrievalSettings:
  """The prompts of a retrieval job.

  Attributes:
    depths: positions of the answer's sentence, as shares of the prompt.
    samples: prompts for each depth.
    seed: of the texts, the facts and their positions.
    batch_size: prompts that run together.
  """

  depths: Sequence[float]
  samples: int
  seed: int = 0
  batch_size: int = 1


def retrieval_job(
  family: Family,
  tokenizer: Tokenizer,
  hay: Haystack,
  variant: Variant,
  puzzle: str,
  length: int,
  settings: RetrievalSettings,
) -> Job:
  """The job of one puzzle at one length: exact match over all depths, and at each depth."""

  def run(tick: Tick) -> dict[str, Any]:
    samples = {
      depth: [
        hay.sample(puzzle, length, depth, seed=settings.seed, index=index)
        for index in range(settings.samples)
      ]
      for depth in settings.depths
    }
    flat = [sample for some in samples.values() for sample in some]
    answers = family.answers(variant, length, tokenizer, settings.batch_size)
    texts = answers([sample.tokens for sample in flat], NEW_TOKENS, tick)
    by_depth = []
    for i, depth in enumerate(samples):
      own = texts[i * settings.samples : (i + 1) * settings.samples]
      by_depth.append({"depth": depth, **exact_match(own, samples[depth])})
    return {
      **exact_match(texts, flat),
      "by_depth": by_depth,
      "budget": dataclasses.asdict(family.budget(variant, length)),
      "answers": [[sample.answer, text] for sample, text in zip(flat, texts, strict=True)],
    }

  return Job(
    fields={"task": "retrieval", "puzzle": puzzle, "variant": variant.name, "length": length},
    depends_on=[
      variant.config(family.config, length).to_dict(),
      [list(settings.depths), settings.samples, settings.seed],
      hay.fingerprint,
    ],
    ticks=len(settings.depths) * settings.samples,
    run=run,
  )


def ablation_job(
  family: Family, name: str, config: DGAConfig, rows: Int[np.ndarray, "B T"], batch_size: int
) -> Job:
  """The job of an ablation: the loss on the second half of the rows with parts of DGA replaced.

  The result has "swaps", the loss of each config of `ablation.swaps`; "one_layer_dga", for each
  layer the loss with DGA in that layer and dense attention in the others; "one_layer_dense", the
  reverse; and for both, with the suffix "_errors", the standard errors over rows of the differences
  from dense attention and from `config` in every layer, None for one row.

  Args:
    family: the model.
    name: of the config, for tables.
    config: with streaming selection.
    rows: inputs and their next tokens.
    batch_size: rows that run together.
  """
  length, layers = rows.shape[1] - 1, family.config.num_layers
  model = family.model(Variant("dense", {"attention": "dense"}), length)
  dense, own = DenseAttention(), AblatedDGA(config)
  runs: dict[str, list[AttentionKind]] = {"dense": [dense] * layers}
  runs |= {swap: [kind] * layers for swap, kind in swaps(config).items()}
  for layer in range(layers):
    for title, one, rest in (("dga", own, dense), ("dense", dense, own)):
      kinds: list[AttentionKind] = [rest] * layers
      kinds[layer] = one
      runs[f"one_layer_{title} {layer}"] = kinds

  def run(tick: Tick) -> dict[str, Any]:
    losses: dict[str, np.ndarray] = {}  # Of each row.
    for title, kinds in runs.items():
      parts = []
      for batch in batches(rows, batch_size):
        loss_BxL = losses_by_kinds(model, kinds, fill(batch, batch_size))
        parts.append(np.asarray(loss_BxL)[: len(batch), length // 2 :].mean(axis=1, dtype=float))
        tick()
      losses[title] = np.concatenate(parts)
      if not np.isfinite(losses[title]).all():
        raise FloatingPointError(f"the loss of {title!r} is not finite")
    result: dict[str, Any] = {}
    for title, baseline in (("one_layer_dga", "dense"), ("one_layer_dense", "as configured")):
      own = [losses.pop(f"{title} {layer}") for layer in range(layers)]
      changes = [row_losses - losses[baseline] for row_losses in own]
      result[title] = [float(row_losses.mean()) for row_losses in own]
      result[f"{title}_errors"] = (
        [float(change.std(ddof=1) / math.sqrt(len(rows))) for change in changes]
        if len(rows) > 1
        else None
      )
    return {"swaps": {title: float(one.mean()) for title, one in losses.items()}, **result}

  return Job(
    fields={"task": "ablation", "variant": name, "length": length, "rows": len(rows)},
    depends_on=[dataclasses.asdict(config), model.config.to_dict(), _rows_digest(rows)],
    ticks=len(runs) * -(-len(rows) // batch_size),
    run=run,
  )


def longbench_job(
  family: Family,
  tokenizer: Tokenizer,
  one: longbench.LongBenchSet,
  variant: Variant,
  length: int,
  batch_size: int,
) -> Job:
  """The job of a data set of LongBench-E; a prompt and its answer fit in `length` tokens."""

  def run(tick: Tick) -> dict[str, Any]:
    most = length - one.new_tokens
    texts = answer(
      family.model(variant, length),
      tokenizer,
      [longbench.fit(tokenizer, prompt, most) for prompt in one.prompts],
      new_tokens=one.new_tokens,
      batch_size=batch_size,
      tick=tick,
    )
    return {**longbench.score(one, texts), "answers": texts}

  return Job(
    fields={"task": "longbench", "dataset": one.name, "variant": variant.name, "length": length},
    depends_on=[variant.config(family.config, length).to_dict(), _digest(one.prompts)],
    ticks=len(one.prompts),
    run=run,
  )


def lost_in_the_middle_job(
  family: Family,
  tokenizer: Tokenizer,
  questions: Sequence[lost_in_the_middle.Question],
  variant: Variant,
  length: int,
  batch_size: int,
) -> Job:
  """The job of the questions of Liu et al.

  Raises:
    ValueError: a prompt and its answer exceed `length` tokens.
  """
  prompts = [[*tokenizer.start_ids, *tokenizer.encode(one.prompt)] for one in questions]
  longest = max(map(len, prompts)) + lost_in_the_middle.NEW_TOKENS
  if longest > length:
    raise ValueError(f"length is {length}; the longest question takes {longest} tokens.")

  def run(tick: Tick) -> dict[str, Any]:
    texts = answer(
      family.model(variant, length),
      tokenizer,
      prompts,
      new_tokens=lost_in_the_middle.NEW_TOKENS,
      batch_size=batch_size,
      tick=tick,
    )
    return {**lost_in_the_middle.score(questions, texts), "answers": texts}

  documents = sorted({one.documents for one in questions})
  return Job(
    fields={
      "task": "lost_in_the_middle",
      "documents": ",".join(map(str, documents)),
      "variant": variant.name,
      "length": length,
    },
    depends_on=[
      variant.config(family.config, length).to_dict(),
      _digest([one.prompt for one in questions]),
    ],
    ticks=len(prompts),
    run=run,
  )


def ruler_job(
  family: Family,
  tokenizer: Tokenizer,
  part: RulerPart,
  variant: Variant,
  length: int,
  batch_size: int,
) -> Job:
  """The job of a part of RULER; a prompt and its answer fit in `length` tokens."""

  def run(tick: Tick) -> dict[str, Any]:
    answers = family.answers(variant, length, tokenizer, batch_size)
    texts = answers([prompt.tokens for prompt in part.prompts], part.new_tokens, tick)
    pairs = list(zip(texts, part.prompts, strict=True))
    scores = [part.score(text, one.answers) for text, one in pairs]
    deviation = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return {
      "score": float(np.mean(scores)),
      "standard_error": None if deviation is None else deviation / math.sqrt(len(scores)),
      "samples": len(scores),
      "budget": dataclasses.asdict(family.budget(variant, length)),
      "answers": [[list(one.answers), text] for text, one in pairs],
    }

  return Job(
    fields={"task": "ruler", "part": part.name, "variant": variant.name, "length": length},
    depends_on=[
      variant.config(family.config, length).to_dict(),
      part.new_tokens,
      _digest([repr(prompt) for prompt in part.prompts]),
    ],
    ticks=len(part.prompts),
    run=run,
  )


def _rows_digest(rows: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(rows)).hexdigest()


def _digest(texts: Sequence[str]) -> str:
  return hashlib.sha256("\0".join(texts).encode()).hexdigest()

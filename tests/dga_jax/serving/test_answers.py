"""Answers on asyncio's loop, with an engine that a test writes."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dga_jax.generation import Emitted, Request
from dga_jax.serving import answers, endpoints
from dga_jax.serving.answers import Answers, Delta
from dga_jax.serving.metrics import Metrics
from tests.dga_jax.evaluation.tiny import CONFIG, TOKENIZER


class Engine:
  """Takes one request; the test delivers its tokens."""

  config, max_length = CONFIG, 512
  deliver: Callable[[Emitted], None]

  def submit(self, request: Request, deliver: Callable[[Emitted], None]) -> int:
    del request
    self.deliver = deliver
    return 0

  def cancel(self, number: int) -> None:
    del number


async def one_answer(engine: Engine) -> tuple[Answers, Metrics]:
  served: Any = SimpleNamespace(name="tiny", engine=engine, tokenizer=TOKENIZER)
  metrics = Metrics({})
  return Answers(served, [Request([5, 6], 3)], 1, (), metrics), metrics


def test_a_stream_that_waits_has_comments(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(answers, "_SILENT_SECONDS", 0.01)

  async def run() -> list[bytes]:
    engine = Engine()
    own, _ = await one_answer(engine)
    parameters: Any = SimpleNamespace(continuous_usage=False, include_usage=False)
    style: Any = SimpleNamespace(first_choices=list, chunk_choice=lambda delta: delta.text)
    events = endpoints._events(own, parameters, style, {})
    found = [await anext(events), await anext(events)]
    engine.deliver(Emitted(0, [65], "length", [], 0))
    return found + [event async for event in events]

  events, comment = asyncio.run(run()), b": waiting\n\n"
  assert events[:2] == [comment] * 2
  data = [event for event in events if event != comment]
  assert data == [b'data: {"choices":["A"]}\n\n', b"data: [DONE]\n\n"]


def test_the_time_between_tokens_is_the_engine_s_and_not_the_reader_s():
  async def run() -> tuple[list[Delta | None], Metrics]:
    engine = Engine()
    own, metrics = await one_answer(engine)
    for token in (65, 66):
      engine.deliver(Emitted(0, [token], None, [], 0))
    engine.deliver(Emitted(0, [67], "length", [], 0))
    found = []
    async for delta in own.deltas():
      found.append(delta)
      await asyncio.sleep(0.3)
    own.close()
    own.close()
    return found, metrics

  deltas, metrics = asyncio.run(run())
  assert [delta.text for delta in deltas if delta is not None] == ["A", "B", "C"]
  samples = {s.name: s.value for metric in metrics.registry.collect() for s in metric.samples}
  assert samples["dga_time_between_tokens_seconds_sum"] < 0.2
  assert samples["dga_time_between_tokens_seconds_count"] == 1
  assert samples["dga_generated_tokens_total"] == 3
  assert samples["dga_prompt_tokens_total"] == 2

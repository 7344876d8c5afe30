"""`dga serve --budgets`: a model whose KV heads have settings of their own."""

from pathlib import Path

import httpx

import dga_jax
from dga_jax import HeadBudgets
from dga_jax.generation import Sampling
from tests.dga_jax.evaluation.tiny import CONFIG
from tests.dga_jax.serving.tiny_server import NAME, serve

BUDGETS = HeadBudgets(("full", CONFIG.dga), ((1, 0), (1, 1)))
GREEDY = {"model": NAME, "max_tokens": 20, "temperature": 0}
PROMPT = "The carrier stopped at the gate. Nobody came out! He called twice and waited."


def test_answers_equal_those_of_generate(workdir: Path, tmp_path: Path):
  file = tmp_path / "budgets.json"
  file.write_text(BUDGETS.to_json())
  model, tokenizer = dga_jax.load(workdir, budgets=BUDGETS)
  assert model.config.attention == "head_budgets"
  messages = [{"role": "user", "content": PROMPT}]
  alone = [
    dga_jax.generate(
      model, tokenizer, prompt, max_new_tokens=20, sampling=Sampling(temperature=0.0)
    )
    for prompt in (PROMPT, messages)
  ]
  with serve(workdir, tmp_path / "log", f"--budgets={file}", "--prompt_chunk=32") as server:
    completion, again = (
      httpx.post(f"{server.url}/v1/completions", json=GREEDY | {"prompt": PROMPT}, timeout=60)
      for _ in range(2)
    )
    chat = httpx.post(
      f"{server.url}/v1/chat/completions", json=GREEDY | {"messages": messages}, timeout=60
    )
  assert completion.json()["choices"][0]["text"] == alone[0]
  assert chat.json()["choices"][0]["message"]["content"] == alone[1]
  usage = completion.json()["usage"]
  # One head of four keeps every token.
  assert usage["cache_bytes"]["dense"] / 4 < usage["cache_bytes"]["live"]
  assert usage["cache_bytes"]["live"] < usage["cache_bytes"]["dense"]
  assert again.json()["choices"] == completion.json()["choices"]
  assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == len(PROMPT) + 1

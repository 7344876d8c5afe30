"""The generate command on a small checkpoint: texts, warnings, and failures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dga_jax.generation import console, Sampling
from dga_jax.loading import load_with_facts, Loaded, trained_length
from dga_jax.tokenizer import Tokenizer
from tests.dga_jax.evaluation.tiny import CONFIG, TOKENIZER, write_checkpoint

ROOT = Path(__file__).parents[3]
SAMPLING = Sampling(temperature=0.7, seed=2**32 - 1)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> str:
  return str(write_checkpoint(tmp_path_factory.mktemp("model") / "run"))


@pytest.fixture(scope="module")
def loaded(workdir: str) -> Loaded:
  return load_with_facts(workdir)


def test_a_file_of_prompts_json_lines_and_a_single_prompt_give_the_same_text(
  loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
  prompts = ["The carrier", "Rain", "He"]
  batch = console.make_batch(loaded, prompts, SAMPLING, max_new_tokens=8, slots=2)
  console.print_all(batch, loaded.tokenizer, prompts)
  printed = capsys.readouterr()
  *together, rest = printed.out.split(f"\n{'-' * 72}\n")
  assert rest == ""
  assert [text.startswith(prompt) for text, prompt in zip(together, prompts, strict=True)] == [
    True
  ] * 3
  assert printed.err.startswith("prefill ")  # No progress bar without a terminal.

  records = [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
  console.print_json_lines(batch, loaded.tokenizer, records, max_new_tokens=8)
  printed = capsys.readouterr()
  results = [json.loads(line) for line in printed.out.splitlines()]
  assert [result["prompt"] + result["text"] for result in results] == together
  assert [(r["id"], r["new_tokens"], r["finish"]) for r in results] == [
    (i, 8, "length") for i in range(3)
  ]
  assert printed.err.startswith("prefill ")

  batch = console.make_batch(loaded, prompts[:1], SAMPLING, max_new_tokens=8, stream=True)
  console.print_stream(batch, loaded.tokenizer, prompts[0])
  assert capsys.readouterr().out == f"{together[0]}\n"


def test_attention_and_dtype_of_the_flags(workdir: str) -> None:
  loaded = load_with_facts(workdir, attention="dense", dtype="bfloat16")
  assert (loaded.model.config.attention, loaded.model.config.dtype) == ("dense", "bfloat16")
  assert load_with_facts(workdir, step=0).model.config == CONFIG


@pytest.mark.parametrize(
  ("saved", "length"),
  [
    ({}, None),
    ({"data": {"sequence_length": 8}}, 8),
    ({"origin": {"max_position_embeddings": 32}}, 32),
    ({"data": {"sequence_length": 8}, "origin": {"max_position_embeddings": 32}}, 32),
    ({"data": {"sequence_length": 64}, "origin": {"max_position_embeddings": 32}}, 64),
    ({"data": None, "origin": {"model_type": "llama"}}, None),
  ],
)
def test_the_trained_context(saved: dict, length: int | None) -> None:
  assert trained_length(saved) == length


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> None:
  """`make_batch` returns the arguments of the batch, without compiling it."""
  monkeypatch.setattr(console, "ContinuousBatching", lambda *_, **options: options)


@pytest.mark.usefixtures("arguments")
def test_prompts_beyond_the_trained_context_are_warned_about(
  loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
  loaded = loaded._replace(trained_length=4)
  console.make_batch(loaded, ["abc", "abcd"], SAMPLING, max_new_tokens=1)
  warned = capsys.readouterr().err
  assert "prompt 1 has 5 tokens; the model was trained on contexts of at most 4 tokens" in warned
  assert "prompt 0" not in warned


@pytest.mark.usefixtures("arguments")
def test_every_stop_id_of_the_tokenizer_ends_a_text(loaded: Loaded) -> None:
  several = Tokenizer(TOKENIZER._backend, stop_ids=[7, 11])
  options: Any = console.make_batch(
    loaded._replace(tokenizer=several), ["a"], SAMPLING, max_new_tokens=1
  )
  assert set(options["stop_ids"]) == {TOKENIZER.end_id, 7, 11}


def test_the_command_ends_with_an_error_if_float16_overflows(tmp_path: Path) -> None:
  workdir = write_checkpoint(tmp_path / "run", dtype="float16", scale=3e4)
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("ab\ncd\n")
  done = subprocess.run(
    [
      sys.executable, "-m", "dga_jax", "generate",
      f"--workdir={workdir}", f"--prompt_file={prompts}", "--max_new_tokens=2",
    ],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )  # fmt: skip
  assert done.returncode == 1
  assert (
    "error: The logits are NaN or infinite: prompt 0 after 0 new tokens, prompt 1" in done.stderr
  )
  assert "Traceback" not in done.stderr

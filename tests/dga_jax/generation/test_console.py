"""The generate command on a small checkpoint: texts, warnings, and failures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dga_jax.generation import console, Sampling
from tests.dga_jax.evaluation.tiny import CONFIG, TOKENIZER, write_checkpoint

ROOT = Path(__file__).parents[3]
SAMPLING = Sampling(temperature=0.7, seed=2**32 - 1)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> str:
  return str(write_checkpoint(tmp_path_factory.mktemp("model") / "run"))


def texts(workdir: str, prompts: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
  loaded = console.load(workdir)
  batch = console.make_batch(loaded, prompts, SAMPLING, max_new_tokens=8, slots=2)
  console.print_all(batch, loaded.tokenizer, prompts)
  return capsys.readouterr().out.split(f"\n{'-' * 72}\n")


def test_a_file_of_prompts_and_a_single_prompt_give_the_same_text(
  workdir: str, capsys: pytest.CaptureFixture[str]
) -> None:
  prompts = ["The carrier", "Rain", "He"]
  *together, statistics = texts(workdir, prompts, capsys)
  assert [text.startswith(prompt) for text, prompt in zip(together, prompts, strict=True)] == [
    True
  ] * 3
  assert statistics.startswith("prefill ")
  loaded = console.load(workdir)
  batch = console.make_batch(loaded, prompts[:1], SAMPLING, max_new_tokens=8, stream=True)
  console.print_stream(batch, loaded.tokenizer, prompts[0])
  assert capsys.readouterr().out.startswith(f"{together[0]}\n")


def test_attention_and_dtype_of_the_flags(workdir: str) -> None:
  loaded = console.load(workdir, attention="dense", dtype="bfloat16")
  assert (loaded.model.config.attention, loaded.model.config.dtype) == ("dense", "bfloat16")
  assert console.load(workdir, 0).model.config == CONFIG


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
  assert console.trained_length(saved) == length


def test_prompts_beyond_the_trained_context_are_warned_about(
  workdir: str, capsys: pytest.CaptureFixture[str]
) -> None:
  loaded = console.load(workdir)._replace(trained_length=4)
  console.make_batch(loaded, ["abc", "abcd"], SAMPLING, max_new_tokens=1)
  warned = capsys.readouterr().err
  assert "prompt 1 has 5 tokens; the model was trained on contexts of at most 4 tokens" in warned
  assert "prompt 0" not in warned


def test_stop_ids_are_those_of_the_tokenizer(workdir: str) -> None:
  loaded = console.load(workdir)
  batch = console.make_batch(loaded, ["a"], SAMPLING, max_new_tokens=1)
  assert batch._stop_ids == {TOKENIZER.end_id}


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

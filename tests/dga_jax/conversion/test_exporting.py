"""Exports restore what an import stored. A failed export leaves no files and deletes none."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from dga_jax import DGAConfig, HeadBudgets
from dga_jax.calibration.selector_weights import save_with_selector, with_selector
from dga_jax.checkpoint import load_config, load_model, load_tokenizer
from dga_jax.conversion.checkpoint_reader import TokenizerChoices
from dga_jax.conversion.errors import ConversionError
from dga_jax.conversion.exporting import export_hugging_face
from dga_jax.conversion.gguf_file import GGUFFile
from dga_jax.conversion.hugging_face import HEAD_BUDGETS, HuggingFaceFolder
from dga_jax.conversion.importing import import_model
from dga_jax.conversion.origin import chat_templates, json_files
from dga_jax.conversion.safetensors_files import SELECTOR
from dga_jax.conversion.template import json_with_start_tokens
from dga_jax.model import ModelConfig
from dga_jax.model.focal_selector import selector_features
from dga_jax.tokenizer import Tokenizer
from tests.dga_jax.conversion.folders import (
  copy_of,
  GOLDEN,
  import_folder,
  ROOT,
  set_keys,
  tensors,
)
from tests.dga_jax.conversion.gguf_files import stored_tensors, write


def read(path: Path) -> Any:
  return json.loads(path.read_text())


def test_export_in_several_files(tmp_path: Path) -> None:
  import_folder(GOLDEN / "qwen3", tmp_path / "run")
  export_hugging_face(tmp_path / "run", tmp_path / "out", shard_bytes=15_000)
  files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
  assert len(files) > 2
  assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
  for name, tensor in tensors(GOLDEN / "qwen3").items():
    np.testing.assert_array_equal(tensor, tensors(tmp_path / "out")[name])
  assert HuggingFaceFolder(tmp_path / "out").names == HuggingFaceFolder(GOLDEN / "qwen3").names


def test_head_budgets_travel_beside_the_model(tmp_path: Path) -> None:
  budgets = HeadBudgets(("full", DGAConfig(selection="streaming")), ((0, 1), (1, 1)))
  import_folder(GOLDEN / "qwen3", tmp_path / "run", attention="head_budgets", head_budgets=budgets)
  export_hugging_face(tmp_path / "run", tmp_path / "out")
  config = HuggingFaceFolder(tmp_path / "out").config()
  assert (config.attention, config.head_budgets) == ("head_budgets", budgets)
  set_keys(tmp_path / "out" / HEAD_BUDGETS, assignment=[[0, 1]])
  with pytest.raises(ConversionError, match=r"head_budgets.json: .*has 1 layers of 2 KV heads"):
    HuggingFaceFolder(tmp_path / "out").config()


def test_the_weights_of_a_selector_travel_beside_the_model(tmp_path: Path) -> None:
  import_folder(GOLDEN / "qwen3", tmp_path / "dense")
  model, config, tokenizer = load_model(tmp_path / "dense")
  shape = (config.num_layers, config.num_kv_heads, selector_features(config.head_dim))
  weights = np.random.default_rng(0).normal(size=shape)
  blocks = DGAConfig(selection="streaming", group_size=4)
  fitted = with_selector(model, blocks, weights)
  save_with_selector(fitted, load_config(tmp_path / "dense"), tokenizer, tmp_path / "run")
  model, config, _ = load_model(tmp_path / "run")
  assert (config.focal_selector, config.dga.selector) == (True, "fitted")
  stored = model.layers.attention.selector[...]
  np.testing.assert_array_equal(stored, weights.astype(stored.dtype))

  export_hugging_face(tmp_path / "run", tmp_path / "out")
  path = tmp_path / "out" / SELECTOR
  assert load_file(path).keys() == {
    f"model.layers.{layer}.self_attn.focal_selector.weight" for layer in range(config.num_layers)
  }
  others = {k: v for k, v in tensors(tmp_path / "out").items() if k not in load_file(path)}
  assert others.keys() == tensors(GOLDEN / "qwen3").keys()
  import_folder(tmp_path / "out", tmp_path / "again")
  again, config, _ = load_model(tmp_path / "again")
  assert config.focal_selector
  np.testing.assert_array_equal(again.layers.attention.selector[...], stored)

  good = load_file(path)
  for name, complaint in (
    ("model.layers.9.self_attn.focal_selector.weight", r"no parameter for the tensor model.*9"),
    ("model.norm.weight", r"model.safetensors both hold 'model.norm.weight'"),
  ):
    save_file(good | {name: np.zeros(3, np.float32)}, path)
    with pytest.raises(ConversionError, match=complaint):
      import_folder(tmp_path / "out", tmp_path / "refused")


def full_folder(tmp_path: Path) -> Path:
  """A folder with all keys and files that a round trip must keep."""
  folder = copy_of("llama3", tmp_path)
  set_keys(
    folder / "config.json",
    eos_token_id=[3, 2],
    pad_token_id=1,
    attention_dropout=0.25,
    initializer_range=0.07,
    use_cache=False,
    temperature=0.7,
    _name_or_path="someone/model",
  )
  set_keys(
    folder / "generation_config.json",
    bos_token_id=0,
    eos_token_id=[2, 9],
    temperature=0.6,
    top_p=0.9,
    do_sample=True,
  )
  set_keys(
    folder / "tokenizer_config.json",
    add_bos_token=True,
    pad_token="<other>",
    eos_token={"content": "<end>", "lstrip": False, "special": True},
    chat_template="{% for m in messages %}{{ m.content }}\r\n{% endfor %}",
    tokenizer_class="LlamaTokenizerFast",
    model_max_length=10**30,
    extra={"a": [1, None, "\u00e9"]},
  )
  set_keys(folder / "special_tokens_map.json", eos_token="<end>", pad_token="<other>")
  (folder / "chat_template.jinja").write_bytes("a\r\n\u00e9".encode())
  (folder / "additional_chat_templates").mkdir()
  (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
  return folder


def test_a_round_trip_keeps_keys_that_the_decoder_does_not_use(tmp_path: Path) -> None:
  folder = full_folder(tmp_path)
  import_folder(folder, tmp_path / "run")
  export_hugging_face(tmp_path / "run", tmp_path / "out")
  for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
    assert read(tmp_path / "out" / name) == read(folder / name), name
  was, now = read(folder / "config.json"), read(tmp_path / "out" / "config.json")
  # RoPE and the dtype are written under both the older and the newer keys.
  renamed = {"rope_parameters", "rope_theta", "rope_scaling", "dtype", "torch_dtype"}
  assert {k: v for k, v in now.items() if k not in renamed} == {
    k: v for k, v in was.items() if k not in renamed
  }
  assert now["torch_dtype"] == was["dtype"]
  for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja"):
    assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
  # A second import and export changes nothing.
  import_folder(tmp_path / "out", tmp_path / "again")
  assert load_tokenizer(tmp_path / "again").stop_ids == load_tokenizer(tmp_path / "run").stop_ids
  assert load_tokenizer(tmp_path / "run").stop_ids == (2, 3, 9)
  export_hugging_face(tmp_path / "again", tmp_path / "twice")
  files = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")}
  assert len(files) == 8
  for name in files:
    assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_the_users_choices_have_priority_in_an_export(tmp_path: Path) -> None:
  folder = full_folder(tmp_path)
  choices = TokenizerChoices(end_token="<turn>", add_bos_token=False)
  set_keys(folder / "config.json", eos_token_id=2)
  set_keys(folder / "generation_config.json", eos_token_id=2)
  import_folder(folder, tmp_path / "run", choices=choices)
  export_hugging_face(tmp_path / "run", tmp_path / "out")
  assert read(tmp_path / "out" / "config.json")["eos_token_id"] == [3, 2]
  assert read(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [3, 2]
  written = read(tmp_path / "out" / "tokenizer_config.json")
  assert (written["eos_token"], written["add_bos_token"]) == ("<turn>", False)
  assert read(tmp_path / "out" / "special_tokens_map.json")["eos_token"] == "<turn>"
  again = HuggingFaceFolder(tmp_path / "out").tokenizer()
  assert again.to_json() == load_tokenizer(tmp_path / "run").to_json()


def test_a_gguf_file_keeps_its_chat_template_and_tokens(tmp_path: Path) -> None:
  config = HuggingFaceFolder(GOLDEN / "qwen2").config()
  changes = {
    "tokenizer.chat_template": "T",
    "tokenizer.ggml.padding_token_id": 1,
    "tokenizer.ggml.eot_token_id": 3,
  }
  tensors_by_name = stored_tensors("qwen2", config)
  path = tmp_path / "model.gguf"
  write(path, config, tensors_by_name, architecture="qwen2", changes=changes)
  source = GGUFFile(path)
  import_model(source, source.config(), tmp_path / "run")
  export_hugging_face(tmp_path / "run", tmp_path / "out")
  written = read(tmp_path / "out" / "tokenizer_config.json")
  assert written == {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 64,
    "bos_token": "<begin>",
    "eos_token": "<end>",
    "pad_token": "<other>",
    "chat_template": "T",
  }
  values = read(tmp_path / "out" / "config.json")
  assert [values[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [0, [2, 3], 1]
  again = HuggingFaceFolder(tmp_path / "out").tokenizer()
  assert again.to_json() == load_tokenizer(tmp_path / "run").to_json()


def test_a_model_trained_here_has_no_extra_files() -> None:
  config = ModelConfig(
    vocab_size=257, num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8
  )
  files = json_files(config, {"max_position_embeddings": 128}, Tokenizer.byte_level())
  assert files.keys() == {"config.json", "tokenizer_config.json"}
  assert [files["config.json"][f"{role}_token_id"] for role in ("bos", "eos")] == [256, 256]
  assert files["tokenizer_config.json"]["model_max_length"] == 128


@pytest.mark.parametrize("tokenizer", [Tokenizer.byte_level(), Tokenizer.train_bpe(["a b"], 258)])
def test_a_tokenizer_made_here_keeps_its_start_token_in_an_export(tokenizer: Tokenizer) -> None:
  exported = tokenizers.Tokenizer.from_str(json_with_start_tokens(tokenizer))
  end = tokenizer.end_id
  assert exported.encode("a b").ids == [end, *tokenizer.encode("a b")]
  assert (
    Tokenizer.imported(exported, tokenizer.end_token).start_ids == tokenizer.start_ids == (end,)
  )
  words = Tokenizer.words(["x", "y"])
  exported = tokenizers.Tokenizer.from_str(json_with_start_tokens(words))
  assert exported.encode("x y").ids == [*words.start_ids, *words.encode("x y")]


@pytest.mark.parametrize("name", ["../a.jinja", "/a.jinja", "config.json", "a/b.jinja"])
def test_a_checkpoint_names_no_other_file_as_a_chat_template(name: str) -> None:
  with pytest.raises(ValueError, match="names the chat template"):
    chat_templates({"chat_templates": {name: "x"}})


def test_an_export_into_an_existing_folder_is_an_error(tmp_path: Path) -> None:
  import_folder(GOLDEN / "qwen3", tmp_path / "run")
  with pytest.raises(ValueError, match="run exists"):
    export_hugging_face(tmp_path / "run", tmp_path / "run")


def test_an_export_does_not_change_other_folders(tmp_path: Path) -> None:
  """Includes folders that have the names of unfinished exports."""
  import_folder(GOLDEN / "qwen3", tmp_path / "run")
  kept = [tmp_path / name / "kept.txt" for name in ("out.partial", ".out.1.partial")]
  for path in kept:
    path.parent.mkdir()
    path.write_text("mine")
  export_hugging_face(tmp_path / "run", tmp_path / "out")
  assert [path.read_text() for path in kept] == ["mine", "mine"]
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"run", "out", "out.partial", ".out.1.partial"}
  assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def test_a_folder_created_during_the_export_is_not_changed(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  import_folder(GOLDEN / "qwen3", tmp_path / "run")

  def make(*_: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("mine")

  monkeypatch.setattr("dga_jax.conversion.exporting._to_disk", make)
  with pytest.raises(OSError, match="out"):
    export_hugging_face(tmp_path / "run", tmp_path / "out")
  assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept.txt"]


def test_an_interrupted_export_leaves_no_folder(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  import_folder(GOLDEN / "qwen3", tmp_path / "run")
  with monkeypatch.context() as patch:
    patch.setattr("dga_jax.conversion.exporting._write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
      export_hugging_face(tmp_path / "run", tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == ["run"]
  export_hugging_face(tmp_path / "run", tmp_path / "out")
  assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def interrupt(*_: Any, **__: Any) -> None:
  raise KeyboardInterrupt


KILLED = """
import sys, time
from pathlib import Path
from dga_jax.conversion import exporting
def wait(*_):
  print("written", flush=True)
  time.sleep(600)
exporting._to_disk = wait
exporting.export_hugging_face(sys.argv[1], Path(sys.argv[2]))
"""


def test_a_killed_export_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
  import_folder(GOLDEN / "qwen3", tmp_path / "run")
  command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(tmp_path / "out")]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  with subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
  names = {path.name for path in tmp_path.iterdir()}
  assert "out" not in names
  (left,) = names - {"run"}
  assert left.startswith(".out.")
  assert left.endswith(".partial")
  export_hugging_face(tmp_path / "run", tmp_path / "out")
  assert {path.name for path in tmp_path.iterdir()} == {"run", "out", left}

"""Hugging Face folders: transformers' logits, exact round trips, and what every defect says."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from safetensors.numpy import load_file, save_file

from dga_jax.checkpoint import list_steps, load_config, load_model
from dga_jax.conversion.exporting import export_hugging_face
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.importing import import_model
from dga_jax.conversion.sharding import parse_mesh, shardings
from dga_jax.model import Decoder

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "hugging_face"
FAMILIES = ["llama2", "llama3", "mistral", "qwen2", "qwen3", "smollm"]
forward = nnx.jit(Decoder.__call__)


def import_folder(folder: Path, workdir: Path, **changes: Any) -> str:
  source = HuggingFaceFolder(folder)
  config = dataclasses.replace(source.config(), **changes)
  return import_model(source, config, workdir)


def tensors(folder: Path) -> dict[str, np.ndarray]:
  return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """A copy of a fixture to damage: one file, no tied tensors."""
  return Path(shutil.copytree(GOLDEN / "llama2", tmp_path / "llama2"))


def change_config(folder: Path, **changes: Any) -> None:
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
  import_folder(GOLDEN / family, tmp_path, dtype="float32")
  model, config, tokenizer = load_model(tmp_path)
  assert config.param_dtype == "bfloat16"
  expected = np.load(GOLDEN / family / "expected.npz")
  np.testing.assert_allclose(forward(model, expected["tokens"]), expected["logits"], atol=1e-3)
  ids = [*tokenizer.start_ids, *tokenizer.encode(str(expected["text"]))]
  assert ids == expected["text_ids"].tolist()
  assert tokenizer.decode(ids[1:]).strip() == str(expected["text"])
  assert tokenizer.end_token == "<end>"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_is_exact(family: str, tmp_path: Path) -> None:
  import_folder(GOLDEN / family, tmp_path / "run")
  export_hugging_face(tmp_path / "run", tmp_path / "out")
  before, after = tensors(GOLDEN / family), tensors(tmp_path / "out")
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype
    np.testing.assert_array_equal(tensor.view(np.uint16), after[name].view(np.uint16), name)
  # What comes out can go in again, as the same model.
  assert HuggingFaceFolder(tmp_path / "out").config() == HuggingFaceFolder(GOLDEN / family).config()
  was, now = (
    json.loads((f / "config.json").read_text()) for f in (GOLDEN / family, tmp_path / "out")
  )
  for key in ("architectures", "model_type", "max_position_embeddings"):
    assert was[key] == now[key]
  files = [f / "tokenizer.json" for f in (GOLDEN / family, tmp_path / "out")]
  assert json.loads(files[0].read_text()) == json.loads(files[1].read_text())


def test_export_in_several_files(tmp_path: Path) -> None:
  import_folder(GOLDEN / "qwen3", tmp_path / "run")
  export_hugging_face(tmp_path / "run", tmp_path / "out", shard_bytes=15_000)
  files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
  assert len(files) > 2
  assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
  for name, tensor in tensors(GOLDEN / "qwen3").items():
    np.testing.assert_array_equal(tensor, tensors(tmp_path / "out")[name])
  assert HuggingFaceFolder(tmp_path / "out").names == HuggingFaceFolder(GOLDEN / "qwen3").names


def test_export_leaves_what_is_there_alone(tmp_path: Path) -> None:
  import_folder(GOLDEN / "qwen3", tmp_path / "run")
  with pytest.raises(ValueError, match="run is there already"):
    export_hugging_face(tmp_path / "run", tmp_path / "run")


def test_an_interrupted_export_leaves_no_folder(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  import_folder(GOLDEN / "qwen3", tmp_path / "run")
  with monkeypatch.context() as patch:
    patch.setattr("dga_jax.conversion.exporting._write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
      export_hugging_face(tmp_path / "run", tmp_path / "out")
  assert not (tmp_path / "out").exists()
  export_hugging_face(tmp_path / "run", tmp_path / "out")
  assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def interrupt(*_: Any, **__: Any) -> None:
  raise KeyboardInterrupt


def test_an_interrupted_import_leaves_no_checkpoint(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  whole = HuggingFaceFolder.read
  reads: list[str] = []

  def read(self: HuggingFaceFolder, name: str) -> np.ndarray:
    reads.append(name)
    if len(reads) == 10:
      raise KeyboardInterrupt
    return whole(self, name)

  with monkeypatch.context() as patch:
    patch.setattr(HuggingFaceFolder, "read", read)
    with pytest.raises(KeyboardInterrupt):
      import_folder(GOLDEN / "qwen3", tmp_path)
  assert list_steps(tmp_path) == []
  import_folder(GOLDEN / "qwen3", tmp_path)
  assert list_steps(tmp_path) == [0]


def test_an_import_does_not_overwrite(tmp_path: Path) -> None:
  import_folder(GOLDEN / "qwen3", tmp_path)
  with pytest.raises(ValueError, match="has a checkpoint already"):
    import_folder(GOLDEN / "qwen3", tmp_path)


def test_other_dtypes_and_attention(tmp_path: Path) -> None:
  import_folder(GOLDEN / "smollm", tmp_path, param_dtype="float32", attention="dga")
  model, config, _ = load_model(tmp_path)
  assert (config.param_dtype, config.attention) == ("float32", "dga")
  stored = tensors(GOLDEN / "smollm")["model.norm.weight"]
  np.testing.assert_array_equal(model.norm.scale[...], stored.astype(np.float32))
  assert load_config(tmp_path)["origin"] == {"model_type": "llama", "max_position_embeddings": 64}


def test_straight_into_shards() -> None:
  """In a process of its own, which has four devices."""
  flags = "--xla_force_host_platform_device_count=4"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  module = "tests.dga_jax.conversion.check_shards"
  subprocess.run(
    [sys.executable, "-m", module, str(GOLDEN / "qwen2")], check=True, cwd=ROOT, env=environment
  )


def test_an_axis_that_the_mesh_does_not_divide_stays_whole() -> None:
  config = dataclasses.replace(HuggingFaceFolder(GOLDEN / "qwen2").config(), num_kv_heads=1)
  mesh = AbstractMesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
  attention = shardings(config, mesh)["layers"]["attention"]
  assert attention["query"].spec == jax.P(None, "fsdp", "tensor", None)
  assert attention["key"].spec == jax.P(None, "fsdp", None, None)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("tensor=64", "takes 64 devices"),
    ("heads=2", "'heads=2'; write fsdp=N"),
    ("tensor=0", "'tensor=0'"),
    ("tensor=1,tensor=1", "'tensor=1'"),
  ],
)
def test_a_mesh_that_makes_no_sense(text: str, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    parse_mesh(text)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "gpt2"}, "model_type='gpt2'; supported are llama, mistral, qwen2, qwen3"),
    ({"model_type": None}, "lacks model_type"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=.*LlamaForCausalLM"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
    ({"attention_bias": True}, "attention_bias=True; only False"),
    ({"mlp_bias": True}, "mlp_bias=True; only False"),
    ({"quantization_config": {"bits": 4}}, "quantization_config=.*only None"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types.*sliding"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'; supported"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'; supported"),
    ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
    ({"num_attention_heads": 0}, "num_attention_heads=0; it must be an integer"),
    ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
    ({"num_key_value_heads": 3}, "num_heads is 4.*multiple of num_kv_heads=3"),
    ({"num_hidden_layers": 3}, r"lacks the tensors model\.layers\.2\..* and 4 more"),
    ({"num_hidden_layers": 1}, r"no place for the tensors model\.layers\.1\..* and 4 more"),
    (
      {"intermediate_size": 41},
      r"model\.layers\.0\.mlp\.gate_proj\.weight is \[40, 32\].*\[41, 32\]",
    ),
    ({"vocab_size": 65}, r"embed_tokens\.weight is \[64, 32\]; .* must be \[65, 32\]"),
    ({"tie_word_embeddings": True}, r"lm_head\.weight differs from model\.embed_tokens\.weight"),
  ],
)
def test_configs_that_are_refused(
  changes: dict, message: str, folder: Path, tmp_path: Path
) -> None:
  change_config(folder, **changes)
  with pytest.raises(ValueError, match=message):
    import_folder(folder, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("lm_head.weight"), r"lacks the tensor lm_head\.weight"),
    (lambda t: t.update({"lm_heed.weight": t.pop("lm_head.weight")}), r"there is lm_heed\.weight"),
    (
      lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}),
      r"no place for the tensor model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    (
      lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}),
      r"tensor model\.norm\.weight is stored as I8; only F32, F16, BF16",
    ),
  ],
)
def test_tensors_that_are_refused(change: Any, message: str, folder: Path, tmp_path: Path) -> None:
  content = tensors(folder)
  change(content)
  save_file(content, folder / "model.safetensors")
  with pytest.raises(ValueError, match=message):
    import_folder(folder, tmp_path / "run")


def test_buffers_and_a_stored_copy_of_tied_weights_do_no_harm(tmp_path: Path) -> None:
  folder = Path(shutil.copytree(GOLDEN / "smollm", tmp_path / "smollm"))
  content = tensors(folder)
  content["lm_head.weight"] = content["model.embed_tokens.weight"]
  content["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
  save_file(content, folder / "model.safetensors")
  assert "vocabulary 64" in import_folder(folder, tmp_path / "run")


def test_truncated_and_missing_files(folder: Path, tmp_path: Path) -> None:
  path = folder / "model.safetensors"
  whole = path.read_bytes()
  header = 8 + int.from_bytes(whole[:8], "little")
  last = max(json.loads(whole[8:header]).items(), key=lambda x: x[1].get("data_offsets", [0])[0])[0]
  for size, message in [
    (len(whole) - 1, f"damaged: its tensors take .* it cuts off {last}"),
    (header - 5, "damaged: it ends within its header"),
    (4, "damaged"),
    (0, "damaged"),
  ]:
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=message):
      import_folder(folder, tmp_path / "run")
  path.rename(folder / "pytorch_model.bin")
  with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors.*pytorch_model\.bin"):
    import_folder(folder, tmp_path / "run")


def test_a_damaged_index(tmp_path: Path) -> None:
  folder = Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "llama3"))
  path = folder / "model.safetensors.index.json"
  values = json.loads(path.read_text())
  other = {
    "weight_map": values["weight_map"] | {"lm_head.bias": "model-00002-of-00002.safetensors"}
  }
  path.write_text(json.dumps(other))
  with pytest.raises(ValueError, match=r"says that model-00002.* holds lm_head\.bias; it does not"):
    HuggingFaceFolder(folder)
  path.write_text(path.read_text()[:40])
  with pytest.raises(ValueError, match=r"index\.json is damaged"):
    HuggingFaceFolder(folder)
  path.write_text(json.dumps(values))
  (folder / "model-00001-of-00002.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"no .*model-00001.*, which should hold model\."):
    HuggingFaceFolder(folder)


def test_a_tokenizer_that_is_missing_damaged_or_too_large(folder: Path, tmp_path: Path) -> None:
  path = folder / "tokenizer.json"
  whole = path.read_text()
  path.write_text(whole[:100])
  with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
    import_folder(folder, tmp_path / "run")
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*AutoTokenizer"):
    import_folder(folder, tmp_path / "run")
  path.write_text(whole)
  (folder / "tokenizer_config.json").unlink()
  change_config(folder, eos_token_id=None)
  with pytest.raises(ValueError, match="--end_token"):
    import_folder(folder, tmp_path / "run")
  change_config(folder, eos_token_id=[3, 2])
  import_folder(folder, tmp_path / "run")
  assert load_model(tmp_path / "run")[2].end_token == "<turn>"

  words = json.loads(whole)
  words["model"]["vocab"] |= {f"word{i}": 34 + i for i in range(40)}
  path.write_text(json.dumps(words))
  with pytest.raises(ValueError, match=r"tokenizer has 74 tokens.*embedding has 64 rows"):
    import_folder(folder, tmp_path / "other")


def test_older_files_say_the_same_of_rope(folder: Path) -> None:
  new = HuggingFaceFolder(GOLDEN / "llama3").config()
  values = json.loads((GOLDEN / "llama3" / "config.json").read_text())
  scaling = values.pop("rope_parameters")
  old = values | {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
  shutil.copy(GOLDEN / "llama2" / "model.safetensors", folder)
  (folder / "config.json").write_text(json.dumps(old))
  assert HuggingFaceFolder(folder).config() == new
  change_config(folder, rope_scaling={"type": "linear", "factor": 4.0})
  assert HuggingFaceFolder(folder).config().rope_scaling.kind == "linear"

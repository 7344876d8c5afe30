"""Hugging Face folders: logits of transformers, exact round trips, imports, damaged tensors."""

import dataclasses
import json
import os
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
from dga_jax.conversion.errors import ConversionError
from dga_jax.conversion.exporting import export_hugging_face
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.sharding import parse_mesh, shardings
from dga_jax.model import Decoder
from tests.dga_jax.conversion.folders import (
  copy_of,
  FAMILIES,
  GOLDEN,
  import_folder,
  ROOT,
  tensors,
)

forward = nnx.jit(Decoder.__call__)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """A copy of a golden folder with one file and no tied tensors."""
  return copy_of("llama2", tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
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
  # An import of the exported folder gives the same model.
  assert HuggingFaceFolder(tmp_path / "out").config() == HuggingFaceFolder(GOLDEN / family).config()
  was, now = (
    json.loads((f / "config.json").read_text()) for f in (GOLDEN / family, tmp_path / "out")
  )
  for key in ("architectures", "model_type", "max_position_embeddings"):
    assert was[key] == now[key]
  files = [f / "tokenizer.json" for f in (GOLDEN / family, tmp_path / "out")]
  assert json.loads(files[0].read_text()) == json.loads(files[1].read_text())


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
  origin = load_config(tmp_path)["origin"]
  assert (origin["model_type"], origin["max_position_embeddings"]) == ("llama", 64)


def test_an_import_onto_a_mesh_equals_one_onto_one_device() -> None:
  """Runs in a subprocess with four simulated devices."""
  flags = "--xla_force_host_platform_device_count=4"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  module = "tests.dga_jax.conversion.check_shards"
  subprocess.run(
    [sys.executable, "-m", module, str(GOLDEN / "qwen2")], check=True, cwd=ROOT, env=environment
  )


def test_an_axis_that_the_mesh_does_not_divide_is_replicated() -> None:
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
def test_an_invalid_mesh_is_an_error(text: str, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    parse_mesh(text)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("lm_head.weight"), r"lacks the tensor lm_head\.weight"),
    (lambda t: t.update({"lm_heed.weight": t.pop("lm_head.weight")}), r"there is lm_heed\.weight"),
    (
      lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}),
      r"no parameter for the tensor model\.layers\.0\.self_attn\.q_proj\.bias",
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


def test_buffers_and_a_copy_of_tied_weights_are_ignored(tmp_path: Path) -> None:
  folder = copy_of("smollm", tmp_path)
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
  folder = copy_of("llama3", tmp_path)
  path = folder / "model.safetensors.index.json"
  values = json.loads(path.read_text())
  other = {
    "weight_map": values["weight_map"] | {"lm_head.bias": "model-00002-of-00002.safetensors"}
  }
  path.write_text(json.dumps(other))
  with pytest.raises(
    ValueError, match=r"says that model-00002.* holds 'lm_head\.bias'; it does not"
  ):
    HuggingFaceFolder(folder)
  path.write_text(path.read_text()[:40])
  with pytest.raises(ValueError, match=r"index\.json is damaged"):
    HuggingFaceFolder(folder)
  path.write_text(json.dumps(values))
  (folder / "model-00001-of-00002.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"no .*model-00001.*, which should hold 'model\."):
    HuggingFaceFolder(folder)


def test_the_index_determines_the_file_of_a_tensor(tmp_path: Path) -> None:
  """Another file may contain a tensor of the same name, or one that the index lacks."""
  folder = copy_of("llama3", tmp_path)
  expected = tensors(folder)
  first, second = sorted(folder.glob("*.safetensors"))
  in_first, in_second = load_file(first), load_file(second)
  name = next(iter(in_first))
  save_file(in_second | {name: in_first[name] + 1, "unused": np.zeros(1, np.float32)}, second)
  source = HuggingFaceFolder(folder)
  assert source.names == expected.keys()
  np.testing.assert_array_equal(source.read(name), in_first[name])


def test_a_single_file_has_priority_over_an_index(tmp_path: Path) -> None:
  folder = copy_of("llama2", tmp_path)
  (folder / "model.safetensors.index.json").write_text("{}")
  assert HuggingFaceFolder(folder).names == tensors(folder).keys()


@pytest.mark.parametrize(
  "name",
  [
    "../llama2/model.safetensors",
    "/model.safetensors",
    "sub/model.safetensors",
    "..",
    "",
    "a\0.safetensors",
    "x" * 300 + ".safetensors",
    "model.bin",
    3,
  ],
)
def test_an_index_may_name_only_files_of_its_folder(name: object, tmp_path: Path) -> None:
  folder = copy_of("llama3", tmp_path)
  copy_of("llama2", tmp_path)
  path = folder / "model.safetensors.index.json"
  values = json.loads(path.read_text())
  values["weight_map"]["lm_head.weight"] = name
  path.write_text(json.dumps(values))
  with pytest.raises(ConversionError, match=r"names the file .*; it must be in the same folder"):
    HuggingFaceFolder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_git_lfs_pointer_is_an_error_with_the_remedy(name: str, folder: Path) -> None:
  pointer = "version https://localhost/git-lfs/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
  (folder / name).write_text(pointer)
  with pytest.raises(ConversionError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
    HuggingFaceFolder(folder).tokenizer()


@pytest.mark.parametrize(
  ("header", "message"),
  [
    (b"[]", "holds a list; it must be an object"),
    (b"[" * 100_000, "is damaged"),
    (b'{"a": 1}', "tensor 'a' has no byte range"),
    (b'{"a": {"data_offsets": [0, 4.5]}}', "tensor 'a' has no byte range"),
    (b'{"a": {"data_offsets": [0, -1]}}', "tensor 'a' has no byte range"),
    (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}', "is damaged"),
    (b'{"a": {"dtype": "F32", "shape": [2, -1], "data_offsets": [0, 8]}}', "is damaged"),
    (b'{"a": {"dtype": "F32", "shape": [2, 1e99], "data_offsets": [0, 8]}}', "is damaged"),
    (
      (
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b' "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}'
      ),
      "is damaged",
    ),
    (
      b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 8], "data_offsets": [0, 0]}}',
      "is damaged",
    ),
  ],
)
def test_headers_that_are_refused(header: bytes, message: str, folder: Path) -> None:
  path = folder / "model.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
  with pytest.raises(ConversionError, match=message) as error:
    HuggingFaceFolder(folder)
  assert "model.safetensors" in str(error.value)


def test_a_header_length_beyond_the_file_is_an_error(folder: Path) -> None:
  path = folder / "model.safetensors"
  path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
  with pytest.raises(ConversionError, match="ends within its header"):
    HuggingFaceFolder(folder)

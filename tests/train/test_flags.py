"""The flag --config and its overrides accept every key of the dataclasses, with its type."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import app, flags

from dga_jax.config_dataclasses import known_keys
from train import flags as train_flags
from train.config import make_config, to_dict, TrainConfig
from train.flags import config_help, parse_flags, with_defaults

# ml_collections 1.1 loads config files with a deprecated function of importlib.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

MODEL = {
  "vocab_size": 300,
  "num_layers": 1,
  "embed_dim": 8,
  "num_heads": 2,
  "num_kv_heads": 1,
  "head_dim": 4,
  "mlp_dim": 8,
}

type Parse = Callable[..., TrainConfig]


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parse:
  """A function that parses overrides of a config file that sets only a model."""

  def run(*overrides: str, file: dict[str, Any] | None = None) -> TrainConfig:
    path = tmp_path / "config.py"
    path.write_text(
      "from ml_collections import ConfigDict\n\n\n"
      f"def get_config():\n  return ConfigDict({file or {'model': MODEL}!r})\n"
    )
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(app, "FLAGS", values)
    argv = ["train", f"--config={path}", *overrides]
    monkeypatch.setattr(sys, "argv", argv)
    holder = train_flags.define_config_flag(flag_values=values)
    parse_flags(argv)
    return make_config(holder.value)

  return run


def test_defaults_equal_those_of_the_dataclasses() -> None:
  assert make_config(with_defaults({"model": MODEL})) == make_config({"model": MODEL})


@pytest.mark.parametrize(
  ("override", "value"),
  [
    ("num_steps=2000", 2000),
    ("learning_rate=1", 1.0),
    ("distillation=0.5", 0.5),
    ("init_from=runs/a", "runs/a"),
    ("model.num_layers=3", 3),
    ("model.tie_embeddings=true", True),
    ("model.attention=dense", "dense"),
    ("model.dga.focal_per_block=4", 4),
    ("model.dga.cache_dtype=int8", "int8"),
    ("model.top_k_eviction.dense_prompt=true", True),
    ("data.train_files=('a.txt','b.txt')", ("a.txt", "b.txt")),
    ("data.max_documents=2", 2),
    ("data.recall.num_pairs=8", 8),
    ("mesh.tensor=2", 2),
    ("guard.spike_sigmas=5", 5.0),
    ("optimizer.b2=0.9", 0.9),
  ],
)
def test_an_override_of_a_key_that_the_file_does_not_set(
  override: str, value: Any, parse: Parse
) -> None:
  key = override.partition("=")[0]
  got: Any = to_dict(parse(f"--config.{override}"))
  for name in key.split("."):
    got = got[name]
  assert got == value
  assert type(got) is type(value)


def test_a_required_key_that_only_the_command_line_sets(parse: Parse) -> None:
  rest = {name: value for name, value in MODEL.items() if name != "mlp_dim"}
  assert parse("--config.model.mlp_dim=12", file={"model": rest}).model.mlp_dim == 12
  with pytest.raises(ValueError, match=r"config\.model\.mlp_dim is None; it must be an integer"):
    parse(file={"model": rest})


def test_an_optional_dataclass_that_the_file_sets(parse: Parse) -> None:
  model = {**MODEL, "rope_scaling": {"kind": "linear", "factor": 2.0}}
  config = parse("--config.model.rope_scaling.factor=4", file={"model": model})
  assert config.model.rope_scaling is not None
  assert config.model.rope_scaling.factor == 4.0


def test_an_unknown_key_in_the_file(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit):
    parse(file={"model": MODEL, "data": {"sequence_lenght": 3}})
  message = capsys.readouterr().err
  assert "'config.data.sequence_lenght'. Did you mean 'config.data.sequence_length'?" in message


def test_a_value_of_a_wrong_type_in_the_file(parse: Parse) -> None:
  with pytest.raises(ValueError, match=r"config\.num_steps is 1\.5; it must be an integer"):
    parse(file={"model": MODEL, "num_steps": 1.5})


def test_an_override_of_a_wrong_type(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit):
    parse("--config.num_steps=many")
  assert "config.num_steps=many" in capsys.readouterr().err


@pytest.fixture
def parse_config(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
  """Parses --config=PATH."""

  def run(path: str) -> None:
    values = flags.FlagValues()
    monkeypatch.setattr(app, "FLAGS", values)
    monkeypatch.setattr(flags, "FLAGS", values)
    argv = ["train", f"--config={path}"]
    monkeypatch.setattr(sys, "argv", argv)
    train_flags.define_config_flag(flag_values=values)
    parse_flags(argv)

  return run


@pytest.mark.parametrize(
  ("path", "hint"),
  [
    ("configs/quikstart.py", r"Did you mean configs/quickstart\.py\?"),
    ("quickstart", r"Did you mean configs/quickstart\.py\?"),
    ("configs/quikstart.py:small", r"Did you mean configs/quickstart\.py\?"),
    ("zzz.py", r"There are .*configs/smollm2_continued\.py, configs/smollm2_gates\.py\."),
    ("gs://bucket/quickstart.py", r"gs:// is not supported here"),
  ],
)
def test_a_config_file_that_is_missing(
  path: str,
  hint: str,
  parse_config: Callable[[str], None],
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.chdir(Path(__file__).parents[2])
  with pytest.raises(SystemExit):
    parse_config(path)
  message = capsys.readouterr().err
  assert re.search(hint, message)
  assert f"--config is '{path}'" in message


def test_outside_a_checkout(
  parse_config: Callable[[str], None],
  monkeypatch: pytest.MonkeyPatch,
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  (tmp_path / "unrelated.py").touch()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit):
    parse_config("zzz.py")
  assert "Run the command in a checkout" in capsys.readouterr().err


def test_help_lists_every_key_and_its_file() -> None:
  text = config_help()
  parts = [section.split("\n", 2) for section in text.split("\n\n")[1:]]
  shown = {
    f"{path}.{entry.split('=')[0]}" for path, _, entries in parts for entry in entries.split()
  }
  nested = {path for path, *_ in parts} - {"config"}
  assert shown | nested == {f"config.{key}" for key in known_keys(TrainConfig)}
  files = {path: file.strip() for path, file, _ in parts}
  assert files["config.data"] == "DataConfig in train/data/config.py"
  assert files["config"] == "TrainConfig in train/config.py"
  assert "num_steps=1000" in parts[0][2].split()
  assert max(map(len, text.splitlines())) <= 80

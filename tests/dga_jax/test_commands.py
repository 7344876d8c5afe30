"""The command line: help, wrong flags, missing extras and closed pipes, without importing jax."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dga_jax
from dga_jax import __main__ as commands
from dga_jax import unused_gpu
from dga_jax.checkpoint import CheckpointError
from dga_jax.command_line import exit_with, extra_with

ROOT = Path(__file__).parents[2]
HEAVY = ("jax", "flax", "orbax", "numpy.linalg", "matplotlib")


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
  """Runs Python code in a subprocess, which finally prints the heavy packages that it imported."""
  reports = f"""
import atexit, sys
atexit.register(lambda: print("imported:", *[m for m in {HEAVY} if m in sys.modules]))
"""
  return subprocess.run(
    [sys.executable, "-c", reports + code, *arguments],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


def dga(*arguments: str) -> subprocess.CompletedProcess[str]:
  return run("from dga_jax.__main__ import main\nmain()", *arguments)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("help",)])
def test_the_commands_are_listed(arguments: tuple[str, ...]) -> None:
  done = dga(*arguments)
  assert done.returncode == 0, done.stderr
  for name, command in commands.COMMANDS.items():
    assert f"  {name:14}{command.help}\n" in done.stdout
  assert done.stdout.endswith("imported:\n")


def test_the_module_is_the_command() -> None:
  done = subprocess.run(
    [sys.executable, "-m", "dga_jax", "--version"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == f"{dga_jax.__version__}\n"


@pytest.mark.parametrize("flag", ["--help", "--helpshort"])
@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_imports_no_heavy_package(name: str, flag: str) -> None:
  done = dga(name, flag)
  assert (done.returncode, done.stderr) == (0, "")
  assert "Flags, with their defaults" in done.stdout
  assert max(map(len, done.stdout.splitlines())) <= 80
  if name not in ("picture", "smollm2"):
    assert "--workdir" in done.stdout
  assert ("\n  --budgets\n" in done.stdout) == (name in ("generate", "serve", "evaluate"))
  lists_config_keys = (name, flag) == ("train", "--help")
  assert ("config.model.dga" in done.stdout) == lists_config_keys
  # Only the config's dataclasses, whose keys the trainer's --help lists, import jax.
  assert done.stdout.endswith("imported:\n") != lists_config_keys


def test_help_has_groups_defaults_and_values() -> None:
  text = dga("generate", "--help").stdout
  order = ("\nModel:\n  --workdir\n", "\nPrompts:\n  --prompt\n", "\nSound:\n", "\n  --seed=0\n")
  found = [text.index(part) for part in order]
  assert found == sorted(found)
  assert "  --[no]chat\n      Use the chat template of the model.\n" in text
  assert "or a GGUF file. (required)\n" in text
  assert "give the flag once for each question.\n" in text
  assert "(one of bfloat16, float16, float32)" in " ".join(text.split())
  assert "  --depths=0,0.25,0.5,0.75,1\n" in dga("evaluate", "--help").stdout


def test_a_usage_error_is_one_line() -> None:
  done = dga("generate", "--workdir=x")
  assert done.stderr.startswith("error: Give one of --prompt, ")
  assert done.stderr.endswith(" none given. --help lists the flags.\n")
  assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_an_unknown_flag_imports_no_heavy_package(name: str) -> None:
  flag = {"smollm2": "--prompt_token", "picture": "--outpt"}.get(name, "--workdr")
  done = dga(name, f"{flag}=3")
  assert done.returncode == 1
  assert f"Unknown command line flag '{flag[2:]}'. Did you mean: {flag[2:5]}" in done.stderr
  assert done.stdout.endswith("imported:\n")


def test_an_unknown_command_is_an_error() -> None:
  done = dga("genrate")
  assert done.returncode == 1
  assert "there is no command 'genrate'. Did you mean 'generate'?" in done.stderr
  assert "Usage: dga COMMAND" in done.stderr


def test_an_argument_that_is_not_a_flag_is_an_error() -> None:
  done = dga("generate", "--workdir=x", "--prompt=a", "b")
  assert done.returncode == 1
  assert "'b' is not a flag" in done.stderr


@pytest.mark.parametrize(
  ("name", "flags", "message"),
  [
    ("generate", [], "--context and --load_cache; none given."),
    ("generate", ["--prompt=a", "--interactive"], "--prompt and --interactive given."),
    ("generate", ["--prompt=a", "--keys=0.5", "--attention=dga"], "--keys with budgets alone"),
    ("generate", ["--prompt=a", "--question=b"], "--question needs --context or --load_cache"),
    ("generate", ["--load_cache=a.npz"], "these need --question"),
    ("generate", ["--prompt=a", "--save_cache=b"], "--save_cache stores the cache of --context"),
    ("generate", ["--context=a", "--question=b", "--save_cache=/"], "Is a directory: '/'"),
    ("generate", ["--prompt=a", "--system=b"], "give --chat or --interactive as well"),
    ("generate", ["--context=nowhere.txt", "--question=b"], "error: [Errno 2] No such file"),
    ("generate", ["--interactive", "--jsonl"], "--jsonl has no effect with --interactive"),
    ("generate", ["--context=a", "--question=b", "--slots=2"], "--slots has no effect with"),
    ("generate", ["--prompt=a", "--seconds=2"], "--seconds has no effect with a text"),
    ("convert", [], "Give one of --source"),
    ("evaluate", ["--task=perplexity"], "--task=perplexity needs --documents"),
    ("evaluate", ["--task=longbench"], "--task=longbench needs --longbench"),
    ("evaluate", ["--task=perplexity", "--documents=a", "--lengths=2k"], "--lengths is 2k"),
    ("evaluate", ["--task=perplexity", "--documents=a", "--lengths=0"], "--lengths is 0"),
    ("evaluate", ["--task=perplexity", "--documents=a", "--lengths="], "--lengths is empty"),
    ("evaluate", ["--task=retrieval", "--documents=a", "--depths=0,50"], "--depths is 0,50"),
    ("evaluate", ["--task=retrieval", "--documents=a", "--puzzles=pas"], "--puzzles has 'pas'"),
    ("calibrate", ["--output=b.json"], "dga calibrate needs --documents"),
    ("calibrate", ["--output=b", "--documents=a", "--keys=0"], "--keys is 0"),
    ("calibrate", ["--output=b", "--documents=a", "--blocks=30"], "--blocks has '30'; write m+f"),
    ("calibrate", ["--output=b", "--documents=a", "--shares=2"], "--shares is 2"),
    ("calibrate", ["--output=b", "--documents=a", "--puzzles=pas"], "--puzzles has 'pas'"),
    ("fit_selector", ["--output=b"], "dga fit_selector needs --documents"),
    ("generate", ["--prompt_file=nowhere.txt"], "error: [Errno 2] No such file"),
    ("generate", ["--prompt=a"], "There is no checkpoint, Hugging Face folder or GGUF file at x."),
    ("generate", ["--prompt=a", "--workdir=a/b"], "hf download a/b --local-dir b"),
    ("convert", ["--source=a/b"], "hf download a/b --local-dir b"),
  ],
)
def test_flags_are_checked_before_heavy_imports(name: str, flags: list[str], message: str) -> None:
  done = dga(name, "--workdir=x", *flags)
  assert done.returncode == 1
  assert message in done.stderr + done.stdout
  assert "Traceback" not in done.stderr
  assert done.stdout.endswith("imported:\n")


def test_training_outside_a_checkout(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setattr(commands, "__file__", str(tmp_path / "dga_jax" / "__main__.py"))
  monkeypatch.setattr(sys, "argv", ["dga", "train", "--config=c.py"])
  with pytest.raises(SystemExit, match=r"training runs from a checkout(.|\n)*pip install -e"):
    commands.main()
  monkeypatch.setattr(sys, "argv", ["dga", "train", "--help"])
  commands.main()
  assert "training runs from a checkout" in capsys.readouterr().out


def test_a_missing_extra_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
  requirements = [
    "numpy>=2",
    "gguf>=0.19; extra == 'convert'",
    'ml-collections>=1.1; extra == "train"',
  ]
  monkeypatch.setattr(importlib.metadata, "requires", lambda _: requirements)
  assert extra_with("gguf.quants") == "convert"
  assert extra_with("ml_collections") == "train"
  assert extra_with("numpy") is None
  with pytest.raises(SystemExit, match=r'pip install "dga-jax\[convert\]"'):
    exit_with(ModuleNotFoundError("No module named 'gguf'", name="gguf"))
  with pytest.raises(ModuleNotFoundError, match=r"dga_jax\.typo"):
    exit_with(ModuleNotFoundError("No module named 'dga_jax.typo'", name="dga_jax.typo"))


def test_help_of_a_command_whose_extra_is_missing(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  def missing(*_: object, **__: object) -> None:
    raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

  monkeypatch.setattr(commands.runpy, "run_module", missing)
  commands.run("dga_jax.convert", ["--help"])
  assert 'pip install "dga-jax[convert]"' in capsys.readouterr().out
  with pytest.raises(SystemExit, match=r'error: .*pip install "dga-jax\[convert\]"'):
    commands.run("dga_jax.convert", ["--source=a"])


@pytest.mark.parametrize(
  ("devices", "plugin", "platforms", "notes"),
  [
    (["nvidia0"], None, "", True),
    (["nvidia0"], "jax_cuda13_plugin", "", False),
    (["nvidia0"], None, "cpu", False),
    (["nvidiactl", "null"], None, "", False),
  ],
)
def test_a_gpu_that_jax_does_not_use(
  devices: list[str],
  plugin: str | None,
  platforms: str,
  notes: bool,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  for name in devices:
    (tmp_path / name).touch()
  monkeypatch.setattr(unused_gpu, "_DEVICES", tmp_path)
  monkeypatch.setattr(
    unused_gpu.importlib.util, "find_spec", lambda name: name if name == plugin else None
  )
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  unused_gpu.warn_about_unused_gpu()
  printed = capsys.readouterr()
  assert printed.out == ""
  assert ('pip install "dga-jax[gpu]"' in printed.err) == notes
  assert printed.err == "" or notes


def test_every_extra_that_a_command_needs_is_declared() -> None:
  assert extra_with("gguf") == extra_with("safetensors") == "convert"
  assert extra_with("matplotlib") == "evaluate"
  assert extra_with("ml_collections") == "train"


@pytest.mark.parametrize("file", ["calibrate.py", "train/main.py", "train/main"])
def test_the_extra_of_the_running_command_comes_first(
  file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(sys, "argv", [f"/evaluate/audio/{file}"])
  extra = file.partition("/")[0].removesuffix(".py")
  assert extra_with("optax") == extra_with("matplotlib") == extra


@pytest.mark.parametrize(
  "error", [ValueError("v"), OSError("v"), FloatingPointError("v"), CheckpointError("v")]
)
def test_errors_that_a_user_can_correct_are_one_line(error: Exception) -> None:
  with pytest.raises(SystemExit, match=r"^error: v$"):
    exit_with(error)


@pytest.mark.parametrize("error", [RuntimeError("v"), TypeError("v"), KeyError("v")])
def test_other_errors_are_raised(error: Exception) -> None:
  with pytest.raises(type(error)):
    exit_with(error)


def test_an_interrupted_command_prints_no_traceback() -> None:
  done = run(
    "from dga_jax import command_line\n\ndef main():\n  raise KeyboardInterrupt\n\n"
    "command_line.run(main)"
  )
  assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_interrupt_that_python_ignores_is_repeated() -> None:
  done = run(
    "import signal, time\nfrom dga_jax import command_line\n\n"
    # A shell starts programs in the background with SIGINT ignored.
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n\n"
    "class Ignoring:\n  def __del__(self):\n"
    "    raise KeyboardInterrupt\n\ndef main():\n  Ignoring()\n  time.sleep(60)\n\n"
    "command_line.run(main)"
  )
  assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_closed_pipe_ends_the_command_quietly(tmp_path: Path) -> None:
  script = tmp_path / "many_lines.py"
  script.write_text(
    "from dga_jax import command_line\n\n\n"
    "def main():\n  for i in range(100_000):\n    print(i)\n\n\ncommand_line.run(main)\n"
  )
  listed = f"{{ sleep 0.1; '{sys.executable}' -m dga_jax; }} | true; echo ${{PIPESTATUS[0]}}"
  command = f"{listed}; '{sys.executable}' '{script}' | head -n 2; echo ${{PIPESTATUS[0]}}"
  done = subprocess.run(
    ["bash", "-c", command],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.split() == ["1", "0", "1", "1"]
  assert done.stderr == ""

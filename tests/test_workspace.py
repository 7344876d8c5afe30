"""The script `workspace` on simulated machines that lack tools, without downloads."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = "awk basename bash cat cp df dirname env flock grep mkdir rm sed sleep tail tee"


class Machine:
  """A copy of the script, and a PATH with a few tools and the commands that a test adds."""

  def __init__(self, root: Path) -> None:
    self.checkout, self.bin = root / "a checkout", root / "bin"
    self.checkout.mkdir()
    self.bin.mkdir()
    for name in ("workspace", "requirements.txt", "requirements-aot.txt", "pyproject.toml"):
      shutil.copy(ROOT / name, self.checkout / name)
    for tool in TOOLS.split():
      if path := shutil.which(tool):
        (self.bin / tool).symlink_to(path)

  def add(self, name: str, script: str) -> Path:
    """Adds a command to PATH."""
    path = self.bin / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path

  def add_python(self, name: str, version: str = "3.12") -> Path:
    """Adds a fake Python of that version to PATH. It creates environments and runs fake-pip."""
    minor = version.split(".")[1]
    return self.add(
      name,
      f"""case "$*" in
        *'version_info[:2]'*) echo {version} ;;
        *'print(sys.version)'*) echo {version} ;;
        '- '*) '{sys.executable}' "$@" && echo {version} ;;
        *'version_info <'*) [ {minor} -ge 12 ] ;;
        *'-m venv --clear'*)
          rm -rf "${{@: -1}}" && mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
        *'-m pip install'*) '{self.bin}/fake-pip' "$@" ;;
        *'-m pip --version'*) [ -e '{self.bin}/fake-pip' ] ;;
        *'-m '*) echo "ran $*" ;;
        --version) echo Python {version} ;;
        *) '{sys.executable}' "$@" ;;
      esac""",
    )

  def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Starts the script on this machine."""
    return subprocess.Popen(
      [str(self.bin / "bash"), str(self.checkout / "workspace"), *arguments],
      env={"PATH": str(self.bin), "HOME": str(self.checkout)} | variables,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the script on this machine to its end."""
    with self.start(*arguments, **variables) as process:
      stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
  return Machine(tmp_path)


@pytest.mark.parametrize("flag", ["help", "--help", "-h"])
def test_help_needs_no_python(machine: Machine, flag: str) -> None:
  done = machine.run(flag)
  assert done.returncode == 0
  assert done.stdout.startswith("Usage: ./workspace COMMAND")


@pytest.mark.parametrize("arguments", [(), ("tset",)])
def test_an_unknown_command_gets_the_usage(machine: Machine, arguments: tuple[str, ...]) -> None:
  done = machine.run(*arguments)
  assert done.returncode == 2
  assert "Usage: ./workspace COMMAND" in done.stderr
  assert all(f"unknown command: {name}" in done.stderr for name in arguments)


@pytest.mark.parametrize(
  "command", ["setup", "quickstart", "smollm2", "serve", "test", "test-aot", "test-wheel", "lint"]
)
def test_a_missing_python_is_an_error_with_remedies(machine: Machine, command: str) -> None:
  done = machine.run(command)
  assert done.returncode == 1
  assert "no Python 3.12 or newer was found" in done.stderr
  assert "pyenv install 3.12" in done.stderr
  assert f"PYTHON=/path/to/python ./workspace {command}" in done.stderr


def test_unsuitable_pythons_are_listed_with_the_reason(machine: Machine) -> None:
  machine.add_python("python3", "3.11")
  machine.add("python3.12", "exit 127")
  done = machine.run("setup")
  assert done.returncode == 1
  assert f"{machine.bin}/python3 is 3.11" in done.stderr
  assert f"{machine.bin}/python3.12 does not run" in done.stderr
  assert not (machine.checkout / ".venv").exists()


@pytest.mark.parametrize("python", ["no-such-python", "python3"])
def test_an_unsuitable_python_in_the_variable_is_an_error(machine: Machine, python: str) -> None:
  machine.add_python("python3", "3.11")
  machine.add_python("python3.12")
  done = machine.run("setup", PYTHON=python)
  assert done.returncode == 1
  assert f"PYTHON={python}" in done.stderr
  assert "3.12 or newer is needed" in done.stderr


def test_pyenv_is_searched_beyond_its_failing_commands(machine: Machine) -> None:
  machine.add("python3.12", "exit 127")
  machine.add_python("../pyenv/versions/3.13.0/bin/python3", "3.13")
  machine.add("fake-pip", "exit 0")
  done = machine.run("setup", PYENV_ROOT=str(machine.bin.parent / "pyenv"))
  assert done.returncode == 0, done.stderr
  assert "Python 3.13 (" in done.stdout


@pytest.mark.parametrize("changed", ["requirements.txt", "pyproject.toml"])
def test_set_up_happens_once_and_again_when_requirements_change(
  changed: str, machine: Machine
) -> None:
  machine.add_python("python3.12")
  machine.add("fake-pip", "exit 0")
  first, second = machine.run("test", "-k", "cache"), machine.run("test")
  assert "set-up done" in first.stdout
  assert "ran -m pytest -n 2 --dist worksteal -k cache" in first.stdout
  assert "set-up" not in second.stdout

  of_the_user = machine.checkout / ".venv" / "more-packages"
  of_the_user.touch()
  requirements = machine.checkout / changed
  requirements.write_text(requirements.read_text() + "# another package\n")
  assert "set-up done" in machine.run("test").stdout
  assert of_the_user.exists()


def test_libtpu_is_installed_once_and_only_for_test_aot(machine: Machine) -> None:
  machine.add_python("python3.12")
  machine.add("fake-pip", 'echo pip $* >>"$HOME/pip-calls"')
  calls = machine.checkout / "pip-calls"
  machine.run("test")
  assert "requirements-aot.txt" not in calls.read_text()
  first, second = machine.run("test-aot", "-k", "decode"), machine.run("test-aot")
  assert "ran -m pytest -n 2 --dist worksteal -m aot -k decode" in first.stdout
  assert "libtpu" in first.stdout
  assert "libtpu" not in second.stdout
  assert calls.read_text().count("requirements-aot.txt") == 1


def test_the_command_test_wheel_runs_the_tests_of_the_wheel(machine: Machine) -> None:
  machine.add_python("python3.12")
  machine.add("fake-pip", "exit 0")
  assert "ran -m pytest -m wheel -x tests/test_wheel.py" in machine.run("test-wheel", "-x").stdout


def test_another_python_makes_another_environment(machine: Machine) -> None:
  for version in ("3.12", "3.13"):
    machine.add_python(f"python{version}", version)
  machine.add("fake-pip", "exit 0")
  machine.run("setup")
  assert "with Python 3.13" in machine.run("setup", PYTHON="python3.13").stdout


def test_an_interrupted_set_up_restarts_with_a_new_environment(machine: Machine) -> None:
  machine.add_python("python3.12")
  machine.add("fake-pip", "kill -KILL $$")
  assert machine.run("test").returncode == 1
  half_installed = machine.checkout / ".venv" / "half-installed"
  half_installed.touch()
  machine.add("fake-pip", "exit 0")
  assert "set-up done" in machine.run("test").stdout
  assert not half_installed.exists()


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock on this system")
def test_simultaneous_set_ups_install_once(machine: Machine) -> None:
  machine.add_python("python3.12")
  machine.add("fake-pip", "sleep 0.3")
  processes = [machine.start("test") for _ in range(2)]
  outputs = [process.communicate(timeout=60)[0] for process in processes]
  assert sorted("set-up done" in output for output in outputs) == [False, True]
  assert all("ran -m pytest" in output for output in outputs)


@pytest.mark.parametrize(
  ("message", "explanation"),
  [
    ("ERROR: Could not find a version that satisfies jax", "package registry did not serve"),
    ("NewConnectionError: Temporary failure in name resolution", "Check the network"),
    ("OSError: [Errno 28] No space left on device", "disk is full"),
    ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "differs from requirements.txt"),
  ],
)
def test_a_failure_of_pip_is_explained(machine: Machine, message: str, explanation: str) -> None:
  machine.add_python("python3.12")
  machine.add("fake-pip", f"echo '{message}'; exit 1")
  done = machine.run("lint")
  assert done.returncode == 1
  assert message in done.stderr
  assert explanation in done.stderr
  assert "ran -m" not in done.stdout


def test_a_full_disk_is_an_error_before_files_are_written(machine: Machine) -> None:
  machine.add_python("python3.12")
  (machine.bin / "df").unlink()
  machine.add("df", "echo head; echo 'disk 100 90 10 90% /'")
  done = machine.run("setup")
  assert done.returncode == 1
  assert "has 10 MB of free disk" in done.stderr
  assert not (machine.checkout / ".venv").exists()


def test_bench_lists_the_benchmarks_without_set_up(machine: Machine) -> None:
  folder = machine.checkout / "benchmarks"
  folder.mkdir()
  (folder / "__init__.py").touch()
  (folder / "cache.py").write_text('r"""Bytes of each cache."""\nif __name__ == "__main__":\n')
  (folder / "timing.py").write_text('"""Helpers of the others."""\n')
  listed, unknown = machine.run("bench"), machine.run("bench", "cahce")
  assert listed.returncode == 0
  assert listed.stdout.split() == ["Benchmarks:", "cache", "Bytes", "of", "each", "cache."]
  assert unknown.returncode == 1
  assert "no benchmarks/cahce.py" in unknown.stderr

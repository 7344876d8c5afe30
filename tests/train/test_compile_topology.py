"""Compiling a training step for TPUs without the hardware, and the error without libtpu."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dga_jax import DGAConfig
from dga_jax.sharding import MeshConfig
from tests.nightly import nightly
from train.aot_compile import compile_step
from train.config import TrainConfig

ROOT = Path(__file__).parents[2]


def test_a_missing_compiler_is_an_error(
  config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(RuntimeError, match=r'pip install "jax\[tpu\]"'):
    compile_step(config, "v5e:2x2")


@pytest.mark.aot
def test_report(config: TrainConfig, config_file: Path) -> None:
  command = [sys.executable, "-m", "train.compile_topology", f"--config={config_file}"]
  command += ["--topology=v5e:2x2", "--config.mesh.fsdp=2", "--config.mesh.data=2"]
  command += ["--config.grad_accumulation=1"]
  done = subprocess.run(
    command, check=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True
  )
  report = done.stdout.decode()
  assert report.startswith("4 chips of TPU v5 lite, mesh data=2 x fsdp=2;")
  assert "all-gather" in report
  assert "of 16 GB" in report


@pytest.mark.aot
def test_a_step_that_exceeds_the_memory_is_reported(config: TrainConfig) -> None:
  with pytest.raises(ValueError, match="--topology=v5e:3x7 is unknown to the compiler"):
    compile_step(config, "v5e:3x7")
  config = dataclasses.replace(config, batch_size=6)
  with pytest.raises(ValueError, match=r"config\.batch_size is 6"):
    compile_step(config, "v5e:2x2")


@pytest.mark.aot
@pytest.mark.parametrize("context", [*nightly(1), 2])
def test_the_step_on_a_mesh_contains_the_kernels(context: int, config: TrainConfig) -> None:
  dga = DGAConfig(selection="streaming", min_focal_tokens=64, max_documents=2)
  model = dataclasses.replace(
    config.model, attention="dga", dga=dga, num_heads=4, num_kv_heads=2, head_dim=128
  )
  config = dataclasses.replace(
    config,
    model=model,
    mesh=MeshConfig(data=1, fsdp=2 // context, tensor=2, context=context),
    data=dataclasses.replace(config.data, sequence_length=2048),
    grad_accumulation=1,
  )
  _, program = compile_step(config, "v5e:2x2")
  kernels = set(re.findall(r"%([a-z_]+)[.\d]* = .*tpu_custom_call", program))
  parts = ("forward", "dq", "dkdv_summaries", "dkdv_window")
  assert kernels >= {f"grouped_attention_{part}" for part in parts}

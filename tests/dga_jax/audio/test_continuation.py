"""`dga generate --prompt_audio` end to end: a file in, a file that continues it, a picture."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx
from PIL import Image

from dga_jax.audio.continuation import continue_sound
from dga_jax.audio.files import read_audio
from dga_jax.audio.tokens import audio_tokenizer, tokens_to_samples
from dga_jax.checkpoint import Checkpoints, load_model
from dga_jax.generation import Sampling
from dga_jax.model import Decoder
from dga_jax.tokenizer import Tokenizer
from tests.dga_jax.tiny_checkpoint import CONFIG, make_params

ROOT = Path(__file__).parents[3]
RATE = 4000


def save(workdir: Path, *, kind: str = "audio") -> None:
  with Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(
      1,
      params=make_params(),
      training={"step": jnp.int32(1)},
      data={"next_index": 1},
      config={"model": CONFIG.to_dict(), "data": {"kind": kind, "audio": {"sample_rate": RATE}}},
      tokenizer=audio_tokenizer(),
      eval_loss=None,
    )


def generate(workdir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "dga_jax", "generate", f"--workdir={workdir}", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
  path = tmp_path / "in.wav"
  seconds = np.arange(8000) / 16_000
  soundfile.write(path, 0.3 * np.sin(2 * np.pi * 300 * seconds), 16_000)
  return path


def test_a_file_is_continued_and_plotted(tmp_path: Path, prompt: Path) -> None:
  save(tmp_path / "run")
  out, picture = tmp_path / "out.wav", tmp_path / "out.png"
  done = generate(
    tmp_path / "run",
    f"--prompt_audio={prompt}",
    f"--output_audio={out}",
    "--prompt_seconds=0.25",
    "--seconds=0.01",
    f"--spectrogram={picture}",
    "--seed=3",
  )
  assert done.returncode == 0, done.stderr
  info = soundfile.info(out)
  assert (info.samplerate, info.channels, info.frames) == (RATE, 1, 40)
  model, *_ = load_model(tmp_path / "run")
  # Sound is sampled from the whole distribution: a bound on the probability never ends a pause.
  sampling = Sampling(temperature=1.0, top_p=1.0, seed=3)
  want = continue_sound(
    model, audio_tokenizer(), read_audio(prompt, RATE)[-1000:], 40, sampling
  ).samples
  np.testing.assert_allclose(soundfile.read(out)[0], want, atol=2.0**-15)
  with Image.open(picture) as image:
    assert min(image.size) > 400
  assert "cache" in done.stderr
  assert "prompt: RMS -13.5 dB, peak 0.30" in done.stderr
  assert "continuation: RMS" in done.stderr
  assert not done.stdout


def test_a_model_of_text_is_refused(tmp_path: Path, prompt: Path) -> None:
  save(tmp_path / "run", kind="text")
  done = generate(
    tmp_path / "run", f"--prompt_audio={prompt}", f"--output_audio={tmp_path / 'out.wav'}"
  )
  assert done.returncode == 1
  assert "was not trained on sound" in done.stderr
  assert not (tmp_path / "out.wav").exists()


def test_a_tokenizer_of_text_is_refused() -> None:
  with pytest.raises(ValueError, match="trained on other data"):
    continue_sound(
      Decoder(CONFIG, rngs=nnx.Rngs(0)), Tokenizer.byte_level(), np.zeros(3), 1, Sampling()
    )


def test_flags_that_need_each_other(tmp_path: Path) -> None:
  done = generate(tmp_path, "--prompt_audio=in.wav")
  assert done.returncode == 1
  assert "--prompt_audio and --output_audio need each other" in done.stdout + done.stderr


def test_tokens_of_the_model_are_samples() -> None:
  assert tokens_to_samples(np.array([1, 256])).tolist() == [-1, 1]

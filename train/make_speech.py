r"""Makes a corpus of speech: espeak-ng reads texts in several voices.

  apt-get install espeak-ng
  python -m train.make_speech --texts="books/*.txt" --output=speech --minutes=60

speech/train and speech/held_out get WAV files of one paragraph each. A held-out file has a voice
and a text that no training file has. configs/audio.py trains on this folder.
"""

import shutil
import sys
from pathlib import Path

from absl import app, flags

from dga_jax.files.path_flags import define_path
from train.data.files import find_files
from train.data.speech import make_corpus
from train.flags import parse_flags

_TEXTS = flags.DEFINE_string("texts", None, "Text files to read, a path or glob pattern.")
_OUTPUT = define_path("output", "speech", "Folder for the WAV files. It must not exist.")
_MINUTES = flags.DEFINE_float("minutes", 60.0, "Minutes of training speech.", lower_bound=0.1)
_HELD_OUT_MINUTES = flags.DEFINE_float(
  "held_out_minutes", 4.0, "Minutes of held-out speech.", lower_bound=0.1
)


def main(argv: list[str]) -> None:
  """Makes the corpus by the flags."""
  del argv
  output = Path(_OUTPUT.value)
  if shutil.which("espeak-ng") is None:
    sys.exit("error: espeak-ng is not installed. On Debian and Ubuntu: apt-get install espeak-ng")
  if output.exists():
    sys.exit(f"error: --output is {output}, which exists. Name another folder or delete it.")
  try:
    make_corpus(
      find_files((str(_TEXTS.value),)),
      output,
      minutes=_MINUTES.value,
      held_out_minutes=_HELD_OUT_MINUTES.value,
    )
  except (OSError, ValueError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  flags.mark_flag_as_required("texts")
  app.run(main, flags_parser=parse_flags)

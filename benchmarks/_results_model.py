"""A folder of results belongs to one model."""

from pathlib import Path

from dga_jax.calibration.fingerprint import describe_model
from dga_jax.calibration.measuring import open_results
from dga_jax.model import Decoder


def require_model(out: Path, model: Decoder, name: str = "model") -> None:
  """Records the model in OUT/NAME.jsonl, or checks that it is the recorded one.

  Results name variants and lengths, and not the weights that they were measured with.

  Args:
    out: folder of the results.
    model: that the next results are of.
    name: of the record.

  Raises:
    ValueError: the folder has results of a model with other weights.
  """
  open_results(out / f"{name}.jsonl", describe_model(model), "--out")

"""The model and the texts of benchmarks/paper.py."""

import dataclasses
import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from benchmarks._results_model import require_model
from benchmarks.paper_parts.pretraining import Pretraining
from dga_jax import smollm2_demo
from dga_jax.checkpoint import load_model
from dga_jax.choices import DtypeName
from dga_jax.evaluation.ruler import RulerTexts
from dga_jax.evaluation.texts import Document, read_documents, token_rows
from dga_jax.evaluation.variants import Family, Variant
from dga_jax.model import Decoder
from dga_jax.tokenizer import Tokenizer
from train.stop_signals import StopSignals

_PYTHON_CHARACTERS = 300_000  # Of each of the two documents of Python source.
_HAY_CHARACTERS = 400_000  # Of each book in which facts are hidden.
_CHARACTERS_PER_TOKEN = 12  # More than a text of any corpus has on average.


@dataclasses.dataclass(frozen=True)
class Ablation:
  """What the part "ablations" measures.

  Attributes:
    length: tokens of a row.
    latency_batch: sequences that are decoded at once to measure times; None measures none.
    models: workdirs of models with the tokenizer of the model of `Inputs`, such as runs of
      continued pretraining; the settings of each are measured. None of them is the model of
      `Inputs` alone.
  """

  length: int = 2048
  latency_batch: int | None = None
  models: tuple[str, ...] = ()


class Inputs:
  """Loads the model and the texts when a part first needs them.

  Args:
    workdir: checkpoint of the model; None for SmolLM2-135M-Instruct, which is downloaded.
    documents: files of novels, see `read_documents`; may be empty.
    max_documents: novels to use.
    pretraining: the runs of continued pretraining; None for none.
    ablation: what the part "ablations" measures.
    dtype: of the activations.
    budgets: JSON files of calibrated budgets of the model.
    signals: stop a run of continued pretraining after a step that is saved; None where nothing
      handles signals.
    out: folder of the results, which are of these models alone; None for a model that nobody
      compares with a recorded one.
  """

  def __init__(
    self,
    workdir: str | None,
    documents: Sequence[str],
    max_documents: int = 2,
    pretraining: Pretraining | None = None,
    ablation: Ablation | None = None,
    dtype: DtypeName = "float32",
    budgets: Sequence[str] = (),
    signals: StopSignals | None = None,
    out: Path | None = None,
  ) -> None:
    self._workdir, self._documents, self._max_documents = workdir, documents, max_documents
    self.pretraining, self.ablation = pretraining, ablation or Ablation()
    self._dtype, self.budgets = dtype, tuple(budgets)
    self.signals, self._out = signals, out
    self._trained: tuple[str, Family] | None = None

  @functools.cached_property
  def workdir(self) -> str:
    """The folder of the model's checkpoint."""
    return str(self._workdir or smollm2_demo.prepare(smollm2_demo.cache_folder()))

  @property
  def tokenizer(self) -> Tokenizer:
    """Of the model."""
    return self._loaded[1]

  @functools.cached_property
  def family(self) -> Family:
    """The model with the dtype of the activations."""
    return self._dense_family(*self._loaded)

  def trained_family(self, workdir: str) -> Family:
    """The newest model of a workdir with dense attention and the dtype of the activations.

    Only the last one is kept.
    """
    if self._trained is None or self._trained[0] != workdir:
      self._trained = None  # Frees the memory of the model before.
      model, tokenizer = self._load(workdir, f"{Path(workdir).name}.model")
      self._trained = (workdir, self._dense_family(model, tokenizer))
    return self._trained[1]

  def _dense_family(self, model: Decoder, tokenizer: Tokenizer) -> Family:
    dense = Variant("dense", {"attention": "dense", "dtype": self._dtype})
    return Family(Family(model).model(dense, 1), tokenizer.start_ids)

  @functools.cached_property
  def model(self) -> Decoder:
    """The model with dense attention."""
    return self.family.model(Variant("dense", {"attention": "dense"}), 1)

  @functools.cached_property
  def corpora(self) -> dict[str, list[Document]]:
    """Documents by corpus: "novels" where --documents is given, and "Python"."""
    corpora = {}
    if self._documents:
      corpora["novels"] = read_documents(self._documents)[: self._max_documents]
    return corpora | {"Python": python_source()}

  @property
  def books(self) -> str:
    """The name of the first corpus."""
    return next(iter(self.corpora))

  @functools.cached_property
  def ruler_texts(self) -> RulerTexts:
    """The beginnings of the documents of the first corpus, in which facts are hidden."""
    texts = [document.text[:_HAY_CHARACTERS] for document in self.corpora[self.books]]
    return RulerTexts(texts, self.tokenizer)

  def rows(self, corpus: str, length: int, rows_per_document: int) -> Int[np.ndarray, "B T"]:
    """Rows of `length` inputs and their next tokens from the beginnings of documents.

    Args:
      corpus: a key of `corpora`.
      length: inputs of a row.
      rows_per_document: see `token_rows`.
    """
    # Encoding a whole novel takes longer than some of the measurements.
    most = _CHARACTERS_PER_TOKEN * (length + 1) * rows_per_document
    documents = [Document(one.id, one.text[:most]) for one in self.corpora[corpus]]
    return token_rows(documents, self._loaded[1], length, rows_per_document)

  @functools.cached_property
  def _loaded(self) -> tuple[Decoder, Tokenizer]:
    return self._load(self.workdir, "model")

  def _load(self, workdir: str, record: str) -> tuple[Decoder, Tokenizer]:
    model, _, tokenizer = load_model(workdir)
    if self._out is not None:
      require_model(self._out, model, record)
    return model, tokenizer


def python_source() -> list[Document]:
  """Two documents of the running Python's library: its modules in alphabetical order, in turn."""
  files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
  texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
  return [
    Document(f"Python library {start}", "\n".join(texts[start::2])[:_PYTHON_CHARACTERS])
    for start in range(2)
  ]


def rounded(values: Float[np.ndarray, "*S"], digits: int = 5) -> list:
  """The values as nested lists, rounded for a file of results."""
  lists: list = np.round(np.asarray(values, np.float64), digits).tolist()
  return lists

"""Packages that extras install: each is imported when it is first used, and an error says how to install it.

`pip install declip_jax` without extras suffices to load weights, encode, evaluate, search, export and report; the extra
`train` adds what training and the other data sources need. Modules import these packages from here, as in
`from declip_jax.extras import grain`, and never by themselves.
"""

import importlib
import importlib.util
from pathlib import Path
import shlex
from types import ModuleType
from typing import TYPE_CHECKING, Any

# The extra of each package; setup.py has their versions.
EXTRAS = {
  "array_record": "train",
  "grain": "train",
  "importlib_resources": "train",
  "pyarrow": "train",
  "tensorflow_datasets": "train",
  "datasets": "huggingface",
  "huggingface_hub": "hub",
  "onnx": "onnx",
  "sentencepiece": "tokenizers",
  "tokenizers": "tokenizers",
  "usearch": "search",
  "gcsfs": "gcs",
  "s3fs": "s3",
  "aiohttp": "https",
  "libtpu": "tpu",
  "wandb": "wandb",
  "mlflow": "mlflow",
  "trackio": "trackio",
}


def install_command(extra: str) -> str:
  """The command that installs an extra: of the checkout that this file belongs to, else of the installed package."""
  checkout = Path(__file__).resolve().parents[1]
  if (checkout / "setup.py").is_file():
    return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
  return f"pip install 'declip_jax[{extra}]'"


def import_package(name: str) -> ModuleType:
  """Imports a module of one of the packages in `EXTRAS`.

  Raises:
    ModuleNotFoundError: the package, or one in `EXTRAS` that it imports, is not installed; the message has the command.
  """
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    package = (error.name or name).partition(".")[0]
    if package not in EXTRAS:
      raise
    how = install_command(EXTRAS[package])
    raise ModuleNotFoundError(f"{package} is not installed: {how}", name=package) from None


def is_installed(package: str) -> bool:
  """Whether a package can be imported; a folder of its name, such as that of W&B's files, is not the package."""
  try:
    found = importlib.util.find_spec(package)
  except ValueError:  # it is None in sys.modules
    return False
  return found is not None and found.origin is not None


class _Lazy:
  """A module of such a package, which is imported when one of its names is first looked up."""

  def __init__(self, name: str):
    self._name = name

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__"):  # of tools that look at all objects, such as doctest and inspect
      raise AttributeError(name)
    return getattr(import_package(self._name), name)


if TYPE_CHECKING:
  from array_record.python import array_record_module
  import datasets
  import grain
  import pyarrow
  from pyarrow import compute as pyarrow_compute
  from pyarrow import parquet as pyarrow_parquet
  import sentencepiece
  import tensorflow_datasets
  import tokenizers
else:
  array_record_module = _Lazy("array_record.python.array_record_module")
  datasets = _Lazy("datasets")
  grain = _Lazy("grain")
  pyarrow = _Lazy("pyarrow")
  pyarrow_compute = _Lazy("pyarrow.compute")
  pyarrow_parquet = _Lazy("pyarrow.parquet")
  sentencepiece = _Lazy("sentencepiece")
  tensorflow_datasets = _Lazy("tensorflow_datasets")
  tokenizers = _Lazy("tokenizers")
onnx: Any = _Lazy("onnx")
usearch_index: Any = _Lazy("usearch.index")

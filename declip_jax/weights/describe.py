"""What weights are, for a config that is made for them: their model and preprocessing, without their arrays."""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any, NamedTuple

from declip_jax import config as config_lib
from declip_jax.data.images import EvalView
from declip_jax.objectives import make_objective
from declip_jax.weights import hub
from declip_jax.weights.folders import EXPORT_FILE
from declip_jax.weights.layout import ModelFields
from declip_jax.weights.read import read, read_about_export, run_of, view_of, view_of_export
from declip_jax.weights.settings import VIEW, with_fields, with_view


class Description(NamedTuple):
  """A model without its arrays; the fields are those of `weights.read.Weights`."""

  origin: str
  model: ModelFields
  heads: tuple[str, ...]
  view: EvalView
  tokens: bool


def describe(path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> Description:
  """Describes any weights that `weights.read.read` reads.

  Of a run and of an export only JSON is read, so that no process of several starts JAX's backend before it has joined
  the others. Other files are read in full, since their tensors say what they are.

  Args:
    path: see `read`.
    settings: see `read`.

  Raises:
    FileNotFoundError, OSError, ValueError: see `read`.
  """
  settings = dict(settings or {})
  folder = hub.download(path) if hub.is_address(os.fspath(path)) else Path(path)
  run = run_of(folder)
  if run:
    settings.pop("average", None)  # which weights are read, not what they are
    found = _of_run(run)
  elif (folder / EXPORT_FILE).exists():
    about = read_about_export(folder)
    found = Description(about["origin"], about["model"], about["heads"], view_of_export(about), about["tokens"])
  else:
    weights = read(folder, settings)
    return Description(weights.origin, weights.model, weights.heads, weights.view, weights.tokens)
  model = with_fields(found.model, {field: x for field, x in settings.items() if field not in VIEW}, str(path))
  return found._replace(model=model, view=with_view(found.view, settings, model, str(path)))


def _of_run(run: Path) -> Description:
  """Describes a run by its config.json.

  Raises:
    FileNotFoundError: it has none.
  """
  config = config_lib.from_json((run / "config.json").read_text()).to_dict()
  objective, model = make_objective(config["objective"]), config["model"]
  return Description("declip_jax", model, objective.heads, view_of(config["data"], model), objective.compares_tokens)

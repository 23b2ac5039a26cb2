"""Reads checkpoints of OpenAI's CLIP, open_clip, Hugging Face, SLIP, DeCLIP, SigLIP and our own runs as our parameters.

Format and architecture are recognised by the names and shapes of tensors (`weights.recognise`) and by config files in
the same folder (`weights.model_configs`). What these do not determine is assumed, with a remark, or is an error where
several values are likely; it can be given as settings (`weights.settings`): the number of heads, the activation, the
end-of-text id.
"""

from collections.abc import Collection, Iterable, Mapping
import json
import os
from pathlib import Path
import re
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from einops import EinopsError
from flax.errors import FlaxError
from flax.traverse_util import flatten_dict
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from declip_jax import config as config_lib
from declip_jax.data.images import EvalView
from declip_jax.models.lora import Lora, add_adapters, merge
from declip_jax.objectives import make_objective
from declip_jax.runtime.checkpoint import Checkpoints, restore_as_numpy
from declip_jax.runtime.plain_paths import plain_path
from declip_jax.runtime.retention import KeepBest
from declip_jax.weights import dialects, families, hub
from declip_jax.weights.folders import ARRAYS, EXPORT_FILE, is_run, nearby_runs, weights_file
from declip_jax.weights.layout import (
  Entry,
  ModelFields,
  StateDict,
  abstract_variables,
  expected_shapes,
  layout,
  to_variables,
)
from declip_jax.weights.model_configs import read_json, settings_beside
from declip_jax.weights.recognise import Recognised, recognise
from declip_jax.weights.settings import VIEW, with_fields, with_positions, with_view
from declip_jax.weights.tensor_files import listed, read_tensors
from declip_jax.weights.tokenizer_files import resolve_tokenizer

Tree = Any
# Tensors without a place in our model, such as counters: kept in `Weights.rest`.
_BOOKKEEPING = re.compile(
  r".*num_batches_tracked|.*position_ids|.*attn_mask|input_resolution|context_length|vocab_size|visual\.fc\..*"
  r"|image_mlp\.bn3\..*"
)
# Parts of names that wrappers of PyTorch insert: compilation, sharding and recomputation.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FLOATS = tuple(map(np.dtype, (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)))
# What building a model raises if fields that a file determines contradict each other.
_CONTRADICTIONS = (
  ArithmeticError,
  AttributeError,
  EinopsError,
  FlaxError,
  LookupError,
  MemoryError,
  RuntimeError,
  TypeError,
  ValueError,
)
Step = int | Literal["best"] | None


class Weights(NamedTuple):
  """A model's parameters and their description.

  Attributes:
    origin: project or run that they are from, for messages.
    model: the model's `config.model`, as nested dicts.
    heads: names of `models.heads.HEADS`.
    params, collections: float32 trees; a SimCLR model has neither text tower nor projections, and one tower of
      transformers only its own parameters.
    view: preprocessing of images for evaluation.
    rest: tensors of the file that have no place in the model, under OpenAI's names.
    remarks: guesses and omissions that a user should know of.
    step: step of a run's checkpoint, None for other files.
    tokens: whether training compared tokens only, and no pooled embeddings, as in FILIP.
    average: decay of the moving average of the weights of a run that these are; 0 if they are no average.
  """

  origin: str
  model: ModelFields
  heads: tuple[str, ...]
  params: Tree
  collections: Tree
  view: EvalView
  rest: StateDict = MappingProxyType({})
  remarks: tuple[str, ...] = ()
  step: int | None = None
  tokens: bool = False
  average: float = 0.0


def read(path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None, step: Step = None) -> Weights:
  """Reads a checkpoint file, the folder of one, the working directory of a run, or a model on the Hugging Face hub.

  Args:
    path: a file (`.pt`, `.pth.tar`, `.bin`, `.safetensors`) or the index of several (`.index.json`), a folder of
      open_clip or Hugging Face, our orbax export, the working directory of a run, or one of its checkpoints,
      `RUN/checkpoints/STEP` or `RUN/checkpoints/best`; or `hf-hub:ORG/NAME`, see `hub.download`.
    settings: fields that override what was recognised, such as `{"image.heads": 12, "image.activation": "gelu"}`: those
      of `config.model`, and `image_size`, `interpolation`, `resize` and `squash`; and `average`, see `read_run`.
    step: checkpoint of a run, the newest by default; "best" is the best by `config.checkpoint.best_metric`.

  Raises:
    FileNotFoundError: no such file, or a folder without weights.
    OSError: see `hub.download`.
    ValueError: the checkpoint is not from a known project, its tensors do not match a model, a setting does not fit, or
      one that the file does not determine is not given and has several likely values; the message names them.
  """
  given, path = os.fspath(path), hub.download(path) if hub.is_address(path) else Path(path)
  settings = dict(settings or {})
  run, of_path = _checkpoint_of(path)
  if run:
    if step is not None and of_path is not None:
      raise ValueError(f"{path} is a checkpoint of a run, so step={step} does not apply")
    return read_run(run, of_path if step is None else step, settings)
  if not path.exists():
    raise FileNotFoundError(f"{given} does not exist{hub.hint(given) or nearby_runs(path)}")
  if step is not None:
    raise ValueError(f"{path} is not a run, so step={step} does not apply")
  if (path / EXPORT_FILE).exists():
    return _read_export(path, settings)
  file = path if path.is_file() else weights_file(path)
  described = {**settings_beside(file), **settings}
  found = read_tensors(file)
  weights = from_state_dict(found.tensors, described, name=str(file), kind=found.kind, extras=found.extras)
  others = [f"other state dicts of the file, which were not read: {listed(found.left_out)}"] if found.left_out else []
  return weights._replace(remarks=(*weights.remarks, *others))


def parse_step(text: str | None) -> Step:
  """The step of a flag: a number, "best", or None.

  Raises:
    ValueError: another text.
  """
  if text is None or text == "best":
    return text
  if not text.isdecimal():
    raise ValueError(f"--step={text}: expected the step of a checkpoint, or best")
  return int(text)


def run_of(path: str | os.PathLike[str]) -> Path | None:
  """The working directory of the run that a path names, or whose checkpoint it names; None if it does neither."""
  return _checkpoint_of(Path(path))[0]


def _checkpoint_of(path: Path) -> tuple[Path | None, Step]:
  """The run that a path names, or a checkpoint in it, and the step; None if it is neither."""
  if is_run(path):
    return path, None
  above = path.parent
  if path.name == "checkpoints" and any(_is_checkpoint(step) for step in path.glob("*")):
    return above, None
  if above.name == "checkpoints" and path.name == "best" and not path.exists() and above.is_dir():
    return above.parent, "best"
  if above.name == "checkpoints" and path.name.isdecimal() and _is_checkpoint(path):
    return above.parent, int(path.name)
  return None, None


def _is_checkpoint(path: Path) -> bool:
  return all((path / item).is_dir() for item in ("model", "config"))


def from_state_dict(
  tensors: Mapping[str, np.ndarray],
  settings: Mapping[str, Any] | None = None,
  *,
  name: str = "state dict",
  kind: str = "torch",
  extras: Mapping[str, Any] | None = None,
) -> Weights:
  """The model of a state dict in any dialect of `weights.dialects`; see `read`.

  Args:
    tensors: arrays by their names in the project's model, which may have a common prefix.
    settings: see `read`.
    name: file name, for messages.
    kind: file format, "torchscript" for OpenAI's archives; see `TensorFile`.
    extras: other values of the file, such as an epoch.
  """
  tensors, remarks = _of_one_model(dialects.with_prefix_of_tower(tensors), name)
  dialect = dialects.recognise(tensors)
  if dialect is None:
    raise _mismatch(name, tensors, f"{name} is not a CLIP, SLIP or DeCLIP checkpoint; its tensors", [*tensors])
  try:
    given = {**dialects.DIALECTS[dialect].told(tensors), **(settings or {})}
    translated = dialects.to_openai(tensors, dialect)
    found = recognise(translated, dialect, kind, extras or {}, given)
  except _CONTRADICTIONS as error:
    refusal = f"{name} ({dialect}): cannot recognise the architecture from its tensors"
    cause = f"{error.args[0]}: missing" if isinstance(error, KeyError) else _first_line(error)
    raise _mismatch(name, tensors, refusal, [cause]) from error
  of_view = {field: given.pop(field) for field in (*VIEW, "text.context_length") if field in given}
  model = with_fields(found.model, given, name)
  if "text" in found.sides and not 0 <= model["text"]["eot"] < model["text"]["vocab_size"]:
    raise ValueError(
      f"{name}: text.eot={model['text']['eot']}: expected an id of the {model['text']['vocab_size']} tokens"
    )
  _, variables = _abstract(model, found.heads, found.image_size, f"{name} ({dialect})")
  entries = _present(layout(model, found.heads), found.sides, translated)
  expected = expected_shapes(variables, entries)
  if wrong := _differences(translated, expected):
    raise _mismatch(name, tensors, f"{name} ({dialect}) does not match the model that its tensors suggest", wrong)
  _check_decided(found, name)
  tree = to_variables(translated, entries)
  rest = {key: np.asarray(x) for key, x in translated.items() if key not in expected}
  if unused := sorted(key for key in rest if not _BOOKKEEPING.fullmatch(key)):
    remarks.append(f"tensors without a place in this model: {listed(unused)}")
  # DeCLIP evaluates on a crop of 224 pixels out of 256.
  resize = found.image_size * 256 // 224 if dialect.startswith("DeCLIP") and not of_view.get("squash") else 0
  weights = Weights(
    origin="open_clip" if dialect == "OpenAI" and _is_open_clips(name, extras or {}) else dialect,
    model=model,
    heads=tuple(found.heads),
    params={"heads": {}, **tree["params"]},
    collections={half: tree.get("collections", {}).get(half, {}) for half in ("towers", "heads")},
    view=EvalView(found.image_size, resize, found.interpolation, model["mean"], model["std"], found.squash),
    rest=rest,
    tokens="filip" in found.heads and "simsiam" not in found.heads,  # FILIP; DeFILIP has both and compares embeddings
    remarks=(*_assumptions(found, model, {*given, *of_view}), *found.remarks, *remarks),
  )
  return _with_settings(weights, of_view, name)


def _present(entries: Mapping[str, Entry], sides: tuple[str, ...], tensors: Collection[str]) -> dict[str, Entry]:
  """The entries of the towers that there are; one alone may have no projection, and has no temperature."""
  return {
    path: entry
    for path, entry in entries.items()
    if not _may_lack(path.removeprefix("params/"), sides) or all(name in tensors for name in entry.names)
  }


def _may_lack(path: str, sides: Collection[str]) -> bool:
  """Whether weights with these towers may lack a parameter that a whole model has."""
  if len(sides) != 1:
    return False
  other = "text" if "image" in sides else "image"
  return path.startswith((f"towers/{other}/", "heads/image_projection/", "heads/text_projection/", "heads/logit_scale"))


def _check_decided(found: Recognised, name: str) -> None:
  """Rejects a model with fields that were not given, that its file does not determine, and that commonly differ."""
  if found.undecided:
    fields = ", ".join(f"{field} ({values})" for field, values in found.undecided.items())
    raise ValueError(f"{name} does not say {fields}: {_how_to_set(next(iter(found.undecided)), 'VALUE')}")


def _how_to_set(field: str, value: str) -> str:
  return f"pass --settings={field}={value}, load(path, settings) or config.init_from.settings"


def _assumptions(found: Recognised, model: ModelFields, given: Collection[str]) -> list[str]:
  """A remark on fields that neither the file nor the settings determine, if there are any."""
  values = flatten_dict(dict(model), sep=".")
  values |= {field: getattr(found, field) for field in ("squash", "interpolation", "image_size")}
  fields = [field for field in found.assumed if field not in given]
  if not (assumed := [f"{field}={values[field]!r}" for field in fields]):
    return []
  # Masks and poolings, of which some are known by their tensors.
  usual = ["image.pooling"] if "image" in found.sides and values.get("image.pooling") in ("token", "average") else []
  if "text" in found.sides:
    usual += ["text.causal"] if values["text.pooling"] == "class" else ["text.causal", "text.pooling"]
  usual = [f"{field}={values[field]!r}" for field in usual if field not in given]
  others = f", as are {', '.join(usual)}" if usual else ""
  return [
    f"the file does not specify {', '.join(assumed)}: these are guesses{others}. "
    f"If one differs, all features are wrong: {_how_to_set(fields[0], str(values[fields[0]]))}"
  ]


def _is_open_clips(name: str, extras: Mapping[str, Any]) -> bool:
  return Path(name).name.startswith("open_clip") or {"epoch", "name"} <= set(extras)


def read_run(workdir: str | os.PathLike[str], step: Step = None, settings: Mapping[str, Any] | None = None) -> Weights:
  """The model of a run at its newest undamaged checkpoint, or at `step`, by the config saved with it; see `read`.

  If the run has an average of the weights, `config.optimizer.ema`, that is read; the setting `average=False` reads the
  weights themselves.

  Raises:
    FileNotFoundError: no such checkpoint.
    ValueError: the checkpoint is damaged, or a setting is unknown; see `read`.
  """
  workdir = Path(workdir)
  if not is_run(workdir):
    raise FileNotFoundError(f"{workdir} is not a run: it has no checkpoints{nearby_runs(workdir)}")
  checkpoints = Checkpoints(workdir)
  try:
    steps = checkpoints.steps()
    chosen = _best(checkpoints, workdir) if step == "best" else (steps or [None])[-1] if step is None else step
    if chosen not in steps:
      wanted = "checkpoint" if step is None else f"checkpoint of step {chosen}"
      raise FileNotFoundError(f"{workdir} has no {wanted}; its checkpoints are of steps {steps}")
    remarks = []
    while damage := checkpoints.check(chosen, ("model", "average", "config"))[0]:
      older = [other for other in steps if other < chosen and step is None]
      if not older:
        raise ValueError(f"{workdir}: the checkpoint of step {chosen} is damaged: {damage}")
      remarks.append(f"the checkpoint of step {chosen} is damaged, using that of step {older[-1]}: {damage}")
      chosen = older[-1]
    config = config_lib.from_json(json.dumps(checkpoints.config(chosen))).to_dict()
    objective = make_objective(config["objective"])
    model, data, heads = {**config["model"], "attention": "auto"}, config["data"], objective.heads
    _, variables = abstract_variables(model, heads, data["image_size"])
    lora = Lora(**config["lora"]) if config["lora"]["rank"] else None
    if lora:
      key = jax.random.key(0)
      variables["params"] = jax.eval_shape(lambda params: add_adapters(params, key, lora), variables["params"])
    average, settings = _average(config["optimizer"]["ema"], settings or {}, str(workdir))
    params, collections = checkpoints.restore_model(
      chosen, variables["params"], variables["collections"], average=average > 0
    )
    collections = _without_momentum(collections)
    params = jax.device_get(merge(params, lora)) if lora else params
  finally:
    checkpoints.close()
  weights = Weights(
    origin=f"declip_jax, step {chosen}{', average of the weights' if average else ''}",
    model=model,
    heads=heads,
    params=params,
    collections=collections,
    view=view_of(data, model),
    step=chosen,
    remarks=tuple(remarks),
    tokens=objective.compares_tokens,
    average=average,
  )
  return _with_settings(weights, settings, str(workdir))


def view_of(data: Mapping[str, Any], model: ModelFields) -> EvalView:
  """The preprocessing of images of a run, from `config.data` and `config.model`."""
  return EvalView(
    size=data["image_size"],
    resize=data["evaluation_resize"],
    interpolation=data["interpolation"],
    mean=model["mean"],
    std=model["std"],
    squash=data["squash"],
  )


def _average(ema: float, settings: Mapping[str, Any], name: str) -> tuple[float, dict[str, Any]]:
  """The decay of the average to read, 0 for the weights themselves, and the settings without the one that chooses.

  A run without an average does not have that setting.
  """
  others = dict(settings)
  if not ema:
    return 0.0, others
  wanted = others.pop("average", True)
  if not isinstance(wanted, bool):
    raise ValueError(f"{name}: average={wanted!r}: expected True or False")
  return ema if wanted else 0.0, others


def _best(checkpoints: Checkpoints, workdir: Path) -> int:
  """The step of a run's best checkpoint."""
  steps = checkpoints.steps()
  if not steps:
    raise FileNotFoundError(f"{workdir} has no checkpoint")
  config = config_lib.parse_json(json.dumps(checkpoints.config(steps[-1])))
  metric = config["checkpoint"]["best_metric"]
  if not metric:
    raise ValueError(f"{workdir} has no best checkpoint, since its config.checkpoint.best_metric is '': give a step")
  best = KeepBest(workdir / "checkpoints", 1, metric).best(steps)
  if not best:
    raise ValueError(f"{workdir} has no best checkpoint: none of the steps {steps} was evaluated by {metric}")
  return best[0]


def read_about_export(path: Path) -> dict[str, Any]:
  """The description in the folder of an orbax export, with the fields that older versions did not write.

  Raises:
    ValueError: a field is missing.
  """
  about = config_lib.with_tuples(read_json(path / EXPORT_FILE))
  optional = {"squash": False, "tokens": False}  # absent from older exports
  if missing := {"model", "heads", "origin", *VIEW} - set(about) - set(optional):
    raise ValueError(f"{path / EXPORT_FILE} has no {', '.join(sorted(missing))}")
  about = {**optional, **about}
  try:
    config_lib.add_missing_of_model(about["model"])
    about["model"]["text"]["tokenizer"] = resolve_tokenizer(about["model"]["text"]["tokenizer"], path)
  except _CONTRADICTIONS as error:
    raise _damaged_export(path, error) from error
  return about


def view_of_export(about: Mapping[str, Any]) -> EvalView:
  """The preprocessing of images of an export."""
  model = about["model"]
  return EvalView(**{ours: about[name] for name, ours in VIEW.items()}, mean=model["mean"], std=model["std"])


def _damaged_export(path: Path, error: Exception) -> ValueError:
  return ValueError(f"{path} is damaged, or not an export of declip_jax: {_first_line(error)}")


def _read_export(path: Path, settings: dict[str, Any]) -> Weights:
  about = read_about_export(path)
  try:
    model, heads = about["model"], about["heads"]
    _, variables = abstract_variables(model, heads, about["image_size"])
    variables["collections"] = _without_momentum(variables["collections"])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      restored = checkpointer.restore(plain_path(path) / ARRAYS, args=restore_as_numpy(variables))
    view = view_of_export(about)
  except _CONTRADICTIONS as error:
    raise _damaged_export(path, error) from error
  weights = Weights(about["origin"], model, heads, **restored, view=view, tokens=about["tokens"])
  return _with_settings(weights, settings, str(path))


def _without_momentum(collections: Tree) -> Tree:
  """Collections without the momentum tower, which only training uses."""
  return {half: collections[half] for half in ("towers", "heads")}


def _with_settings(weights: Weights, settings: Mapping[str, Any], name: str) -> Weights:
  if not settings:
    return weights
  model = with_fields(weights.model, {field: x for field, x in settings.items() if field not in VIEW}, name)
  view = with_view(weights.view, settings, model, name)
  params, remarks = with_positions(weights.params, model, view.size, name)
  _, variables = _abstract(model, weights.heads, view.size, name)
  given, needed = (flatten_dict(tree, sep="/") for tree in (params, variables["params"]))
  needed = {path: x for path, x in needed.items() if path in given or not _may_lack(path, weights.params["towers"])}
  for path in sorted(given.keys() | needed.keys()):
    shapes = [tree[path].shape if path in tree else "missing" for tree in (given, needed)]
    if shapes[0] != shapes[1]:
      given = listed(map(str, settings))
      raise ValueError(f"{name}: the settings {given} need other weights: {path} is {shapes[0]}, not {shapes[1]}")
  params = {"heads": {}, **params}  # absent from one tower without a projection
  return weights._replace(model=model, params=params, view=view, remarks=(*weights.remarks, *remarks))


def _abstract(model: ModelFields, heads: Iterable[str], image_size: int, name: str) -> tuple[Any, Tree]:
  """Calls `abstract_variables`, with one kind of error for a model that is not possible."""
  try:
    return abstract_variables(model, tuple(heads), image_size)
  except _CONTRADICTIONS as error:
    raise ValueError(f"{name} is not a possible model: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:150]


def _of_one_model(tensors: Mapping[str, np.ndarray], name: str) -> tuple[dict[str, np.ndarray], list[str]]:
  """The tensors of the only CLIP model in a state dict, without prefixes, and a remark on the others.

  Wrappers add prefixes: `DistributedDataParallel` "module.", `torch.compile` "_orig_mod.", Lightning and other classes
  the name of an attribute.
  """
  plain = {_WRAPPERS.sub("", key): tensor for key, tensor in tensors.items()}
  if len(plain) < len(tensors):
    raise ValueError(f"{name}: two tensors have the same name without the prefixes of wrappers")
  if dialects.recognise(plain):
    return plain, []
  markers = [dialect.marker for dialect in dialects.DIALECTS.values()]
  prefixes = {key.removesuffix(marker) for marker in markers for key in plain if key.endswith(f".{marker}")}
  averages = {prefix for prefix in prefixes if re.search("(?i)ema|average", prefix)}
  prefixes = prefixes - averages or averages
  if not prefixes:
    return plain, []
  if len(prefixes) > 1:
    raise ValueError(f"{name} has several models, {listed(prefixes)}: save the one to read as a file of its own")
  (prefix,) = prefixes
  outside = [key for key in plain if not key.startswith(prefix)]
  remark = [f"tensors outside of {prefix!r}, which were not read: {listed(outside)}"] if outside else []
  return {key.removeprefix(prefix): tensor for key, tensor in plain.items() if key.startswith(prefix)}, remark


def _differences(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
  """The tensors that are missing, unknown, or of another shape or type than expected."""
  wrong = [f"{key} {shape}: missing" for key, shape in expected.items() if key not in tensors]
  for key, tensor in tensors.items():
    if key in expected and tensor.shape != expected[key]:
      wrong.append(f"{key} {tensor.shape}: should be {expected[key]}")
    elif key in expected and tensor.dtype not in _FLOATS:
      wrong.append(f"{key} {tensor.dtype}: should be one of {', '.join(dtype.name for dtype in _FLOATS)}")
    elif key not in expected and not _BOOKKEEPING.fullmatch(key):
      wrong.append(f"{key} {tensor.shape}: unknown")
  return wrong


def _mismatch(name: str, tensors: Iterable[str], problem: str, details: Iterable[str]) -> ValueError:
  """The error of tensors that are not those of a model of ours; it names the family of models that they are from."""
  family, tensor = families.of_tensors(tensors)
  if families.is_other_form(family):
    return ValueError(f"{name}: {family} is not supported, its tensors differ: {listed(details)}")
  if family:
    return families.unsupported(name, family, f"tensor {tensor:.80}")
  return ValueError(f"{problem}: {listed(details)}")

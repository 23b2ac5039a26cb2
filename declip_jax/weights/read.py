"""Reads checkpoints of OpenAI's CLIP, open_clip, Hugging Face, SLIP, DeCLIP and our own runs as our parameters.

Format and architecture are recognised by the names and shapes of tensors and by config files in the same folder. What
they do not determine can be given as settings: the number of heads (64 channels each by default), the activation (see
`_activation`), the end-of-text id.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import math
import os
from pathlib import Path
import re
from types import MappingProxyType
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
import numpy as np
import orbax.checkpoint as ocp

from declip_jax import architectures
from declip_jax import config as config_lib
from declip_jax.data.images import EvalView
from declip_jax.objectives import make_objective
from declip_jax.runtime.checkpoint import Checkpoints, restore_as_numpy
from declip_jax.runtime.plain_paths import plain_path
from declip_jax.weights import dialects
from declip_jax.weights.layout import (
  ModelFields,
  StateDict,
  abstract_variables,
  expected_shapes,
  layout,
  to_variables,
)
from declip_jax.weights.tensor_files import read_tensors

Tree = Any
# Tensors without a place in our model, such as counters: kept in `Weights.rest`.
_BOOKKEEPING = re.compile(
  r".*num_batches_tracked|.*position_ids|.*attn_mask|input_resolution|context_length|vocab_size|visual\.fc\..*"
  r"|image_mlp\.bn3\..*"
)
_WEIGHT_FILES = (
  "open_clip_model.safetensors",
  "open_clip_pytorch_model.bin",
  "model.safetensors",
  "pytorch_model.bin",
)
# Settings and fields of an export that are not fields of `config.model`, and the fields of `EvalView` that they set.
_VIEW = {"image_size": "size", "interpolation": "interpolation", "resize": "resize"}
EXPORT_FILE = "weights.json"  # next to the arrays of an orbax export


class Weights(NamedTuple):
  """A model's parameters and their description.

  Attributes:
    origin: project or run that they are from, for messages.
    model: the model's `config.model`, as nested dicts.
    heads: names of `models.heads.HEADS`.
    params, collections: float32 trees; a SimCLR model has neither text tower nor projections.
    view: preprocessing of images for evaluation.
    rest: tensors of the file that have no place in the model, under OpenAI's names.
    remarks: guesses and omissions that a user should know of.
    step: step of a run's checkpoint, None for other files.
    tokens: whether training compared tokens only, and no pooled embeddings, as in FILIP.
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


def read(path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None, step: int | None = None) -> Weights:
  """Reads a checkpoint file, the folder of one, or the working directory of a run.

  Args:
    path: a file (`.pt`, `.pth.tar`, `.bin`, `.safetensors`), a folder of open_clip or Hugging Face, our orbax export,
      or the working directory of a run.
    settings: fields that override what was recognised, such as `{"image.heads": 12, "image.activation": "gelu"}`: those
      of `config.model`, and `image_size`, `interpolation` and `resize`.
    step: checkpoint of a run, the newest by default.

  Raises:
    FileNotFoundError: no such file, or a folder without weights.
    ValueError: the checkpoint is of no known project, or its tensors do not match a model; the message names them.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist")
  settings = dict(settings or {})
  if (path / "checkpoints").is_dir():
    return read_run(path, step, settings)
  if step is not None:
    raise ValueError(f"{path} is not a run, so step={step} does not apply")
  if (path / EXPORT_FILE).exists():
    return _read_export(path, settings)
  file = path if path.is_file() else _weights_file(path)
  described = {**_described_by(path if path.is_dir() else path.parent, file), **settings}
  tensors = _without_prefix(read_tensors(file))
  return from_state_dict(tensors.tensors, described, name=str(file), kind=tensors.kind, extras=tensors.extras)


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
    tensors: arrays by their names in the project's model.
    settings: see `read`.
    name: file name, for messages.
    kind: file format, "torchscript" for OpenAI's archives; see `TensorFile`.
    extras: other values of the file, such as an epoch.
  """
  dialect = dialects.recognise(tensors)
  if dialect is None:
    raise ValueError(f"{name} is not a recognised CLIP, SLIP or DeCLIP checkpoint; its tensors are {_shown(tensors)}")
  translated = dialects.to_openai(tensors, dialect)
  try:
    found = _recognise(translated, dialect, kind, extras or {})
  except (KeyError, IndexError, ValueError) as error:
    raise ValueError(f"{name} ({dialect}): cannot recognise the architecture from its tensors: {error}") from error
  settings = dict(described := settings or {})
  found.image_size = settings.pop("image_size", found.image_size)
  found.interpolation = settings.pop("interpolation", found.interpolation)
  declip = dialect.startswith("DeCLIP")  # evaluates on a crop of 224 pixels out of 256
  resize = settings.pop("resize", found.image_size * 256 // 224 if declip else 0)
  model = _with_fields(found.model, settings, name)
  _, variables = abstract_variables(model, found.heads, found.image_size)
  entries = layout(model, found.heads)
  expected = expected_shapes(variables, entries)
  _check(translated, expected, f"{name} ({dialect})")
  tree = to_variables(translated, entries)
  rest = {key: np.asarray(x) for key, x in translated.items() if key not in expected}
  unused = sorted(key for key in rest if not _BOOKKEEPING.fullmatch(key))
  guessed = found.guessed_activation and not {"image.activation", "text.activation"} & set(described)
  remarks = [found.guessed_activation] if guessed else []
  collections = {half: tree.get("collections", {}).get(half, {}) for half in ("towers", "heads")}
  by_open_clip = dialect == "OpenAI" and (Path(name).name.startswith("open_clip") or "epoch" in (extras or {}))
  return Weights(
    origin="open_clip" if by_open_clip else dialect,
    model=model,
    heads=tuple(found.heads),
    params=tree["params"],
    collections=collections,
    view=EvalView(found.image_size, resize, found.interpolation, model["mean"], model["std"]),
    rest=rest,
    tokens="filip" in found.heads and "simsiam" not in found.heads,  # FILIP; DeFILIP has both and compares embeddings
    remarks=(*remarks, *([f"tensors without a place in this model: {', '.join(unused)}"] if unused else [])),
  )


def read_run(
  workdir: str | os.PathLike[str], step: int | None = None, settings: Mapping[str, Any] | None = None
) -> Weights:
  """The model of a run at its newest undamaged checkpoint, or at `step`, by the config saved with it.

  Raises:
    FileNotFoundError: no such checkpoint.
    ValueError: the checkpoint is damaged, or a setting does not exist; see `read`.
  """
  workdir = Path(workdir)
  if not (workdir / "checkpoints").is_dir():
    raise FileNotFoundError(f"{workdir} is not a run: it has no checkpoints")
  checkpoints = Checkpoints(workdir)
  try:
    steps = checkpoints.steps()
    chosen = step if step is not None else (steps or [None])[-1]
    if chosen not in steps:
      wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
      raise FileNotFoundError(f"{workdir} has no {wanted}; its checkpoints are of steps {steps}")
    remarks = []
    while damage := checkpoints.check(chosen, ("model", "config"))[0]:
      older = [other for other in steps if other < chosen and step is None]
      if not older:
        raise ValueError(f"{workdir}: the checkpoint of step {chosen} is damaged: {damage}")
      remarks.append(f"the checkpoint of step {chosen} is damaged, using that of step {older[-1]}: {damage}")
      chosen = older[-1]
    config = config_lib.from_json(json.dumps(checkpoints.config(chosen))).to_dict()
    objective = make_objective(config["objective"])
    model, data, heads = config["model"], config["data"], objective.heads
    _, variables = abstract_variables(model, heads, data["image_size"])
    params, collections = checkpoints.restore_model(chosen, variables["params"], variables["collections"])
    collections = _without_momentum(collections)
  finally:
    checkpoints.close()
  weights = Weights(
    origin=f"declip_jax, step {chosen}",
    model=model,
    heads=heads,
    params=params,
    collections=collections,
    view=EvalView(data["image_size"], data["evaluation_resize"], data["interpolation"], model["mean"], model["std"]),
    step=chosen,
    remarks=tuple(remarks),
    tokens=objective.compares_tokens,
  )
  return _with_settings(weights, settings or {}, str(workdir))


def _read_export(path: Path, settings: dict[str, Any]) -> Weights:
  about = config_lib.with_tuples(_json(path / EXPORT_FILE))
  if missing := {"model", "heads", "origin", *_VIEW} - set(about):
    raise ValueError(f"{path / EXPORT_FILE} has no {', '.join(sorted(missing))}")
  model, heads = about["model"], about["heads"]
  _, variables = abstract_variables(model, heads, about["image_size"])
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    variables["collections"] = _without_momentum(variables["collections"])
    restored = checkpointer.restore(plain_path(path) / "arrays", args=restore_as_numpy(variables))
  view = EvalView(**{ours: about[name] for name, ours in _VIEW.items()}, mean=model["mean"], std=model["std"])
  weights = Weights(about["origin"], model, heads, **restored, view=view, tokens=about.get("tokens", False))
  return _with_settings(weights, settings, str(path))


def _without_momentum(collections: Tree) -> Tree:
  """Collections without the momentum tower, which only training uses."""
  return {half: collections[half] for half in ("towers", "heads")}


def _with_settings(weights: Weights, settings: Mapping[str, Any], name: str) -> Weights:
  others = dict(settings)
  view = {ours: others.pop(key) for key, ours in _VIEW.items() if key in others}
  model = _with_fields(weights.model, others, name)
  view |= {"mean": model["mean"], "std": model["std"]}
  return weights._replace(model=model, view=dataclasses.replace(weights.view, **view))


def _weights_file(folder: Path) -> Path:
  for name in _WEIGHT_FILES:
    if (folder / name).exists():
      return folder / name
  found = sorted(file.name for file in folder.iterdir())
  if any(name.endswith(".index.json") for name in found):
    raise ValueError(f"{folder} has its weights in several files, which is not supported: save them as one file")
  raise FileNotFoundError(
    f"{folder} has no weights: expected one of {', '.join(_WEIGHT_FILES)}, {EXPORT_FILE} or checkpoints/, found {found}"
  )


def _without_prefix(found: Any) -> Any:
  """Drops the prefixes that `DistributedDataParallel` and `torch.compile` add to every name."""
  tensors = found.tensors
  for prefix in ("module.", "_orig_mod.", "module."):
    if tensors and all(name.startswith(prefix) for name in tensors):
      tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
  return found._replace(tensors=tensors)


def _with_fields(model: ModelFields, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
  """The fields of a model with some replaced, by their paths, such as "image.heads"."""
  fields = flatten_dict(dict(model), sep=".")
  for field, value in settings.items():
    if field not in fields:
      raise ValueError(f"{name}: this model has no field {field!r}; it has {', '.join([*fields, *_VIEW])}")
    fields[field] = value
  return unflatten_dict(fields, sep=".")


def _check(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], name: str) -> None:
  wrong = [f"{key} {shape}: missing" for key, shape in expected.items() if key not in tensors]
  for key, tensor in tensors.items():
    if key in expected and tensor.shape != expected[key]:
      wrong.append(f"{key} {tensor.shape}: should be {expected[key]}")
    elif key not in expected and not _BOOKKEEPING.fullmatch(key):
      wrong.append(f"{key} {tensor.shape}: unknown")
  if wrong:
    raise ValueError(f"{name} does not match the model that its tensors suggest:\n  " + "\n  ".join(wrong))


@dataclasses.dataclass
class _Recognised:
  model: dict[str, Any]
  heads: list[str]
  image_size: int
  interpolation: str
  guessed_activation: str


def _recognise(tensors: Mapping[str, np.ndarray], dialect: str, kind: str, extras: Mapping[str, Any]) -> _Recognised:
  """The model whose tensors have these names and shapes."""
  model = config_lib.default("clip").to_dict()["model"]
  slip, declip = dialect == "SLIP", dialect.startswith("DeCLIP")
  timm = slip or dialect == "open_clip, timm trunk"
  activation, guessed = _activation(tensors, dialect, kind, extras)
  model["dtype"] = "float32"
  if slip or declip:
    model["mean"], model["std"] = config_lib.IMAGENET_MEAN, config_lib.IMAGENET_STD
  if "visual.layer1.0.conv1.weight" in tensors:
    model["image"], image_size = _resnet(tensors)
  else:
    model["image"], image_size = _vit(tensors, "gelu" if timm else activation, 1e-6 if timm else 1e-5)
  if slip and model["image"]["width"] in (384, 768):
    model["image"]["heads"] = 12
  if "token_embedding.weight" in tensors:
    model["text"] = _text(tensors, activation)
    if declip:
      model["text"]["eot"] = model["text"]["vocab_size"] - 2
  fields, heads = _heads(tensors)
  model["heads"] |= fields
  return _Recognised(model, heads, image_size, "bilinear" if slip or declip else "bicubic", guessed)


def _activation(
  tensors: Mapping[str, np.ndarray], dialect: str, kind: str, extras: Mapping[str, Any]
) -> tuple[str, str]:
  """The activation, and a remark if it is a guess.

  It cannot be recognised from tensors. QuickGELU is the default of OpenAI, SLIP (text), DeCLIP and Hugging Face;
  open_clip trains with exact GELU unless the model's name contains "quickgelu". An open_clip checkpoint has an epoch or
  a name; OpenAI's files are TorchScript archives, or in half precision, or contain their resolution.
  """
  if dialect != "OpenAI" and not dialect.startswith("open_clip"):
    return "quick_gelu", ""
  if "epoch" in extras or "name" in extras:
    return "quick_gelu" if "quickgelu" in str(extras.get("name", "")).lower() else "gelu", ""
  halves = any(tensor.dtype == np.float16 for tensor in tensors.values())
  if kind == "torchscript" or "input_resolution" in tensors or halves:
    return "quick_gelu", ""
  activation = "quick_gelu" if kind == "torch" and dialect == "OpenAI" else "gelu"
  return activation, f"the file does not specify its activation or heads: assuming {activation!r}, 64 channels per head"


def _depth(tensors: Iterable[str], prefix: str) -> int:
  numbers = {int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
  return len(numbers)


# Number of heads of open_clip's H/14, g/14 and bigG/14 by width and depth: theirs do not have 64 channels.
_WIDE_HEADS = {(1280, 32): 16, (1408, 40): 16, (1664, 48): 16}


def _vit(tensors: Mapping[str, np.ndarray], activation: str, epsilon: float) -> tuple[dict[str, Any], int]:
  width, _, patch, _ = tensors["visual.conv1.weight"].shape
  blocks = "visual.transformer.resblocks."
  depth = _depth(tensors, blocks)
  image = architectures.vit(
    patch,
    width,
    depth,
    _WIDE_HEADS.get((width, depth), max(width // 64, 1)),
    pre_norm="visual.ln_pre.weight" in tensors,
    patch_bias="visual.conv1.bias" in tensors,
    activation=activation,
    epsilon=epsilon,
    mlp_ratio=tensors[f"{blocks}0.mlp.c_fc.weight"].shape[0] / width,
  ).to_dict()
  return image, patch * math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)


def _resnet(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], int]:
  layers = tuple(_depth(tensors, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
  image = architectures.resnet(tensors["visual.conv3.weight"].shape[0], layers).to_dict()
  return image, 32 * math.isqrt(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)


def _text(tensors: Mapping[str, np.ndarray], activation: str) -> dict[str, Any]:
  vocab_size, width = tensors["token_embedding.weight"].shape
  blocks = "transformer.resblocks."
  return architectures.text(
    width,
    _depth(tensors, blocks),
    heads=max(width // 64, 1),
    vocab_size=vocab_size,
    eot=49407 if vocab_size in (49408, 49409) else vocab_size - 1,
    context_length=tensors["positional_embedding"].shape[0],
    activation=activation,
    mlp_ratio=tensors[f"{blocks}0.mlp.c_fc.weight"].shape[0] / width,
  ).to_dict()


def _heads(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], list[str]]:
  """Fields of `config.model.heads` that the tensors determine, and the heads that they belong to."""

  def widths(*names: str) -> tuple[int, ...]:
    return tuple(tensors[f"{name}.weight"].shape[0] for name in names)

  heads = ["joint"] if "token_embedding.weight" in tensors else []
  fields: dict[str, Any] = {
    "image_bias": "visual.attnpool.c_proj.bias" in tensors,
    "text_bias": "text_projection.bias" in tensors,
  }
  if "text_projection" in tensors:
    fields["embed_dim"] = tensors["text_projection"].shape[1]
  elif "text_projection.weight" in tensors:
    fields["embed_dim"] = tensors["text_projection.weight"].shape[0]
  if "image_mlp.layer1.weight" in tensors:
    heads.append("simclr")
    fields["simclr_projector"] = widths(*(f"image_mlp.layer{index}" for index in (1, 2, 3)))
  if "projector.linear1.weight" in tensors:
    heads.append("simsiam")
    fields["simsiam_projector"] = widths(*(f"projector.linear{index}" for index in (1, 2, 3)))
    fields["simsiam_predictor"] = widths("predictor.linear1", "predictor.layer2")
  if "text_label_predictor.weight" in tensors:
    heads.append("mlm")
  if "image_mapping.weight" in tensors:
    heads.append("filip")
    fields["dense_dim"] = tensors["image_mapping.weight"].shape[0]
  if "logit_bias" in tensors:
    heads.append("sigmoid")
  return fields, heads


def _described_by(folder: Path, file: Path) -> dict[str, Any]:
  """Settings from the config files of open_clip or Hugging Face in a folder."""
  if file.suffix not in (".safetensors", ".bin"):
    return {}
  if (folder / "open_clip_config.json").exists() and file.name.startswith("open_clip"):
    return _open_clip_settings(folder / "open_clip_config.json")
  if (folder / "config.json").exists():
    return _hugging_face_settings(folder)
  return {}


# Fields of open_clip's towers and the values that our towers support, None for any. Other fields must have no effect.
_OPEN_CLIP_TOWER = {
  "layers": None,
  "width": None,
  "heads": None,
  "head_width": None,
  "mlp_ratio": None,
  "patch_size": None,
  "image_size": None,
  "context_length": None,
  "vocab_size": None,
  "no_ln_pre": None,
  "proj_bias": None,
  "norm_kwargs": None,
  "timm_model_name": None,
  "timm_model_pretrained": None,
  "timm_pool": ("token", ""),
  "timm_proj": ("linear",),
  "hf_tokenizer_name": ("", None),
  "pool_type": ("tok", "argmax"),
}


def _open_clip_settings(file: Path) -> dict[str, Any]:
  about = _json(file)
  model, preprocess = about.get("model_cfg", {}), about.get("preprocess_cfg", {})
  vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
  for tower, fields in (("vision_cfg", vision), ("text_cfg", text)):
    for name, value in fields.items():
      legal = _OPEN_CLIP_TOWER.get(name, (None, False, 0, 0.0, ""))
      if legal is not None and value not in legal:
        raise ValueError(f"{file}: {tower}.{name}={value!r} is not supported, only {list(legal)}")
  if preprocess.get("resize_mode", "shortest") != "shortest":
    raise ValueError(
      f"{file}: preprocess_cfg.resize_mode={preprocess['resize_mode']!r} is not supported, only 'shortest'"
    )
  activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
  settings = {"text.activation": activation, "text.heads": text.get("heads", 8)}
  if not isinstance(vision.get("layers"), list) and "timm_model_name" not in vision:
    settings["image.activation"] = activation
    settings["image.heads"] = vision.get("width", 768) // vision.get("head_width", 64)
    settings["image.epsilon"] = (vision.get("norm_kwargs") or {}).get("eps", 1e-5)
  elif str(vision.get("timm_model_name", "")).startswith("vit_small"):
    settings["image.heads"] = 6
  settings |= {name: tuple(preprocess[name]) for name in ("mean", "std") if name in preprocess}
  return settings | {name: preprocess[name] for name in ("interpolation",) if name in preprocess}


def _hugging_face_settings(folder: Path) -> dict[str, Any]:
  about = _json(folder / "config.json")
  if about.get("model_type") != "clip":
    raise ValueError(f"{folder / 'config.json'}: model_type={about.get('model_type')!r} is not supported, only 'clip'")
  vision, text = about.get("vision_config", {}), about.get("text_config", {})
  if text.get("layer_norm_eps", 1e-5) != 1e-5:
    raise ValueError(
      f"{folder / 'config.json'}: text_config.layer_norm_eps={text['layer_norm_eps']} is not supported, only 1e-5"
    )
  settings = {
    "image.activation": vision.get("hidden_act", "quick_gelu"),
    "image.heads": vision.get("num_attention_heads", 12),
    "image.epsilon": vision.get("layer_norm_eps", 1e-5),
    "text.activation": text.get("hidden_act", "quick_gelu"),
    "text.heads": text.get("num_attention_heads", 8),
  }
  if text.get("eos_token_id", 2) != 2:  # 2 is an old mistake that means the largest id
    settings["text.eot"] = text["eos_token_id"]
  preprocessor = folder / "preprocessor_config.json"
  if preprocessor.exists():
    fields = _json(preprocessor)
    settings |= {ours: tuple(fields[f"image_{ours}"]) for ours in ("mean", "std") if f"image_{ours}" in fields}
    settings["interpolation"] = {2: "bilinear", 3: "bicubic"}.get(fields.get("resample", 3), "bicubic")
    shorter, crop = fields.get("size"), fields.get("crop_size")
    shorter = shorter.get("shortest_edge", 0) if isinstance(shorter, dict) else shorter or 0
    crop = crop.get("height", 0) if isinstance(crop, dict) else crop or 0
    settings["resize"] = shorter if shorter > crop > 0 else 0
  return settings


def _json(file: Path) -> dict[str, Any]:
  try:
    return json.loads(file.read_text())
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f"{file} is not JSON: {error}") from error


def _shown(names: Iterable[str]) -> str:
  names = sorted(names)
  return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

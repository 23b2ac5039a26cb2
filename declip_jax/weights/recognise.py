"""Recognises the architecture of a state dict under OpenAI's names, by the names and shapes of its tensors.

What they do not determine is assumed, and named in `Recognised.assumed`: activation, heads, epsilon, end-of-text id.
Where models with the same tensors commonly have another value, `Recognised.undecided` names the field instead.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import math
import re
from types import MappingProxyType
from typing import Any

import numpy as np

from declip_jax import architectures
from declip_jax import config as config_lib

OPENAI_EOT, OPENAI_VOCABULARIES = 49407, (49408, 49409)  # without and with a mask token
_EVA_E = (1792, 64)  # width and depth of EVA-02-CLIP-E, whose norms come after attention and MLP
# Number of heads of H/14, g/14, bigG/14, e/14 and EVA's E/14 by width and depth: theirs do not have 64 channels.
_WIDE_HEADS = {(1280, 32): 16, (1408, 40): 16, (1664, 48): 16, (1792, 56): 16, _EVA_E: 16}
# Numbers of heads of SigLIP's towers, by width.
_SIGLIP_HEADS = {tower.width: tower.heads for towers in architectures.SIGLIP_SIZES.values() for tower in towers}
_SO400M_384 = (14, 27)  # patch and side of the grid, whose 378 pixels are those of images of 384
_WITHOUT_DECODER = "CoCa's decoder of captions was not read: captions cannot be generated"
_WITHOUT_ANTIALIASING = (
  "big_vision resizes images without antialiasing and we with it, so features of images that are larger than those of "
  "the model differ"
)
# The name that open_clip gives to a run without `--name`: it has that of the model.
_RUN_NAME = re.compile(r"\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d-model_.+-lr_.*")


@dataclasses.dataclass
class Recognised:
  """A recognised model.

  Attributes:
    model: `config.model` as nested dicts.
    heads: names of `models.heads.HEADS`.
    image_size: height and width of images, in pixels.
    interpolation: method of resizing images for evaluation.
    sides: towers that there are, "image" and "text".
    squash: whether images are resized to a square, see `EvalView`.
    assumed: paths of the fields of `model`, and of these, that neither tensors nor the kind of file determine, such as
      "image.heads" and "squash".
    undecided: paths of those among them that differ between common models with these tensors, and their legal values.
    remarks: differences from the project's own evaluation.
  """

  model: dict[str, Any]
  heads: list[str]
  image_size: int
  interpolation: str
  sides: tuple[str, ...]
  squash: bool
  assumed: tuple[str, ...]
  undecided: dict[str, str]
  remarks: tuple[str, ...] = ()


def recognise(
  tensors: Mapping[str, np.ndarray],
  dialect: str,
  kind: str,
  extras: Mapping[str, Any],
  given: Mapping[str, Any] = MappingProxyType({}),
) -> Recognised:
  """The model whose tensors have these names and shapes.

  Args:
    tensors: arrays under OpenAI's names.
    dialect: the dialect that they were in, a name of `dialects.DIALECTS`.
    kind, extras: see `tensor_files.TensorFile`.
    given: fields that are known, such as {"image.activation": "gelu"}, which is likely that of the other tower, too.

  Raises:
    KeyError, IndexError, ValueError, ArithmeticError: a tensor is missing or has another rank.
  """
  model, sides = config_lib.default("clip").to_dict()["model"], _sides(tensors)
  if dialect.startswith("SigLIP"):
    return _siglip(model, tensors, dialect, sides)
  slip, declip = dialect == "SLIP", dialect.startswith("DeCLIP")
  timm = slip or "timm" in dialect
  likely = _activation(tensors, dialect, kind, extras, given)
  activation = likely or "quick_gelu"
  model["dtype"] = "float32"
  if slip or declip:
    model["mean"], model["std"] = architectures.IMAGENET_MEAN, architectures.IMAGENET_STD
  if "image" not in sides:
    image_size = 224
  elif "visual.layer1.0.conv1.weight" in tensors:
    model["image"], image_size = _resnet(tensors)
  elif "visual.trunk.stem.0.weight" in tensors:
    model["image"], image_size = _convnext(tensors), 256  # which no tensor tells
  else:
    epsilon = 1e-6 if timm and "visual.ln_pre.weight" not in tensors else 1e-5
    model["image"], image_size = _vit(tensors, "gelu" if timm else activation, epsilon)
  if slip and model["image"]["width"] in (384, 768):
    model["image"]["heads"] = 12
  if "text" in sides:
    model["text"] = _text(tensors, activation)
    if declip:
      model["text"]["eot"] = model["text"]["vocab_size"] - 2
  fields, heads = _heads(tensors)
  model["heads"] |= fields
  of_one_architecture = slip or declip or _is_openais(tensors, kind)
  assumed = () if of_one_architecture else _assumed(model, sides, tensors)
  undecided = {} if of_one_architecture else _undecided(model, sides, likely, dialect)
  if given.get("image.pooling") == "token":  # so not CLIPA's
    undecided = {field: values for field, values in undecided.items() if "CLIPA" not in values}
  interpolation = "bilinear" if slip or declip else "bicubic"
  undecided = {field: values for field, values in undecided.items() if field not in given}
  remarks = (_WITHOUT_DECODER,) if dialect.startswith("CoCa") else ()
  return Recognised(model, heads, image_size, interpolation, sides, False, assumed, undecided, remarks)


def _sides(tensors: Mapping[str, np.ndarray]) -> tuple[str, ...]:
  """The towers whose tensors there are; one tower of transformers may be alone, and SimCLR has that of images."""
  markers = {"image": ("visual.conv1.weight", "visual.trunk.stem.0.weight"), "text": ("token_embedding.weight",)}
  return tuple(side for side, names in markers.items() if any(name in tensors for name in names))


def _siglip(
  model: dict[str, Any], tensors: Mapping[str, np.ndarray], dialect: str, sides: tuple[str, ...]
) -> Recognised:
  """SigLIP or SigLIP 2: images are resized to a square, and texts are bidirectional and pooled at the last position.

  Of the released files, only those of big_vision tell the number of heads, by their layout.
  """
  model["dtype"], model["mean"], model["std"] = "float32", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
  image_size = 224
  if "image" in sides:
    if tensors["visual.conv1.weight"].ndim != 4:
      raise ValueError("SigLIP 2 for images of any shape (NaFlex) is not supported")
    model["image"], image_size = _vit(tensors, "gelu_tanh", 1e-6)
  if "text" in sides:
    model["text"] = _text(tensors, "gelu_tanh") | {"eot": 1, "epsilon": 1e-6, "causal": False, "pooling": "last"}
  for tower in sides:
    model[tower]["heads"] = _SIGLIP_HEADS.get(model[tower]["width"], model[tower]["heads"])
  fields, heads = _heads(tensors)
  model["heads"] |= fields
  # Only So400m/16 for many languages has no projection of texts; any other file would lack a part.
  assumed = () if fields["text_linear"] else ("heads.text_linear",)
  if dialect == "SigLIP in big_vision":
    return Recognised(model, heads, image_size, "bilinear", sides, True, assumed, {}, (_WITHOUT_ANTIALIASING,))
  assumed = (*_assumed(model, sides, tensors), *(["text.epsilon"] if "text" in sides else []), *assumed)
  return Recognised(model, heads, image_size, "bicubic", sides, True, assumed, {})


def _is_openais(tensors: Mapping[str, np.ndarray], kind: str) -> bool:
  """Whether a file is one of OpenAI's: a TorchScript archive, or its state dict, which contains the resolution."""
  return kind == "torchscript" or "input_resolution" in tensors


def _activation(
  tensors: Mapping[str, np.ndarray], dialect: str, kind: str, extras: Mapping[str, Any], given: Mapping[str, Any]
) -> str | None:
  """The activation, as far as the file or the user tells it; None if GELU and QuickGELU are both likely.

  QuickGELU is that of OpenAI, SLIP (text) and DeCLIP. Models of open_clip, and those converted to Hugging Face's
  format, have either. The name of an open_clip run has the name of its model, and models with QuickGELU mostly have
  "quickgelu" in theirs. OpenAI's models are in half precision.
  """
  if dialect == "SLIP" or dialect.startswith("DeCLIP") or _is_openais(tensors, kind):
    return "quick_gelu"
  timm = "timm" in dialect  # whose image tower has GELU in any case
  told = [given.get(field) for field in ("text.activation", "image.activation")[: 1 if timm else 2]]
  if told := [activation for activation in told if isinstance(activation, str)]:
    return told[0]
  name = str(extras.get("name", ""))
  if "quickgelu" in name.lower():
    return "quick_gelu"
  if timm or _RUN_NAME.fullmatch(name):
    return "gelu"
  halves = any(tensor.dtype == np.float16 for tensor in tensors.values())
  return "quick_gelu" if halves and not name and dialect == "OpenAI" and kind == "torch" else None


def _assumed(model: Mapping[str, Any], sides: Iterable[str], tensors: Mapping[str, np.ndarray]) -> tuple[str, ...]:
  """The fields that no tensor determines."""
  of_kind = {"vit": ["image.activation", "image.heads", "image.epsilon"], "convnext": ["image.epsilon", "image_size"]}
  fields = of_kind.get(model["image"]["kind"], []) if "image" in sides else []
  if "visual.proj_bias" in tensors:  # of timm's ViTs and EVA-CLIP
    fields.append("image.branch_norm")
  if "text" in sides:
    fields += ["text.activation", "text.heads"]
    fields += ["text.eot"] if model["text"]["vocab_size"] not in OPENAI_VOCABULARIES else []
  return (*fields, *(("mean", "std", "squash", "interpolation") if "image" in sides else ()))


def _undecided(model: Mapping[str, Any], sides: Iterable[str], activation: str | None, dialect: str) -> dict[str, str]:
  """The fields of which several values are likely, and what to set them to."""
  fields, vit = {}, model["image"]["kind"] == "vit" and "image" in sides
  if activation is None and (vit or "text" in sides):
    fields["text.activation" if "text" in sides else "image.activation"] = (
      "'quick_gelu' in OpenAI's, mostly 'gelu' in open_clip's"
    )
  if "text" in sides and model["text"]["vocab_size"] not in OPENAI_VOCABULARIES:
    fields["text.eot"] = "id that ends a text"
  if vit and not model["image"]["pre_norm"] and "timm" not in dialect:
    fields["image.pooling"] = "'average' in CLIPA's, else 'token'"
    if "text" in sides:
      fields |= {"text.pooling": "'last' in CLIPA's, else 'eot'", "text.causal": "False in CLIPA's, else True"}
  return fields


def _depth(tensors: Iterable[str], prefix: str) -> int:
  numbers = {int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(prefix)}(\d{{1,6}})\.", name))}
  return len(numbers)


def _vit(tensors: Mapping[str, np.ndarray], activation: str, epsilon: float) -> tuple[dict[str, Any], int]:
  width, _, patch, _ = tensors["visual.conv1.weight"].shape
  blocks = "visual.transformer.resblocks."
  depth, probe = _depth(tensors, blocks), tensors.get("visual.attn_pool.probe")
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
    pooling="map" if "visual.head.probe" in tensors else "token" if probe is None else "query",
    pool_width=0 if probe is None else len(probe),
    branch_norm=(width, depth) == _EVA_E,
  ).to_dict()
  side = math.isqrt(tensors["visual.positional_embedding"].shape[0])
  return image, 384 if image["pooling"] == "map" and (patch, side) == _SO400M_384 else patch * side


def _resnet(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], int]:
  layers = tuple(_depth(tensors, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
  image = architectures.resnet(tensors["visual.conv3.weight"].shape[0], layers).to_dict()
  return image, 32 * math.isqrt(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)


def _convnext(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  stages = [f"visual.trunk.stages.{stage}.blocks." for stage in range(_depth(tensors, "visual.trunk.stages."))]
  widths = tuple(len(tensors[f"{stage}0.gamma"]) for stage in stages)
  hidden, layers = tensors.get("visual.head.mlp.fc1.weight"), tuple(_depth(tensors, stage) for stage in stages)
  epsilon = 1e-5 if widths[0] == 384 else 1e-6  # timm's xxlarge
  return architectures.convnext(widths, layers, 0 if hidden is None else len(hidden), epsilon).to_dict()


def _text(tensors: Mapping[str, np.ndarray], activation: str) -> dict[str, Any]:
  vocab_size, width = tensors["token_embedding.weight"].shape
  blocks = "transformer.resblocks."
  return architectures.text(
    width,
    _depth(tensors, blocks),
    heads=max(width // 64, 1),
    vocab_size=vocab_size,
    eot=OPENAI_EOT if vocab_size in OPENAI_VOCABULARIES else vocab_size - 1,
    context_length=tensors["positional_embedding"].shape[0],
    activation=activation,
    mlp_ratio=tensors[f"{blocks}0.mlp.c_fc.weight"].shape[0] / width,
    pooling="class" if "cls_emb" in tensors else "eot",
  ).to_dict()


def _heads(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], list[str]]:
  """Fields of `config.model.heads` that the tensors determine, and the heads that they belong to."""

  def widths(*names: str) -> tuple[int, ...]:
    return tuple(tensors[f"{name}.weight"].shape[0] for name in names)

  joint = ("token_embedding.weight", "visual.proj", "visual.head.probe")
  heads = ["joint"] if any(name in tensors for name in joint) else []
  fields: dict[str, Any] = {
    "image_linear": "visual.head.probe" not in tensors,
    "image_bias": "visual.attnpool.c_proj.bias" in tensors or "visual.proj_bias" in tensors,
    "text_bias": "text_projection.bias" in tensors,
    "text_linear": not {"visual.head.probe", "token_embedding.weight"} <= {*tensors}
    or any(name in tensors for name in ("text_projection", "text_projection.weight")),
  }
  if "text_projection" in tensors:
    fields["embed_dim"] = tensors["text_projection"].shape[1]
  elif "text_projection.weight" in tensors:
    fields["embed_dim"] = tensors["text_projection.weight"].shape[0]
  elif "visual.proj" in tensors:
    fields["embed_dim"] = tensors["visual.proj"].shape[1]
  elif "visual.head.probe" in tensors:
    fields["embed_dim"] = len(tensors["visual.head.probe"])
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

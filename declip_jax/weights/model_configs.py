"""Reads the config files that open_clip and Hugging Face write next to weights, as settings of `weights.read`.

A field that changes what a model computes, and that our towers do not support, is an error that names it, and the
family of models that has it (`weights.families`).
"""

from collections.abc import Mapping, Sequence
import json
import math
from pathlib import Path
import re
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, TypeVar

from declip_jax.architectures import OPENAI_MEAN, OPENAI_STD, SIGLIP_SIZES
from declip_jax.weights import families
from declip_jax.weights.recognise import OPENAI_EOT, OPENAI_VOCABULARIES
from declip_jax.weights.tensor_files import INDEX
from declip_jax.weights.tokenizer_files import (
  OPEN_CLIP_STEPS,
  is_sentence_pieces,
  padding_token,
  tokenizer_beside,
  tokenizer_fields,
)

Fields = Mapping[str, Any]
Value = TypeVar("Value")

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
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
  "proj_type": ("linear", "none", ""),
  "norm_kwargs": None,
  "timm_model_name": None,
  "timm_model_pretrained": None,
  "timm_pool": None,
  "timm_proj": None,
  "hf_tokenizer_name": None,
  "tokenizer_kwargs": None,
  "act_kwargs": None,
  "no_causal_mask": None,
  "pool_type": None,
  "final_ln_after_pool": None,
  "eos_id": None,
  "attentional_pool": None,
  "attn_pooler_queries": None,
  "attn_pooler_heads": None,
  "embed_cls": None,
  "output_tokens": None,
  # Without effect after training.
  "patch_dropout": None,
  "timm_drop": None,
  "timm_drop_path": None,
}
_TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16}
_TIMM_SIGLIP = re.compile(r"vit_(base|large|so400m|giantopt)_(patch\d+_siglip_\d+)(\.\w+)?")


class TimmTower(NamedTuple):
  """What open_clip's configs may say of a kind of towers of timm, and what no tensor of theirs tells.

  Attributes:
    names: pattern of their names.
    pool, proj: legal values of `timm_pool` and `timm_proj`.
    fields: fields of `config.model.image`.
  """

  names: str
  pool: tuple[str, ...]
  proj: tuple[str | None, ...]
  fields: Fields


_GELU = {"activation": "gelu", "epsilon": 1e-6}
_OF_TRUNK = (("token",), ("", None))  # pool and projection of a trunk that ends in the joint space
_TRUNK = {**_GELU, "heads": 16, "branch_norm": False}
_TIMM_TOWERS = (
  *(
    TimmTower(rf"vit_{size}_patch\d+(_\d+)?", ("token", ""), ("linear",), {**_GELU, "heads": heads})
    for size, heads in _TIMM_HEADS.items()
  ),
  TimmTower(r"vit_large_patch14_clip_(224|336)", *_OF_TRUNK, {**_TRUNK, "epsilon": 1e-5}),
  TimmTower(r"eva_giant_patch14_(224|336)", *_OF_TRUNK, _TRUNK),
  TimmTower(r"eva02_enormous_patch14_clip_224", *_OF_TRUNK, {**_TRUNK, "branch_norm": True}),
  TimmTower(r"convnext_xxlarge", ("",), ("linear", "mlp"), {"epsilon": 1e-5}),
  TimmTower(r"convnext_(tiny|small|base|large|xlarge)", ("",), ("linear", "mlp"), {"epsilon": 1e-6}),
)
# The sizes of SigLIP's image towers by their names in timm.
SIZES_IN_TIMM = {
  name: SIGLIP_SIZES[ours][0]
  for name, ours in (("base", "B"), ("large", "L"), ("so400m", "So400m"), ("giantopt", "g-opt"))
}
# The image towers of SigLIP that have the exact GELU in timm, although they were trained with that by a tanh.
EXACT_IN_TIMM = (
  *(f"base_patch16_siglip_{size}" for size in (224, 256, 384, 512)),
  *("large_patch16_siglip_256", "large_patch16_siglip_384"),
  *(f"so400m_patch14_siglip_{size}" for size in (224, 378, 384)),
)
TANH_IN_TIMM = (
  *("base_patch32_siglip_256", "large_patch16_siglip_512"),
  *(f"so400m_patch16_siglip_{size}" for size in (256, 384, 512)),
  *(f"giantopt_patch16_siglip_{size}" for size in (256, 384)),
)
# What transformers calls our activations.
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# Defaults of transformers' SiglipImageProcessor where they are not those of CLIPImageProcessor.
_SIGLIP_PROCESSOR = {
  "do_center_crop": False,
  "size": {"height": 224, "width": 224},
  "image_mean": [0.5, 0.5, 0.5],
  "image_std": [0.5, 0.5, 0.5],
}
_NO_END = 49407  # the end of text in every SigLIP config of transformers, although texts end with 1


def settings_beside(file: Path) -> dict[str, Any]:
  """The settings that config files in the folder of a weights file contain; none if there are no config files.

  Raises:
    ValueError: a config file is damaged, or describes a model that our towers cannot compute; the message names both.
  """
  folder = file.parent
  if not file.name.endswith((".safetensors", ".bin", ".msgpack", INDEX)):
    return {}
  if (folder / "open_clip_config.json").exists() and file.name.startswith("open_clip"):
    return _open_clip(folder / "open_clip_config.json")
  if (folder / "config.json").exists():
    return _hugging_face(folder)
  return {}


def read_json(file: Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    ValueError: it is damaged; the message names the file.
  """
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file} is not JSON: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{file} contains {type(content).__name__}, expected an object with fields")
  return content


def get(fields: Fields, name: str, default: Value, where: str) -> Value:
  """A field of a file, or its default if it is absent or null.

  Raises:
    ValueError: its type is not that of the default; the message begins with `where`.
  """
  value = fields.get(name)
  if value is None:
    return default
  expected = (int, float) if isinstance(default, float) else type(default)
  if not isinstance(value, expected) or isinstance(value, bool) != isinstance(default, bool):
    raise ValueError(f"{where}{name}={value!r:.80}: expected a value like {default!r}")
  return value


def _reject(where: str, value: Any, supported: Any) -> NoReturn:
  raise ValueError(f"{where}={value!r:.80} is not supported, only {supported}")


def _open_clip(file: Path) -> dict[str, Any]:
  about = read_json(file)
  model, preprocess = (get(about, name, {}, f"{file}: ") for name in ("model_cfg", "preprocess_cfg"))
  vision, text = (get(model, name, {}, f"{file}: model_cfg.") for name in ("vision_cfg", "text_cfg"))
  _check_open_clip(model, vision, text, file)
  quick = get(model, "quick_gelu", False, f"{file}: model_cfg.")
  return {
    **_open_clip_text(text, quick, file),
    **_open_clip_vision(vision, quick, f"{file}: vision_cfg."),
    **_open_clip_view(preprocess, file),
  }


def _open_clip_text(text: Fields, quick: bool, file: Path) -> dict[str, Any]:
  where = f"{file}: text_cfg."
  if get(text, "embed_cls", False, where):
    return _open_clip_coca_text(text, quick, where)
  settings = {
    "text.activation": _open_clip_activation(text, quick, where),
    "text.heads": get(text, "heads", 8, where),
    "text.epsilon": _epsilon(text, where),
    "text.causal": not get(text, "no_causal_mask", False, where),
    "text.pooling": "eot",
  }
  if get(text, "proj_type", "linear", where) == "none":
    settings["heads.text_linear"] = False
  vocab_size = get(text, "vocab_size", OPENAI_VOCABULARIES[0], where)
  match pool := get(text, "pool_type", "argmax", where):
    case "argmax":
      if name := get(text, "hf_tokenizer_name", "", where):  # the largest id is the end of OpenAI's texts only
        _reject(f"{where}hf_tokenizer_name", name, "'' with pool_type='argmax'")
      settings["text.eot"] = _largest_id(vocab_size)
    case "eos":
      settings["text.eot"] = get(text, "eos_id", 2, where)
    case "last":
      of_transformers = get(text, "hf_tokenizer_name", "", where)  # T5's or Gemma's, else OpenAI's
      settings |= {"text.pooling": "last", "text.eot": 1 if of_transformers else _largest_id(vocab_size)}
    case _:
      _reject(f"{where}pool_type", pool, "'argmax', 'eos' and 'last'")
  return settings | _open_clip_tokenizer(text, settings, file)


def _open_clip_coca_text(text: Fields, quick: bool, where: str) -> dict[str, Any]:
  """The settings of a text tower that ends with a class token, which sees the tokens before it."""
  for name, legal in (("no_causal_mask", False), ("pool_type", "argmax"), ("hf_tokenizer_name", "")):
    if (value := get(text, name, legal, where)) != legal:
      _reject(f"{where}{name}", value, f"{legal!r} with embed_cls")
  return {
    "text.activation": _open_clip_activation(text, quick, where),
    "text.heads": get(text, "heads", 8, where),
    "text.epsilon": _epsilon(text, where),
    "text.eot": _largest_id(get(text, "vocab_size", OPENAI_VOCABULARIES[0], where)),
    "text.pooling": "class",
  }


def _open_clip_activation(tower: Fields, quick: bool, where: str) -> str:
  options = get(tower, "act_kwargs", {}, where)
  if not options:
    return "quick_gelu" if quick else "gelu"
  if quick or options not in ({"approximate": "tanh"}, {"approximate": "none"}):
    _reject(f"{where}act_kwargs", options, {"approximate": "tanh"})
  return "gelu_tanh" if options["approximate"] == "tanh" else "gelu"


def _open_clip_tokenizer(text: Fields, found: Fields, file: Path) -> dict[str, Any]:
  """The tokenizer of transformers that the config names, if it lies beside, and the end of its texts."""
  where = f"{file}: text_cfg."
  options = get(text, "tokenizer_kwargs", {}, where)
  if not get(text, "hf_tokenizer_name", "", where):
    if options:
      _reject(f"{where}tokenizer_kwargs", options, "{} without an hf_tokenizer_name")
    return {}
  clean = get(options, "clean", "whitespace", f"{where}tokenizer_kwargs.")
  if unknown := set(options) - {"clean", "strip_sep_token"} or {clean} - set(OPEN_CLIP_STEPS):
    _reject(f"{where}tokenizer_kwargs", sorted(unknown), f"clean of {sorted(OPEN_CLIP_STEPS)} and strip_sep_token")
  strips = get(options, "strip_sep_token", False, f"{where}tokenizer_kwargs.")
  end = {"end": "[PAD]"} if strips else {}  # BERT's separator becomes the padding, id 0
  tokenizer = tokenizer_beside(file.parent, **end, clean=OPEN_CLIP_STEPS[clean])
  sees_padding = found["text.pooling"] == "last" or not found["text.causal"]
  if tokenizer and sees_padding and not padding_token(file.parent):
    raise ValueError(
      f"{file}: the text tower sees padding, but neither tokenizer_config.json nor special_tokens_map.json beside it "
      "has a usable pad_token: add it to one of them"
    )
  return {"text.eot": 0, **tokenizer} if strips else tokenizer


def _check_open_clip(model: Fields, vision: Fields, text: Fields, file: Path) -> None:
  """Rejects towers with fields that ours do not have, by the name of their family if it is known."""
  timm = get(vision, "timm_model_name", "", f"{file}: vision_cfg.")
  family = families.of_open_clip(model, vision, text)
  tower, of_timm = _timm_tower(timm), {}
  if timm and not tower:
    raise families.unsupported(str(file), family or "this image tower of timm", f"timm_model_name={timm!r:.60}")
  if tower:
    of_timm = {"timm_pool": tower.pool, "timm_proj": tower.proj}
    for name, default in (("timm_pool", "avg"), ("timm_proj", "linear")):
      if (value := vision.get(name, default)) not in of_timm[name]:
        _reject(f"{file}: vision_cfg.{name}", value, _words(of_timm[name]))
  for part, fields in (("vision_cfg", vision), ("text_cfg", text)):
    for name, value in fields.items():
      legal = of_timm.get(name) or _OPEN_CLIP_TOWER.get(name, (None, False, 0, 0.0, ""))
      if legal is None or value in legal:
        continue
      if family:
        raise families.unsupported(str(file), family, f"{part}.{name:.40}={value!r:.60}")
      supported = _words(legal) if name in of_timm else "a field without effect: false, 0 or an empty text"
      _reject(f"{file}: {part}.{name:.40}", value, supported)


def _timm_tower(name: str) -> TimmTower | None:
  """The kind of a tower of timm by its name, which may end with that of its weights; None if it is not known."""
  if _TIMM_SIGLIP.fullmatch(name):
    return TimmTower("", ("map",), ("none",), {})
  return next((tower for tower in _TIMM_TOWERS if re.fullmatch(rf"{tower.names}(\.\w+)?", name)), None)


def _words(values: Sequence[Any]) -> str:
  return " and ".join(repr(value) for value in values)


def _open_clip_vision(vision: Fields, quick: bool, where: str) -> dict[str, Any]:
  name = get(vision, "timm_model_name", "", where)
  if match := _TIMM_SIGLIP.fullmatch(name):
    if (kind := f"{match[1]}_{match[2]}") not in (*EXACT_IN_TIMM, *TANH_IN_TIMM):
      _reject(f"{where}timm_model_name", name, ", ".join(f"vit_{other}" for other in (*EXACT_IN_TIMM, *TANH_IN_TIMM)))
    return {
      "image_size": get(vision, "image_size", 224, where),
      "image.activation": "gelu" if kind in EXACT_IN_TIMM else "gelu_tanh",
      "image.heads": SIZES_IN_TIMM[match[1]].heads,
      "image.epsilon": 1e-6,
    }
  if tower := _timm_tower(name):
    size = {"image_size": get(vision, "image_size", 224, where)} if name.startswith("convnext") else {}
    return {**size, **{f"image.{field}": value for field, value in tower.fields.items()}}
  head_width = get(vision, "head_width", 64, where)
  if head_width < 1:
    _reject(f"{where}head_width", head_width, "1 or more")
  if isinstance(vision.get("layers"), list):
    if head_width != 64:
      _reject(f"{where}head_width", head_width, "64 for a ResNet, whose attention pool has heads of 64 channels")
    return {}
  attentional, heads = get(vision, "attentional_pool", False, where), get(vision, "attn_pooler_heads", 8, where)
  if attentional and heads != 8:
    _reject(f"{where}attn_pooler_heads", heads, 8)
  pool, norm_after = get(vision, "pool_type", "tok", where), get(vision, "final_ln_after_pool", False, where)
  if pool not in ("tok", "avg") or (pool == "avg" and not norm_after) or (pool == "avg" and attentional):
    _reject(f"{where}pool_type", pool, "'tok', and 'avg' with final_ln_after_pool")
  return {
    "image.activation": _open_clip_activation(vision, quick, where),
    "image.heads": get(vision, "width", 768, where) // head_width,
    "image.epsilon": _epsilon(vision, where),
    "image.pre_norm": not get(vision, "no_ln_pre", False, where),
    "image.pooling": "query" if attentional else "token" if pool == "tok" else "average",
  }


def _epsilon(tower: Fields, where: str) -> float:
  norm = get(tower, "norm_kwargs", {}, where)
  if others := sorted(set(norm) - {"eps"}):
    raise ValueError(f"{where}norm_kwargs has {others}: only 'eps' is supported")
  return get(norm, "eps", 1e-5, f"{where}norm_kwargs.")


def _open_clip_view(preprocess: Fields, file: Path) -> dict[str, Any]:
  where = f"{file}: preprocess_cfg."
  mode = get(preprocess, "resize_mode", "shortest", where)
  if mode not in ("shortest", "squash"):
    _reject(f"{where}resize_mode", mode, "'shortest' and 'squash'")
  settings: dict[str, Any] = {"squash": mode == "squash"}
  for name, default in (("mean", OPENAI_MEAN), ("std", OPENAI_STD)):
    settings[name] = _three(preprocess[name], f"{where}{name}") if name in preprocess else default
  return settings | {"interpolation": get(preprocess, "interpolation", "bicubic", where)}


def _largest_id(vocab_size: int) -> int:
  """The largest id that a text has: with OpenAI's vocabulary that of its end, even if ids were added after it."""
  return OPENAI_EOT if vocab_size > OPENAI_EOT else vocab_size - 1


def _three(values: Any, where: str) -> tuple[float, ...]:
  if not (isinstance(values, Sequence) and len(values) == 3 and all(type(x) in (int, float) for x in values)):
    raise ValueError(f"{where}={values!r}: expected three numbers")
  return tuple(map(float, values))


def _hugging_face(folder: Path) -> dict[str, Any]:
  file = folder / "config.json"
  about = read_json(file)
  if match := re.fullmatch(r"(clip|siglip|metaclip_2)_(vision|text)_model", str(about.get("model_type"))):
    whole = {"model_type": match[1], f"{match[2]}_config": about}  # the fields of one tower, which is alone
    found = _of_transformers(whole, file, with_images=match[2] == "vision")
    absent = "text." if match[2] == "vision" else "image."
    return {name: value for name, value in found.items() if not name.startswith(absent)}
  return _of_transformers(about, file)


def _of_transformers(about: Fields, file: Path, with_images: bool = True) -> dict[str, Any]:
  """The settings of a `config.json` of transformers, and of the files beside it; preprocessing only `with_images`."""
  folder = file.parent
  if (kind := about.get("model_type")) == "siglip":
    return _siglip(about, file, with_images)
  if kind not in ("clip", "metaclip_2"):
    if family := families.of_transformers(kind):
      raise families.unsupported(str(file), family, f"model_type={kind!r}")
    _reject(f"{file}: model_type", kind, "'clip', 'metaclip_2' and 'siglip'")
  vision, text = (get(about, name, {}, f"{file}: ") for name in ("vision_config", "text_config"))
  where = f"{file}: text_config."
  eot = get(text, "eos_token_id", OPENAI_EOT if kind == "metaclip_2" else 2, where)
  if eot == 2 and kind == "clip":  # an old mistake of theirs, which means the largest id of a text
    eot = _largest_id(get(text, "vocab_size", OPENAI_VOCABULARIES[0], where))
  settings = {
    "text.activation": _activation(text, "quick_gelu", where),
    "text.heads": get(text, "num_attention_heads", 8, where),
    "text.epsilon": get(text, "layer_norm_eps", 1e-5, where),
    "text.eot": eot,
  }
  where = f"{file}: vision_config."
  settings |= {
    "image.activation": _activation(vision, "quick_gelu", where),
    "image.heads": get(vision, "num_attention_heads", 12, where),
    "image.epsilon": get(vision, "layer_norm_eps", 1e-5, where),
  }
  settings |= tokenizer_beside(folder) if kind == "metaclip_2" else {}
  return settings | (_processor(folder, get(vision, "image_size", 224, where)) if with_images else {})


def _activation(tower: Fields, default: str, where: str) -> str:
  name = get(tower, "hidden_act", default, where)
  return _ACTIVATIONS.get(name, name)


def _siglip(about: Fields, file: Path, with_images: bool) -> dict[str, Any]:
  """The settings of transformers' SiglipModel, with defaults for B/16 at 224 pixels."""
  vision, text = (get(about, name, {}, f"{file}: ") for name in ("vision_config", "text_config"))
  settings: dict[str, Any] = {}
  for side, name, tower in (("image", "vision_config", vision), ("text", "text_config", text)):
    where = f"{file}: {name}."
    settings[f"{side}.activation"] = _activation(tower, "gelu_pytorch_tanh", where)
    settings[f"{side}.heads"] = get(tower, "num_attention_heads", 12, where)
    settings[f"{side}.epsilon"] = get(tower, "layer_norm_eps", 1e-6, where)
  if not get(vision, "vision_use_head", True, f"{file}: vision_config."):
    _reject(f"{file}: vision_config.vision_use_head", False, True)
  eot = get(text, "eos_token_id", _NO_END, f"{file}: text_config.")
  settings |= {"text.eot": 1 if eot == _NO_END else eot}
  settings |= _siglip_tokenizer(file.parent)
  if not with_images:
    return settings
  settings["image_size"] = get(vision, "image_size", 224, f"{file}: vision_config.")
  return settings | _processor(file.parent, settings["image_size"], _SIGLIP_PROCESSOR)


def _siglip_tokenizer(folder: Path) -> dict[str, Any]:
  """SigLIP's tokenizer removes punctuation and, if not told otherwise, upper case; that of SigLIP 2 only the latter."""
  if (side := tokenizer_fields(folder).get("padding_side", "right")) != "right":
    _reject(f"{folder / 'tokenizer_config.json'}: padding_side", side, "'right'")
  if not is_sentence_pieces(folder):
    return tokenizer_beside(folder, start="none", clean="lower")
  lower = tokenizer_fields(folder).get("do_lower_case", True)
  steps = (*(("lower",) if lower is not False else ()), "no_punctuation", "spaces")
  padding = {} if padding_token(folder) else {"pad": "</s>"}
  return tokenizer_beside(folder, start="none", clean=steps, **padding)


def _processor(folder: Path, image_size: int, defaults: Fields = MappingProxyType({})) -> dict[str, Any]:
  """The preprocessing in `processor_config.json`, which transformers 5 writes, or in `preprocessor_config.json`.

  Absent fields have the defaults of CLIPImageProcessor where `defaults` has none.
  """
  file, fields = folder / "processor_config.json", None
  if file.exists():
    fields = get(read_json(file), "image_processor", {}, f"{file}: ")
    where = f"{file}: image_processor."
  if not fields:
    file = folder / "preprocessor_config.json"
    if not file.exists():
      return {}
    fields, where = read_json(file), f"{file}: "
  fields = {**defaults, **{name: value for name, value in fields.items() if value is not None}}
  for name, needed in (("do_resize", True), ("do_rescale", True), ("rescale_factor", 1 / 255)):
    value = get(fields, name, needed, where)
    if not math.isclose(value, needed, rel_tol=1e-6):
      _reject(f"{where}{name}", value, needed)
  resample = get(fields, "resample", 3, where)
  if resample not in _RESAMPLE:
    _reject(f"{where}resample", resample, f"{_RESAMPLE}")
  settings: dict[str, Any] = {"interpolation": _RESAMPLE[resample], **_resizing(fields, image_size, where)}
  if not get(fields, "do_normalize", True, where):
    return settings | {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
  for ours, default in (("mean", OPENAI_MEAN), ("std", OPENAI_STD)):
    settings[ours] = _three(fields.get(f"image_{ours}", default), f"{where}image_{ours}")
  return settings


def _resizing(fields: Fields, image_size: int, where: str) -> dict[str, Any]:
  """The settings `resize` and `squash`: the shorter side resized and the centre cut out, or the whole image resized."""
  crops = get(fields, "do_center_crop", True, where)
  size, crop = (_sides(fields.get(name), name, where) for name in ("size", "crop_size"))
  shorter = size[0] if len(size) == 1 else 0
  squash = len(size) == 2
  if not crops and not squash:
    _reject(f"{where}do_center_crop", False, "True, or a size with height and width")
  height, width = size if not crops else crop or (image_size, image_size)
  if (height, width) != (image_size, image_size):
    raise ValueError(f"{where}: images of {height} x {width} pixels do not fit vision_config.image_size={image_size}")
  if (squash and size != (image_size, image_size)) or (shorter and shorter < image_size):
    _reject(f"{where}size", fields["size"], f"{image_size} pixels, or more for the shorter side")
  return {"squash": squash, "resize": shorter if shorter > image_size else 0}


def _sides(value: Any, name: str, where: str) -> tuple[int, ...]:
  """The shorter side, or height and width, of a size of transformers; empty if it is absent."""
  match value:
    case None:
      return ()
    case int() if name == "size":
      return (value,)
    case int():
      return (value, value)
    case {"shortest_edge": int() as shorter} if name == "size" and len(value) == 1:
      return (shorter,)
    case {"height": int() as height, "width": int() as width} if len(value) == 2:
      return (height, width)
  _reject(f"{where}{name}", value, "a number, 'shortest_edge', or 'height' and 'width'")

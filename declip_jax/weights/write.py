"""Writes our parameters as files of open_clip and Hugging Face, as ONNX and as an orbax export, without PyTorch."""

from collections.abc import Callable, Mapping
import json
import os
from pathlib import Path
from typing import Any

from einops import rearrange
import jax
from jaxtyping import Float, Int
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from declip_jax import __version__
from declip_jax.architectures import CONVNEXT_SIZES, TowerSize
from declip_jax.data.images import EvalView
from declip_jax.data.text.tokenizer import parse_name
from declip_jax.extras import import_package
from declip_jax.models.model import make_model
from declip_jax.runtime.plain_paths import plain_path
from declip_jax.unit_norm import unit_norm
from declip_jax.views import Views
from declip_jax.weights import dialects
from declip_jax.weights.layout import ModelFields, StateDict, layout, to_state_dict
from declip_jax.weights.model_configs import EXACT_IN_TIMM, SIZES_IN_TIMM, TANH_IN_TIMM
from declip_jax.weights.onnx_graph import Graph, Interface
from declip_jax.weights.onnx_primitives import to_onnx
from declip_jax.weights.read import EXPORT_FILE, Weights
from declip_jax.weights.recognise import OPENAI_EOT, OPENAI_VOCABULARIES
from declip_jax.weights.tokenizer_files import OPEN_CLIP_STEPS, copy_tokenizer, exported_files
from declip_jax.weights.vocabulary import SPECIAL, merges, vocabulary

_EXPORTED = ("joint", "sigmoid")  # heads that open_clip also has
# timm's names of vision transformers with a patch bias and without a norm before the blocks, by (width, depth, heads).
_TIMM_SIZES = {(192, 12, 3): "tiny", (384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large"}
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}  # what transformers calls ours, if other than we
_VERSION = {"declip_jax": __version__}  # in the JSON of each format or, of ONNX, in the metadata
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def write(weights: Weights, folder: str | os.PathLike[str], format: str) -> list[str]:
  """Writes weights as a folder in one of `FORMATS`.

  Args:
    weights: weights to write.
    folder: new or empty folder.
    format: "open_clip", "huggingface", "onnx" or "orbax".

  Returns:
    Notes on what was omitted or changed.

  Raises:
    ModuleNotFoundError: the extra `onnx` is missing; nothing is written.
    ValueError: unknown format, a folder in use, or a model that the format cannot represent; nothing is written.
  """
  if format not in FORMATS:
    raise ValueError(f"format={format!r}: choose one of {sorted(FORMATS)}")
  folder = Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder} already exists: choose a new folder, nothing is overwritten")
  if len(weights.params["towers"]) == 1 and "joint" in weights.heads:
    raise ValueError(f"these weights ({weights.origin}) are one tower: only models of both are exported")
  if format != "orbax":
    _check_embeddings(weights, format)
  if format in ("open_clip", "huggingface"):
    _check_towers(weights, format)
  return FORMATS[format](weights, folder)


def _check_embeddings(weights: Weights, format: str) -> None:
  """Rejects weights whose pooled embeddings were not trained: other tools compare nothing else."""
  if "joint" not in weights.heads:
    reason = "have no text tower"
  elif weights.tokens:
    reason = "were trained to compare tokens, not pooled embeddings"
  else:
    return
  raise ValueError(f"these weights ({weights.origin}) {reason}: {format} cannot represent them, orbax can")


def _check_towers(weights: Weights, format: str) -> None:
  """Rejects towers that the classes of the other project do not have, or that we only read."""
  model = weights.model
  image, text = model["image"], model["text"]
  found = {
    "norms after attention and MLP (EVA-CLIP)": image.get("branch_norm", False),
    "a learned query that pools (CoCa)": image.get("pooling") == "query",
    "a class token of texts (CoCa)": text["pooling"] == "class",
    "a bias of the projection of images": image["kind"] == "vit" and model["heads"]["image_bias"],
  }
  if unlike := [words for words, is_there in found.items() if is_there]:
    raise ValueError(f"{format} is not written for {', '.join(unlike)}; onnx and orbax can represent these weights")


def _open_clip(weights: Weights, folder: Path) -> list[str]:
  """A folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""
  text, heads, notes = weights.model["text"], weights.model["heads"], _omitted(weights)
  tensors = _tensors(weights)
  vision, dialect = _open_clip_vision(weights, tensors, notes)
  config = {
    "embed_dim": heads["embed_dim"],
    "quick_gelu": text["activation"] == "quick_gelu",
    "vision_cfg": vision,
    "text_cfg": {
      "context_length": text["context_length"],
      "vocab_size": text["vocab_size"],
      "width": text["width"],
      "heads": text["heads"],
      "layers": text["depth"],
      "mlp_ratio": _truncating_ratio(text),
      **_open_clip_projection(heads),
      **_open_clip_options(text),
    },
  }
  if dialect == "SigLIP in open_clip":
    config["custom_text"] = True
  if not text["causal"]:
    config["text_cfg"]["no_causal_mask"] = True
  if "logit_bias" in tensors:
    config["init_logit_bias"] = float(tensors["logit_bias"].reshape(()))
  preprocess = {
    "mean": list(weights.view.mean),
    "std": list(weights.view.std),
    "interpolation": weights.view.interpolation,
  }
  preprocess["resize_mode"] = "squash" if weights.view.squash else "shortest"
  if text["pooling"] == "last":
    config["text_cfg"]["pool_type"] = "last"
  elif not _pools_at_largest_id(text):
    config["text_cfg"] |= {"pool_type": "eos", "eos_id": text["eot"]}
  tokenizer, clean = _open_clip_tokenizer(text)
  if tokenizer:
    config["text_cfg"] |= {"hf_tokenizer_name": "tokenizer.json", "tokenizer_kwargs": {"clean": clean}}
  elif text["tokenizer"] != "openai" or text["eot"] != OPENAI_EOT:
    notes.append(_without_tokenizer(text, "open_clip would take OpenAI's"))
  if weights.view.resize:
    notes.append(
      f"omitted: resizing to {weights.view.resize} pixels before the crop of {weights.view.size}; open_clip resizes to "
      f"{weights.view.size}"
    )
  _save(folder, "open_clip_model.safetensors", dialects.from_openai(tensors, dialect))
  _write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess, **_VERSION})
  _write_files(folder, tokenizer)
  return notes


def _open_clip_options(tower: ModelFields) -> dict[str, Any]:
  """Fields of a tower that open_clip has only for other models than CLIP."""
  options: dict[str, Any] = {"act_kwargs": {"approximate": "tanh"}} if tower["activation"] == "gelu_tanh" else {}
  return options | ({"norm_kwargs": {"eps": tower["epsilon"]}} if tower["epsilon"] != 1e-5 else {})


def _open_clip_tokenizer(text: ModelFields) -> tuple[dict[str, bytes], str]:
  """The files of a tokenizer that open_clip's HFTokenizer can use, none if it cannot, and how it cleans texts."""
  kind, _, options = parse_name(text["tokenizer"])
  clean = next((name for name, steps in OPEN_CLIP_STEPS.items() if options.get("clean") == steps), "")
  usable = kind == "huggingface" and clean
  return exported_files(text["tokenizer"], text["context_length"]) if usable else {}, clean


def _pools_at_largest_id(text: ModelFields) -> bool:
  """Whether the end of a text has its largest id, at which other projects pool by default."""
  return text["tokenizer"] == "openai" and text["eot"] in (OPENAI_EOT, text["vocab_size"] - 1, text["vocab_size"] - 2)


def _without_tokenizer(text: ModelFields, consequence: str) -> str:
  return (
    f"omitted: a tokenizer; these weights have {text['vocab_size']} tokens and end texts with id {text['eot']} "
    f"(config.model.text.tokenizer={text['tokenizer']!r}), and {consequence}: pass token ids of your own"
  )


def _open_clip_vision(weights: Weights, tensors: StateDict, notes: list[str]) -> tuple[dict[str, Any], str]:
  """The `vision_cfg` and the dialect of its tensors; a bias of the patches may be added to the positions."""
  image, size = weights.model["image"], weights.view.size
  if image["kind"] == "resnet":
    return {"image_size": size, "layers": list(image["layers"]), "width": image["width"], "patch_size": None}, "OpenAI"
  if image["kind"] == "convnext":
    return _open_clip_convnext(weights), "open_clip, ConvNeXt of timm"
  if image["kind"] != "vit":
    raise ValueError(f"open_clip cannot represent an image tower of kind {image['kind']!r}")
  size_in_timm = (image["width"], image["depth"], image["heads"])
  timm = _TIMM_SIZES.get(size_in_timm)
  if image["pooling"] == "map":
    return _open_clip_siglip(weights, notes), "SigLIP in open_clip"
  like_timm = (not image["pre_norm"], image["patch_bias"], image["activation"] == "gelu", image["epsilon"] == 1e-6)
  like_timm += (image["pooling"] == "token",)
  if all(like_timm) and timm and image["patch"] == 16 and size in (224, 384):
    name = f"vit_{timm}_patch16_{size}"
    fields = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "token", "timm_proj": "linear"}
    return {**fields, "image_size": size}, "open_clip, timm trunk"
  if image["activation"] != weights.model["text"]["activation"]:
    raise ValueError(
      f"open_clip cannot represent an image tower with {image['activation']} and a text tower with "
      f"{weights.model['text']['activation']}, except for timm's sizes: patches of 16 pixels, images of 224 or 384, "
      f"(width, depth, heads) one of {sorted(_TIMM_SIZES)}, not {size_in_timm}"
    )
  fields = {
    "image_size": size,
    "layers": image["depth"],
    "width": image["width"],
    "head_width": image["width"] // image["heads"],
    "mlp_ratio": _truncating_ratio(image),
    "patch_size": image["patch"],
  }
  fields |= _open_clip_options(image)
  if not image["pre_norm"]:
    fields["no_ln_pre"] = True
  if image["pooling"] == "average":
    fields |= {"pool_type": "avg", "final_ln_after_pool": True}
  _fold_patch_bias(tensors, notes)
  return fields, "OpenAI"


def _open_clip_convnext(weights: Weights) -> dict[str, Any]:
  """The `vision_cfg` of a ConvNeXt, which is timm's."""
  image, heads = weights.model["image"], weights.model["heads"]
  size = (tuple(image["widths"]), tuple(image["layers"]))
  name = next((name for name, known in CONVNEXT_SIZES.items() if known == size), "")
  epsilon = 1e-5 if name == "xxlarge" else 1e-6
  if not name or image["epsilon"] != epsilon or image["hidden"] not in (0, 2 * heads["embed_dim"]):
    raise ValueError(
      f"open_clip can represent the ConvNeXts of timm, {', '.join(CONVNEXT_SIZES)}, with a hidden layer twice as wide "
      f"as the joint space or none; not {dict(image)}"
    )
  return {
    "timm_model_name": f"convnext_{name}",
    "timm_model_pretrained": False,
    "timm_pool": "",
    "timm_proj": "mlp" if image["hidden"] else "linear",
    "image_size": weights.view.size,
  }


def _open_clip_projection(heads: ModelFields) -> dict[str, Any]:
  """The fields of `text_cfg` about the projection of texts."""
  if not heads["text_linear"]:
    return {"proj_type": "none"}
  return {"proj_bias": True} if heads["text_bias"] else {}


def _open_clip_siglip(weights: Weights, notes: list[str]) -> dict[str, Any]:
  """The `vision_cfg` of an image tower with attention pooling, which is timm's."""
  image, size = weights.model["image"], weights.view.size
  size_of_tower = TowerSize(*(image[field] for field in TowerSize._fields))
  kind = next((name for name, known in SIZES_IN_TIMM.items() if known == size_of_tower), "")
  name = f"{kind}_patch{image['patch']}_siglip_{size}"
  like_timm = (
    *(not image["pre_norm"], image["patch_bias"], image["epsilon"] == 1e-6, not weights.model["heads"]["image_linear"]),
    image["activation"] in ("gelu", "gelu_tanh"),
  )
  if not all(like_timm) or name not in (*EXACT_IN_TIMM, *TANH_IN_TIMM):
    sizes = ", ".join(sorted((*EXACT_IN_TIMM, *TANH_IN_TIMM)))
    raise ValueError(f"open_clip can represent attention pooling only in image towers of timm, which are {sizes}")
  activation = "gelu" if name in EXACT_IN_TIMM else "gelu_tanh"
  if activation != image["activation"]:
    words = {"gelu": "the exact GELU", "gelu_tanh": "GELU by a tanh"}
    notes.append(
      f"changed: open_clip's image tower vit_{name} has {words[activation]} instead of {words[image['activation']]}, "
      "as in its own release of SigLIP; features differ slightly"
    )
  fields = {"timm_model_name": f"vit_{name}", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
  return {**fields, "image_size": size}


def _truncating_ratio(tower: ModelFields) -> float:
  """The ratio of the MLP's width for open_clip, which truncates the product; we round it."""
  width = tower["width"]
  hidden = round(tower["mlp_ratio"] * width)
  return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _hugging_face(weights: Weights, folder: Path) -> list[str]:
  """A folder for `CLIPModel.from_pretrained(FOLDER)` and `CLIPProcessor.from_pretrained(FOLDER)`."""
  image, text, heads, notes = weights.model["image"], weights.model["text"], weights.model["heads"], _omitted(weights)
  if image.get("pooling") == "map":
    return _siglip(weights, folder)
  if not text["causal"] or text["pooling"] != "eot" or image.get("pooling") == "average":
    raise ValueError(
      "Hugging Face's CLIPModel pools images at a class token and causal texts at their end: it cannot represent this "
      "model; open_clip's format may"
    )
  if image["kind"] != "vit" or not image["pre_norm"]:
    tower = "one without that norm" if image["kind"] == "vit" else f"a {image['kind']}"
    raise ValueError(
      "the image tower of Hugging Face's CLIPModel is a vision transformer with a norm before its blocks: it cannot "
      f"represent {tower}; open_clip's format may"
    )
  if text["eot"] == 2:  # which CLIPModel takes for the largest id of a text, an old mistake in configs
    raise ValueError("Hugging Face's CLIPModel cannot represent texts that end with id 2; open_clip's format can")
  tensors = _tensors(weights)
  _fold_patch_bias(tensors, notes)
  if not heads["text_linear"]:
    _add_text_projection(tensors, heads, notes)
  elif heads["text_bias"]:
    _fold_text_bias(tensors, notes)
  if tensors.pop("logit_bias", None) is not None:
    notes.append("omitted: logit_bias, which CLIPModel does not have")
  config = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": heads["embed_dim"],
    "logit_scale_init_value": float(tensors["logit_scale"]),
    "torch_dtype": "float32",
    "text_config": {
      "model_type": "clip_text_model",
      **_hugging_face_tower(text),
      "projection_dim": heads["embed_dim"],
      "max_position_embeddings": text["context_length"],
      "vocab_size": text["vocab_size"],
      "bos_token_id": text["eot"] - 1,
      "eos_token_id": text["eot"],
      "pad_token_id": text["eot"],
    },
    "vision_config": {
      "model_type": "clip_vision_model",
      **_hugging_face_tower(image),
      "projection_dim": heads["embed_dim"],
      "image_size": weights.view.size,
      "patch_size": image["patch"],
      "num_channels": 3,
    },
  }
  _save(folder, "model.safetensors", dialects.from_openai(tensors, "Hugging Face"))
  _write_json(folder / "config.json", {**config, **_VERSION})
  _write_preprocessor(weights.view, folder)
  if _has_openai_tokenizer(text):
    _write_tokenizer(text["context_length"], folder)
  else:
    notes.append(_without_tokenizer(text, "CLIPProcessor has none"))
  return notes


def _siglip(weights: Weights, folder: Path) -> list[str]:
  """A folder for `SiglipModel.from_pretrained(FOLDER)` and `SiglipProcessor.from_pretrained(FOLDER)`."""
  image, text, heads, notes = weights.model["image"], weights.model["text"], weights.model["heads"], _omitted(weights)
  if image["pre_norm"] or heads["image_linear"] or text["causal"] or text["pooling"] != "last":
    raise ValueError(
      "Hugging Face's SiglipModel has no norm before the blocks of the image tower and no projection of images, and "
      "pools texts, which are not causal, at their last position: it cannot represent this model; open_clip's format "
      "may"
    )
  tensors = _tensors(weights)
  tensors.setdefault("visual.conv1.bias", np.zeros(image["width"], np.float32))
  if not heads["text_linear"]:
    _add_text_projection(tensors, heads, notes)
  if "text_projection" in tensors:
    tensors |= {
      "text_projection.weight": np.ascontiguousarray(tensors.pop("text_projection").T),
      "text_projection.bias": np.zeros(heads["embed_dim"], np.float32),
    }
  tensors.setdefault("logit_bias", np.zeros((), np.float32))
  if "sigmoid" not in weights.heads:
    notes.append("added: a logit_bias of 0, which SiglipModel needs and the contrastive loss does not have")
  config = {
    "architectures": ["SiglipModel"],
    "model_type": "siglip",
    "torch_dtype": "float32",
    "text_config": {
      "model_type": "siglip_text_model",
      **_hugging_face_tower(text),
      "projection_size": heads["embed_dim"],
      "max_position_embeddings": text["context_length"],
      "vocab_size": text["vocab_size"],
      "bos_token_id": None,
      "eos_token_id": text["eot"],
    },
    "vision_config": {
      "model_type": "siglip_vision_model",
      **_hugging_face_tower(image),
      "image_size": weights.view.size,
      "patch_size": image["patch"],
      "num_channels": 3,
    },
  }
  tokenizer = _siglip_tokenizer(text)
  if not tokenizer:
    notes.append(_without_tokenizer(text, "SiglipProcessor has none"))
  _save(folder, "model.safetensors", dialects.from_openai(tensors, "SigLIP in transformers"))
  _write_json(folder / "config.json", {**config, **_VERSION})
  _write_preprocessor(weights.view, folder, "Siglip")
  _write_files(folder, tokenizer)
  return notes


# Tokenizers of transformers by the kind of ours and how it cleans texts, as fields of `tokenizer_config.json`.
_SIGLIP_TOKENIZERS = {
  ("sentencepiece", ("lower", "no_punctuation", "spaces")): {
    "tokenizer_class": "SiglipTokenizer",
    "do_lower_case": True,
  },
  ("huggingface", ("lower",)): {"tokenizer_class": "Siglip2Tokenizer"},
}


def _siglip_tokenizer(text: ModelFields) -> dict[str, bytes]:
  """The files of SigLIP's or SigLIP 2's tokenizer for transformers; empty if it is another one."""
  kind, _, options = parse_name(text["tokenizer"])
  known = _SIGLIP_TOKENIZERS.get((kind, options.get("clean")))
  usable = known and options.get("start") == ("none",)
  return exported_files(text["tokenizer"], text["context_length"], **known) if usable else {}


def _has_openai_tokenizer(text: ModelFields) -> bool:
  known = text["vocab_size"] in OPENAI_VOCABULARIES and text["eot"] == OPENAI_EOT
  return text["tokenizer"] == "openai" and known


def _onnx(weights: Weights, folder: Path) -> list[str]:
  """`image.onnx` and `text.onnx`, from float32 inputs and ids to unit embeddings, and the files of a processor.

  The names of inputs and outputs are those of transformers, and so are the files. Texts are as long as in training.
  """
  import_package("onnx")
  graphs, facts = _onnx_graphs(weights), _onnx_facts(weights)
  image, text, notes = weights.view, weights.model["text"], _omitted(weights)
  siglip = _siglip_tokenizer(text)
  openai = _has_openai_tokenizer(text)
  tokenizer = {} if openai else siglip or exported_files(text["tokenizer"], text["context_length"])
  folder.mkdir(parents=True, exist_ok=True)
  for side, graph in graphs.items():
    graph.save(folder / f"{side}.onnx", facts)
  _write_preprocessor(image, folder, "Siglip" if siglip else "CLIP")
  _write_files(folder, tokenizer)
  if openai:
    _write_tokenizer(text["context_length"], folder)
  elif not tokenizer:
    notes.append(_without_tokenizer(text, "the folder has none"))
  return notes


def _onnx_graphs(weights: Weights) -> dict[str, Graph]:
  """The graphs of the two towers."""
  model = make_model({**weights.model, "dtype": "float32"}, views=Views(), heads=weights.heads)
  params = {"params": weights.params, "collections": weights.collections}

  def encode_image(params: Any, pixels: Float[jax.Array, "b c h w"]) -> Float[jax.Array, "b d"]:
    return unit_norm(model.image_features(**params, images=rearrange(pixels, "b c h w -> b h w c")))

  def encode_text(params: Any, tokens: Int[jax.Array, "b t"]) -> Float[jax.Array, "b d"]:
    return unit_norm(model.text_features(**params, tokens=tokens))

  size, length = weights.view.size, weights.model["text"]["context_length"]
  pixels = Interface("pixel_values", "image_embeds", (3, size, size), np.float32)
  ids = Interface("input_ids", "text_embeds", (length,), np.int64)
  return {"image": to_onnx(encode_image, params, pixels), "text": to_onnx(encode_text, params, ids)}


def _onnx_facts(weights: Weights) -> dict[str, str]:
  """What a user of the two models needs besides them: logits are `logit_scale * cosine + logit_bias`."""
  heads, largest = weights.params["heads"], weights.model["heads"]["max_scale"]
  scale = float(np.exp(heads["logit_scale"]))
  facts = {"logit_scale": min(scale, largest) if largest else scale, "logit_bias": float(heads.get("logit_bias", 0))}
  return {"origin": weights.origin, **_VERSION} | {name: repr(value) for name, value in facts.items()}


def _hugging_face_tower(tower: ModelFields) -> dict[str, Any]:
  return {
    "hidden_size": tower["width"],
    "intermediate_size": round(tower["mlp_ratio"] * tower["width"]),
    "num_hidden_layers": tower["depth"],
    "num_attention_heads": tower["heads"],
    "hidden_act": _ACTIVATIONS.get(tower["activation"], tower["activation"]),
    "layer_norm_eps": tower["epsilon"],
    "attention_dropout": 0.0,
  }


def _write_preprocessor(view: EvalView, folder: Path, family: str = "CLIP") -> None:
  fields = {
    "image_processor_type": f"{family if view.squash else 'CLIP'}ImageProcessor",
    "processor_class": f"{family}Processor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": view.size, "width": view.size} if view.squash else {"shortest_edge": view.resize or view.size},
    "resample": _RESAMPLE[view.interpolation],
    "do_center_crop": not view.squash,
    "crop_size": {"height": view.size, "width": view.size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(view.mean),
    "image_std": list(view.std),
  }
  _write_json(folder / "preprocessor_config.json", fields)


def _write_tokenizer(context_length: int, folder: Path) -> None:
  start, end = SPECIAL
  tokens = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
  _write_json(folder / "vocab.json", vocabulary(), indent=None)
  (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges()) + "\n", encoding="utf-8")
  _write_json(folder / "special_tokens_map.json", tokens)
  fields = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True}
  _write_json(folder / "tokenizer_config.json", {**fields, **tokens})


def _orbax(weights: Weights, folder: Path) -> list[str]:
  """A folder for `declip_jax.load`: parameters and batch statistics without moments and neighbour bank."""
  heads = tuple(head for head in weights.heads if head != "bank")
  collections = {half: dict(weights.collections[half]) for half in ("towers", "heads")}
  bank = collections["heads"].pop("bank", None)
  folder.mkdir(parents=True, exist_ok=True)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = {"params": weights.params, "collections": collections}
    checkpointer.save(plain_path(folder) / "arrays", args=ocp.args.PyTreeSave(tree))
  text = dict(weights.model["text"])
  text["tokenizer"] = copy_tokenizer(text["tokenizer"], folder)
  about = {
    "origin": weights.origin,
    **_VERSION,
    "model": {**weights.model, "text": text},
    "heads": heads,
    "image_size": weights.view.size,
    "interpolation": weights.view.interpolation,
    "resize": weights.view.resize,
    "squash": weights.view.squash,
    "tokens": weights.tokens,
  }
  _write_json(folder / EXPORT_FILE, about)
  notes = ["omitted: the neighbour bank"] if bank else []
  return notes + ([f"omitted: {', '.join(sorted(weights.rest))}"] if weights.rest else [])


FORMATS: Mapping[str, Callable[[Weights, Path], list[str]]] = {
  "open_clip": _open_clip,
  "huggingface": _hugging_face,
  "onnx": _onnx,
  "orbax": _orbax,
}


def _omitted(weights: Weights) -> list[str]:
  heads = [head for head in weights.heads if head not in _EXPORTED]
  return [f"omitted: the heads that only training uses ({', '.join(heads)})"] if heads else []


def _tensors(weights: Weights) -> StateDict:
  """The tensors of towers, projections, temperature and logit bias under OpenAI's names, and PyTorch's counters."""
  variables = {"params": weights.params, "collections": weights.collections}
  tensors = to_state_dict(variables, layout(weights.model, [head for head in weights.heads if head in _EXPORTED]))
  if largest := weights.model["heads"]["max_scale"]:  # a clamp in the forward pass that other projects do not have
    tensors["logit_scale"] = np.minimum(tensors["logit_scale"], np.log(np.float32(largest)))
  for name in [name for name in tensors if name.endswith(".running_mean")]:
    counter = name.replace("running_mean", "num_batches_tracked")
    tensors[counter] = weights.rest.get(counter, np.zeros((), np.int64))
  return tensors


def _fold_patch_bias(tensors: StateDict, notes: list[str]) -> None:
  """Adds the bias of the patches to their position embeddings, which is equivalent; the class token has no patch."""
  bias = tensors.pop("visual.conv1.bias", None)
  if bias is not None:
    positions = tensors["visual.positional_embedding"].copy()
    positions[1:] += bias
    tensors["visual.positional_embedding"] = positions
    notes.append("changed: the bias of the patches was added to their position embeddings, which is equivalent")


def _add_text_projection(tensors: StateDict, heads: ModelFields, notes: list[str]) -> None:
  """Adds the identity as the projection of texts, which the other project always has."""
  tensors["text_projection"] = np.eye(heads["embed_dim"], dtype=np.float32)
  notes.append("added: the identity as the projection of texts, which these weights do not have")


def _fold_text_bias(tensors: StateDict, notes: list[str]) -> None:
  """Moves the bias of the text projection into the projection and the norm before it, which is equivalent.

  What a norm gives before its scale and bias sums to 0, so a row of the projection may have any number added to all of
  its weights. Here it is the one with which a norm of scale 1 and bias 1 gives the constant part of the embedding.
  """
  names = ("text_projection.weight", "text_projection.bias", "ln_final.weight", "ln_final.bias")
  kernel, bias, scale, shift = (tensors.pop(name).astype(np.float64) for name in names)
  scaled = kernel * scale
  scaled += ((kernel @ shift + bias - scaled.sum(axis=1)) / scale.size)[:, None]
  tensors["ln_final.weight"] = tensors["ln_final.bias"] = np.ones(scale.shape, np.float32)
  tensors["text_projection"] = np.array(scaled.T, np.float32, order="C")
  notes.append(
    "changed: the bias of the text projection was moved into the projection and the norm before it; embeddings are the "
    "same, other states after this norm are not"
  )


def _save(folder: Path, name: str, tensors: Mapping[str, np.ndarray]) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  whole = {key: np.array(tensor, order="C") for key, tensor in tensors.items()}
  (folder / name).touch()
  mode = (folder / name).stat().st_mode
  safetensors.numpy.save_file(whole, folder / name, metadata={"format": "pt"})
  (folder / name).chmod(mode)  # the library makes a file that only its owner can read


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
  for name, content in files.items():
    (folder / name).write_bytes(content)


def _write_json(file: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
  file.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")

"""Our parameters as the files of open_clip and Hugging Face, and as an orbax checkpoint of their own. No PyTorch."""

from collections.abc import Callable, Mapping
import json
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from declip_jax.weights import dialects
from declip_jax.weights.layout import StateDict, layout, to_state_dict
from declip_jax.weights.read import EXPORT_FILE, Weights
from declip_jax.weights.vocabulary import SPECIAL, merges, vocabulary

_EXPORTED = ("joint", "sigmoid")  # heads for which open_clip has a place
# timm's names of the vision transformers that have a patch bias and no norm in front, by (width, depth, heads).
_TIMM_SIZES = {(192, 12, 3): "tiny", (384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large"}
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_LARGEST_FOLD_ERROR = 1e-4  # of a bias moved into a norm, relative to it


def write(weights: Weights, folder: str | os.PathLike[str], format: str) -> list[str]:
  """Writes weights as a folder in one of `FORMATS`.

  Args:
    weights: what to write.
    folder: where to; it must be empty or not exist yet.
    format: "open_clip", "huggingface" or "orbax".

  Returns:
    What is left out or changed, as sentences.

  Raises:
    ValueError: unknown format, a folder in use, or a model for which the format has no place; nothing is written then.
  """
  if format not in FORMATS:
    raise ValueError(f"format {format!r}: choose one of {sorted(FORMATS)}")
  folder = Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder} exists already: give a new folder, nothing is overwritten")
  if format != "orbax":
    _check_embeddings(weights, format)
  return FORMATS[format](weights, folder)


def _check_embeddings(weights: Weights, format: str) -> None:
  """Refuses weights without pooled embeddings that were trained, since these are all that other tools compare."""
  if "joint" not in weights.heads:
    lack = "have no text tower"
  elif weights.tokens:
    lack = "were trained to compare tokens and not pooled embeddings"
  else:
    return
  raise ValueError(f"these weights ({weights.origin}) {lack}: {format} has no place for them, orbax has")


def _open_clip(weights: Weights, folder: Path) -> list[str]:
  """A folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""
  model, notes = weights.model, _left_out(weights)
  tensors = _tensors(weights)
  vision, dialect = _open_clip_vision(weights, tensors, notes)
  config = {
    "embed_dim": model.heads.embed_dim,
    "quick_gelu": model.text.activation == "quick_gelu",
    "vision_cfg": vision,
    "text_cfg": {
      "context_length": model.text.context_length,
      "vocab_size": model.text.vocab_size,
      "width": model.text.width,
      "heads": model.text.heads,
      "layers": model.text.depth,
      "mlp_ratio": _truncating_ratio(model.text),
      **({"proj_bias": True} if model.heads.text_bias else {}),
    },
  }
  if "logit_bias" in tensors:
    config["init_logit_bias"] = float(tensors["logit_bias"].reshape(()))
  preprocess = {
    "mean": list(weights.view.mean),
    "std": list(weights.view.std),
    "interpolation": weights.view.interpolation,
  }
  preprocess["resize_mode"] = "shortest"
  if weights.view.resize:
    notes.append(
      f"left out: the resize to {weights.view.resize} pixels before evaluation cuts out {weights.view.size}; open_clip "
      "resizes to the latter"
    )
  _save(folder, "open_clip_model.safetensors", dialects.from_openai(tensors, dialect))
  _write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
  return notes


def _open_clip_vision(weights: Weights, tensors: StateDict, notes: list[str]) -> tuple[dict[str, Any], str]:
  """The `vision_cfg` and the dialect; a patch bias may move into the positions."""
  image, size = weights.model.image, weights.view.size
  if image.kind == "resnet":
    return {"image_size": size, "layers": list(image.layers), "width": image.width, "patch_size": None}, "OpenAI"
  if image.kind != "vit":
    raise ValueError(f"open_clip has no place for an image tower of kind {image.kind!r}")
  timm = _TIMM_SIZES.get((image.width, image.depth, image.heads))
  like_timm = (not image.pre_norm, image.patch_bias, image.activation == "gelu", image.epsilon == 1e-6)
  if all(like_timm) and timm and image.patch == 16 and size in (224, 384):
    name = f"vit_{timm}_patch16_{size}"
    fields = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "token", "timm_proj": "linear"}
    return {**fields, "image_size": size}, "open_clip, timm trunk"
  if image.activation != weights.model.text.activation:
    raise ValueError(
      f"open_clip has no place for an image tower with {image.activation} beside a text tower with "
      f"{weights.model.text.activation}, but for timm's own sizes: patches of 16 pixels, images of 224 or 384, "
      f"(width, depth, heads) one of {sorted(_TIMM_SIZES)}; this one has {(image.width, image.depth, image.heads)}"
    )
  fields = {
    "image_size": size,
    "layers": image.depth,
    "width": image.width,
    "head_width": image.width // image.heads,
    "mlp_ratio": _truncating_ratio(image),
    "patch_size": image.patch,
  }
  if image.epsilon != 1e-5:
    fields["norm_kwargs"] = {"eps": image.epsilon}
  if not image.pre_norm:
    fields["no_ln_pre"] = True
  _fold_patch_bias(tensors, notes)
  return fields, "OpenAI"


def _truncating_ratio(part: ConfigDict) -> float:
  """The ratio of the MLP's width for open_clip, which truncates the product where we round it."""
  hidden = round(part.mlp_ratio * part.width)
  return hidden / part.width if int(part.width * (hidden / part.width)) == hidden else (hidden + 0.5) / part.width


def _hugging_face(weights: Weights, folder: Path) -> list[str]:
  """A folder for `CLIPModel.from_pretrained(FOLDER)` and `CLIPProcessor.from_pretrained(FOLDER)`."""
  model, notes = weights.model, _left_out(weights)
  image, text = model.image, model.text
  if image.kind != "vit" or not image.pre_norm:
    raise ValueError(
      "Hugging Face's CLIPModel has a vision transformer with a norm in front of its blocks and no other image tower: "
      f"no place for {'one without that norm' if image.kind == 'vit' else f'a {image.kind}'}; open_clip's may have one"
    )
  tensors = _tensors(weights)
  _fold_patch_bias(tensors, notes)
  if model.heads.text_bias:
    _fold_text_bias(tensors, notes)
  if tensors.pop("logit_bias", None) is not None:
    notes.append("left out: logit_bias, which CLIPModel does not have")

  def tower(part: ConfigDict, epsilon: float) -> dict[str, Any]:
    return {
      "hidden_size": part.width,
      "intermediate_size": round(part.mlp_ratio * part.width),
      "num_hidden_layers": part.depth,
      "num_attention_heads": part.heads,
      "hidden_act": part.activation,
      "layer_norm_eps": epsilon,
      "projection_dim": model.heads.embed_dim,
      "attention_dropout": 0.0,
    }

  config = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": model.heads.embed_dim,
    "logit_scale_init_value": float(tensors["logit_scale"]),
    "torch_dtype": "float32",
    "text_config": {
      "model_type": "clip_text_model",
      **tower(text, 1e-5),
      "max_position_embeddings": text.context_length,
      "vocab_size": text.vocab_size,
      "bos_token_id": text.eot - 1,
      "eos_token_id": text.eot,
      "pad_token_id": text.eot,
    },
    "vision_config": {
      "model_type": "clip_vision_model",
      **tower(image, image.epsilon),
      "image_size": weights.view.size,
      "patch_size": image.patch,
      "num_channels": 3,
    },
  }
  _save(folder, "model.safetensors", dialects.from_openai(tensors, "Hugging Face"))
  _write_json(folder / "config.json", config)
  _write_preprocessor(weights, folder)
  if text.tokenizer == "openai" and text.vocab_size in (49408, 49409) and text.eot == 49407:
    _write_tokenizer(text.context_length, folder)
  else:
    notes.append(f"left out: a tokenizer, since the {text.vocab_size} tokens are not OpenAI's vocabulary")
  return notes


def _write_preprocessor(weights: Weights, folder: Path) -> None:
  view = weights.view
  fields = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "CLIPProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": view.resize or view.size},
    "resample": _RESAMPLE[view.interpolation],
    "do_center_crop": True,
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
  """Parameters and batch statistics without moments and bank; `declip_jax.load` reads it."""
  heads = tuple(head for head in weights.heads if head != "bank")
  collections = {half: dict(weights.collections[half]) for half in ("towers", "heads")}
  bank = collections["heads"].pop("bank", None)
  folder.mkdir(parents=True, exist_ok=True)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = {"params": weights.params, "collections": collections}
    checkpointer.save((folder / "arrays").resolve(), args=ocp.args.PyTreeSave(tree))
  about = {
    "origin": weights.origin,
    "model": weights.model.to_dict(),
    "heads": heads,
    "image_size": weights.view.size,
    "interpolation": weights.view.interpolation,
    "resize": weights.view.resize,
    "tokens": weights.tokens,
  }
  _write_json(folder / EXPORT_FILE, about)
  notes = ["left out: the neighbour bank"] if bank else []
  return notes + ([f"left out: {', '.join(sorted(weights.rest))}"] if weights.rest else [])


FORMATS: Mapping[str, Callable[[Weights, Path], list[str]]] = {
  "open_clip": _open_clip,
  "huggingface": _hugging_face,
  "orbax": _orbax,
}


def _left_out(weights: Weights) -> list[str]:
  heads = [head for head in weights.heads if head not in _EXPORTED]
  return [f"left out: the heads that only training uses ({', '.join(heads)})"] if heads else []


def _tensors(weights: Weights) -> StateDict:
  """The tensors of towers, projections, temperature and bias under OpenAI's names, and PyTorch's counters."""
  variables = {"params": weights.params, "collections": weights.collections}
  tensors = to_state_dict(variables, layout(weights.model, [head for head in weights.heads if head in _EXPORTED]))
  if largest := weights.model.heads.max_scale:  # a clamp of the forward pass, which other projects do not have
    tensors["logit_scale"] = np.minimum(tensors["logit_scale"], np.log(np.float32(largest)))
  for name in [name for name in tensors if name.endswith(".running_mean")]:
    counter = name.replace("running_mean", "num_batches_tracked")
    tensors[counter] = weights.rest.get(counter, np.zeros((), np.int64))
  return tensors


def _fold_patch_bias(tensors: StateDict, notes: list[str]) -> None:
  """Adds a bias of the patches to their positions, which is the same; the class token has no patch."""
  bias = tensors.pop("visual.conv1.bias", None)
  if bias is not None:
    positions = tensors["visual.positional_embedding"].copy()
    positions[1:] += bias
    tensors["visual.positional_embedding"] = positions
    notes.append("changed: the bias of the patches was added to their position embeddings, which gives the same")


def _fold_text_bias(tensors: StateDict, notes: list[str]) -> None:
  """Moves the bias of the text projection into that of the norm before it, where the projection can reach it."""
  kernel, bias = tensors.pop("text_projection.weight").astype(np.float64), tensors.pop("text_projection.bias")
  shift = np.linalg.lstsq(kernel, bias.astype(np.float64), rcond=None)[0]
  error = np.abs(kernel @ shift - bias).max() / max(np.abs(bias).max(), 1e-12)
  if not error < _LARGEST_FOLD_ERROR:
    raise ValueError(
      "Hugging Face's CLIPModel has no place for a bias of the text projection, and this one cannot be moved into the "
      f"norm before it: {bias.size} numbers from {kernel.shape[1]}; open_clip's format has a place"
    )
  tensors["ln_final.bias"] = (tensors["ln_final.bias"] + shift).astype(np.float32)
  tensors["text_projection"] = np.array(kernel.T, np.float32, order="C")
  notes.append("changed: the bias of the text projection moved into the norm before it, which gives the same")


def _save(folder: Path, name: str, tensors: Mapping[str, np.ndarray]) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  whole = {key: np.array(tensor, order="C") for key, tensor in tensors.items()}
  safetensors.numpy.save_file(whole, folder / name, metadata={"format": "pt"})


def _write_json(file: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
  file.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")

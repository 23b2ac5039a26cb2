"""Which released models `load` reads: `make released-weights` writes the matrix of docs/released_weights.md.

Each model is built by the code of its own project, with every option of its config but few and narrow layers, and with
random parameters. It is saved as that project saves it, read here, and compared: the pixels of odd images, the ids of
odd captions, unit embeddings, and logits. No weights are downloaded, and tokenizers of transformers are small ones
trained here, with the special tokens of the real ones.

  python benchmarks/released_weights.py --only 'ViT-B-.*' --output page.md

The whole takes 40 minutes on two cores. Results are kept in `--rows`, so that an interrupted run resumes; those of
other code are not used.
"""

import argparse
import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
import copy
import functools
import hashlib
import json
from pathlib import Path
import re
import sys
import tempfile
import time
from typing import Any, NamedTuple
from unittest import mock
import warnings

import big_vision_models
from command import parser
import jax
import numpy as np
from optional_imports import optional_import
import PIL.Image

from declip_jax.clip import Clip, load
from declip_jax.weights import read as read_lib
from declip_jax.weights.model_configs import settings_beside
from declip_jax.weights.read import from_state_dict
from declip_jax.weights.settings import VIEW

open_clip: Any = optional_import("open_clip")
import timm  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

ROOT = Path(__file__).parents[1]
CODE = (
  "benchmarks/released_weights.py",
  "benchmarks/big_vision_models.py",
  "declip_jax/data/images",
  "declip_jax/data/text",
  "declip_jax/models",
)
CODE += ("declip_jax/weights",)  # what results depend on
TOLERANCE = 1e-4  # of unit embeddings, and of cosines
CAPTIONS = 500
STATUSES = ("equal", "remark", "refused", "not compared", "WRONG")  # from best to worst
RUN = "2026_01_31-00_00_00-model_{}-lr_0.0005-b_64-j_4-p_amp"  # how open_clip names a run
SIZES = [(300, 200), (64, 90), (41, 57), (50, 400), (1, 1), (233, 224)]
FRAGMENTS = (
  [
    "a photo of a",
    "CAT",
    "dogs,",
    "  ",
    "\t",
    "naïve café",
    "it's 1999!",
    "&amp;",
    "&amp;lt;b&gt;",
    "#sunset",
    "x" * 99,
  ]
  + [
    "красный",
    "猫の写真",
    "🚗",
    "👩‍👩‍👧",
    "№7",
    "e\u0301",
    "ﬁne",
    "“quoted”",
    "1,000.5%",
    "snake_case",
    "\u200b",
    "Ünï",
  ]
  + ["--", "…", "\\n", "don't", "O'CLOCK", "日本", "हिन्दी", "عربى", "\u00a0", "½", "a/b", "(e.g.)", "@you", "😀" * 5]
)

# Kinds of text towers of transformers, by what their names contain.
LANGUAGE_MODELS = {"xlm-roberta": "xlm-roberta", "roberta": "roberta", "nllb": "m2m_100", "mt5": "mt5"}
BERT_WORDS = tokenizers.pre_tokenizers.BertPreTokenizer()


class Result(NamedTuple):
  """Whether one model is read.

  Attributes:
    status: "equal", "remark" or "refused"; "WRONG" if it differs without a word; "not compared" where `--only` is set.
    difference: largest difference of unit embeddings.
    remark: remark or refusal.
  """

  status: str
  difference: float = 0.0
  remark: str = ""


def captions(count: int = CAPTIONS) -> list[str]:
  """Odd captions, many of them too long or empty of letters; none begins with a space."""
  rng = np.random.default_rng(0)
  drawn = [" ".join(rng.choice(FRAGMENTS, rng.integers(1, 9))) for _ in range(count - 2)]
  return ["", "a " * 400, *(text.lstrip() for text in drawn)]


def pictures() -> list[PIL.Image.Image]:
  rng = np.random.default_rng(1)
  colours = [PIL.Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in SIZES]
  return [*colours, colours[0].convert("L").convert("RGB")]


def stand_in(folder: Path, length: int, kind: str) -> None:
  """A small tokenizer of transformers in a folder, with the special tokens of "gemma", "xlm-r" or "bert"."""
  roles = {"bert": ("[PAD]", "[SEP]", "[CLS]", "[UNK]")}.get(kind, ("<pad>", "</s>", "<s>", "<unk>"))
  pad, end, start, unknown = roles
  special = [start, pad, end, unknown] if kind == "xlm-r" else [*roles]
  if kind == "bert":
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=unknown))
    tokenizer.normalizer, tokenizer.pre_tokenizer = tokenizers.normalizers.BertNormalizer(), BERT_WORDS
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=420, special_tokens=special, show_progress=False)
  else:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, special_tokens=tokens, show_progress=False)
  tokenizer.train_from_iterator(FRAGMENTS, trainer)
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"$A {end}" if kind == "gemma" else f"{start} $A {end}",
    special_tokens=[(name, special.index(name)) for name in (start, end)],
  )
  content = json.loads(tokenizer.to_str())
  content["added_tokens"] = content["added_tokens"][: len(special)]  # bytes are text
  made = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content)),
    eos_token=end,
    sep_token=end,
    pad_token=pad,
    unk_token=unknown,
    model_max_length=length,
  )
  made.save_pretrained(folder)


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
  """Random parameters where a project starts with zeros, ones or tiny numbers."""
  generator = torch.Generator().manual_seed(0)
  for name, x in [*model.named_parameters(), *model.named_buffers()]:
    if "running_var" in name or (x.ndim == 1 and name.endswith("weight")) or name.endswith(("gamma", "running_mean")):
      x.uniform_(0.8, 1.2, generator=generator) if "mean" not in name else x.normal_(0, 0.1, generator=generator)
    elif x.is_floating_point() and (x.ndim == 1 or float(x.abs().max()) < 1e-3) and "attn_mask" not in name:
      x.normal_(0, 0.05, generator=generator)


# --- open_clip ---


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
  """A model config with the same options and fewer, narrower layers; towers of timm are narrowed by `_few_blocks`."""
  config = copy.deepcopy(dict(config))
  vision, text = config["vision_cfg"], config["text_cfg"]
  if isinstance(vision.get("layers"), list):
    vision |= {"layers": [1, 2, 1, 1], "width": 16}
  elif "timm_model_name" not in vision:
    vision |= {"layers": 2, "width": 2 * vision.get("head_width", 64)}  # 128 or more
  if "hf_model_name" not in text:
    text["layers"] = 2
    if text.get("proj_type", "linear") != "none":  # else the width is that of the joint space
      text |= {"width": 2 * text.get("width", 512) // text.get("heads", 8), "heads": 2}
    text["vocab_size"] = 420 if "hf_tokenizer_name" in text else text.get("vocab_size", 49408)
  if "multimodal_cfg" in config:
    config["multimodal_cfg"] |= {"layers": 1, "width": text["width"], "heads": 2, "attn_pooler_heads": 2}
  own_width = vision.get("timm_proj", "linear") == "none" and "timm_model_name" in vision
  config["embed_dim"] = config["embed_dim"] if own_width else 2 * config["embed_dim"] // config["embed_dim"] * 64
  return config


@contextlib.contextmanager
def few_blocks() -> Iterator[None]:
  """Makes timm and transformers build towers of few blocks; ConvNeXt's and those of texts are narrow, too."""
  original = timm.create_model

  def create(name: str, **fields: Any) -> torch.nn.Module:
    if name.startswith("convnext"):
      fields |= {"depths": (1, 2, 3, 1), "dims": (16, 32, 48, 64)}
    elif name.startswith(("vit_", "eva")):
      fields |= {"depth": 2}
    return original(name, **fields)

  def tiny_config(name: str, **_: Any) -> transformers.PretrainedConfig:
    kind = next(kind for start, kind in LANGUAGE_MODELS.items() if start in name)
    fields = {"d_model": 64, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 420, "intermediate_size": 96}
    return transformers.AutoConfig.for_model(kind, **fields, num_attention_heads=2, encoder_layers=2, decoder_layers=1)

  with (
    mock.patch.object(timm, "create_model", create),
    mock.patch.object(transformers.AutoConfig, "from_pretrained", tiny_config),
  ):
    yield


def build(config: Mapping[str, Any]) -> torch.nn.Module:
  """open_clip's model of a config, as its factory chooses the class."""
  fields = {key: value for key, value in config.items() if key not in ("custom_text", "preprocess_cfg")}
  if language_model := "hf_model_name" in config["text_cfg"]:
    fields["text_cfg"] = {**config["text_cfg"], "hf_model_pretrained": False}
  if "multimodal_cfg" in config:
    return open_clip.CoCa(**fields)
  custom = config.get("custom_text") or language_model
  return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**fields)


class OpenClip:
  """One model config of open_clip, built with random parameters, and compared in the forms of its released names.

  `whole` models have all blocks at their width.
  """

  def __init__(self, name: str, quick: bool, whole: bool = False):
    self.name = name
    config = open_clip.get_model_config(name)
    config = config if whole else shrunk(config)
    self.text, self.size = config["text_cfg"], config["vision_cfg"].get("image_size", 224)
    if quick:
      config["quick_gelu"] = True
    self.config = config
    with contextlib.nullcontext() if whole else few_blocks():
      self.model = build(config).eval()
    randomise(self.model)

  def write(self, folder: Path, preprocess: Mapping[str, Any]) -> Callable[[list[str]], torch.Tensor]:
    """A folder as of open_clip's models on the hub; returns the tokenizer."""
    torch.save(self.model.state_dict(), folder / "open_clip_pytorch_model.bin")
    about = {"model_cfg": self.config, "preprocess_cfg": dict(preprocess)}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    length = self.text.get("context_length", 77)
    if "hf_tokenizer_name" not in self.text:
      return functools.partial(open_clip.tokenizer.SimpleTokenizer(), context_length=length)
    options = self.text.get("tokenizer_kwargs", {})
    kind = "bert" if options.get("strip_sep_token") else "xlm-r" if self.text.get("eos_id") == 2 else "gemma"
    stand_in(folder, length, kind)
    return open_clip.tokenizer.HFTokenizer(str(folder), context_length=length, **options)

  def result(self, preprocess: Mapping[str, Any]) -> Result:
    """Whether the folder is read."""
    with tempfile.TemporaryDirectory() as path:
      folder = Path(path)
      tokenize = self.write(folder, preprocess)
      try:
        ours = load(folder)
      except ValueError as error:
        return Result("refused", remark=sentence(error, folder))
      fields = {**preprocess, "interpolation": preprocess.get("interpolation", "bicubic")}
      process = open_clip.image_transform(self.size, is_train=False, **fields)
      found = compare(ours, self.model, process, tokenize)
      if ours.remarks and found.status == "equal":
        found = found._replace(status="remark", remark="; ".join(ours.remarks))
      return found


def of_training(name: str) -> Result:
  """Whether the file of a training run is read: only names and shapes of tensors, at full size, and the run's name."""
  config = open_clip.get_model_config(name)
  language_model = "hf_model_name" in config["text_cfg"]
  with torch.device("meta"), few_blocks() if language_model else contextlib.nullcontext():
    shapes = {key: tuple(x.shape) for key, x in build(config).state_dict().items()}
  tensors = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
  with tempfile.TemporaryDirectory() as path, mock.patch.object(read_lib, "to_variables", return_value={"params": {}}):
    try:
      weights = from_state_dict(tensors, name="FILE", extras={"epoch": 1, "name": RUN.format(name)})
    except ValueError as error:
      return Result("refused", remark=str(error))
    (Path(path) / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    try:
      settings = settings_beside(Path(path) / "open_clip_model.safetensors")
      settings = {field: value for field, value in settings.items() if field not in VIEW}
      described = from_state_dict(tensors, settings)
    except ValueError as error:
      return Result("WRONG", remark=str(error))
  differ = [*_differ(described.model, weights.model, ("image", "text", "heads"))]
  if unnamed := [field for field in differ if not any(f"{field}=" in remark for remark in weights.remarks)]:
    return Result("WRONG", remark=f"differs without a remark: {', '.join(unnamed)}")
  if weights.remarks:
    return Result("remark", remark=f"guesses wrongly {', '.join(differ)}" if differ else "")
  return Result("equal")


def _differ(ours: Mapping[str, Any], theirs: Mapping[str, Any], sides: tuple[str, ...]) -> Iterator[str]:
  for side in sides:
    for field in {*ours[side], *theirs[side]} - {"tokenizer", "initializer", "buckets"}:
      if ours[side].get(field) != theirs[side].get(field):
        yield f"{side}.{field}"


def _pixels(ours: Clip, process: Callable[[PIL.Image.Image], torch.Tensor]) -> tuple[float, np.ndarray]:
  """The largest difference of pixels of odd images, as a part of their range, and the pixels of theirs."""
  shown = pictures()
  theirs = np.stack([np.moveaxis(process(picture).numpy(), 0, -1) for picture in shown])
  mine = ours.normalise(np.stack([ours.preprocess(picture) for picture in shown]))
  return float(np.abs(theirs - mine).max()), theirs


@torch.no_grad()
def compare(ours: Clip, model: Any, process: Any, tokenize: Any) -> Result:
  """The pixels of all pictures and the ids of all captions, and the embeddings of some of them."""
  pixel, pixels = _pixels(ours, process)
  texts = captions()
  ids = tokenize(texts)
  if wrong := int((ours.tokenizer(texts) != ids.numpy()).any(1).sum()):
    return Result("WRONG", remark=f"{wrong} of {len(texts)} captions have other ids")
  some = slice(0, 16)
  theirs = [model.encode_image(torch.from_numpy(np.moveaxis(pixels[:3], -1, 1))), model.encode_text(ids[some])]
  image, text = (torch.nn.functional.normalize(x, dim=-1).numpy() for x in theirs)
  mine = ours.encode_image(pictures()[:3]), ours.encode_text(texts[some])
  scale = abs(float(np.exp(model.logit_scale.item())) - ours.logit_scale)
  difference = max(
    float(np.abs(mine[0] - image).max()),
    float(np.abs(mine[1] - text).max()),
    float(np.abs(mine[0] @ mine[1].T - image @ text.T).max()),
  )
  if difference > TOLERANCE or scale > TOLERANCE or pixel > TOLERANCE or not np.isfinite(difference):
    return Result("WRONG", difference, f"embeddings {difference:.0e}, pixels {pixel:.0e}, scale {scale:.0e}")
  return Result("equal", difference)


def sentence(error: Exception, folder: Path) -> str:
  return str(error).replace(f"{folder}/", "").replace(str(folder), "FOLDER")


def preprocessing(pretrained: Mapping[str, Any]) -> dict[str, Any]:
  return {name: pretrained[name] for name in ("mean", "std", "interpolation", "resize_mode") if name in pretrained}


def hash_of_code() -> str:
  """Hexadecimal digits that depend on the modules that read and compare, and on the packages that are compared with."""
  found = hashlib.sha256(repr([package.__version__ for package in (open_clip, timm, transformers)]).encode())
  for place in CODE:
    files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    for file in files:
      found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
  return found.hexdigest()[:16]


class Rows:
  """Results by section and name, kept in a file of JSON lines, so that an interrupted run of the same code resumes."""

  def __init__(self, file: Path, only: str):
    self.file, self.only, self.found, self.code = file, re.compile(only), {}, hash_of_code()
    for line in file.read_text().splitlines() if file.exists() else ():
      code, key, *results = json.loads(line)
      if code == self.code:
        self.found[key] = [Result(*result) for result in results]

  def get(self, key: str, make: Callable[[], list[Result]]) -> list[Result]:
    """The results of a name, which are made and kept if they are not there."""
    if key not in self.found and not self.only.fullmatch(key.split()[1]):
      return [Result("not compared"), Result("not compared")]
    if key not in self.found:
      start = time.monotonic()
      self.found[key] = make()
      self.file.parent.mkdir(parents=True, exist_ok=True)
      with self.file.open("a") as file:
        file.write(json.dumps([self.code, key, *self.found[key]]) + "\n")
      print(f"{key}: {self.found[key]}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
      jax.clear_caches()
    return self.found[key]


def of_open_clip(rows: Rows) -> dict[str, tuple[list[str], Result, Result]]:
  """By model config: its released tags, and whether the folders and the file of a training run are read.

  Several released tags of a config may have other activations or preprocessing; the folder is the worst of them.
  """
  found, released = {}, collections.defaultdict(dict)
  for name, tag in open_clip.list_pretrained():
    released[name][tag] = open_clip.get_pretrained_cfg(name, tag)
  for name in open_clip.list_models():
    forms = dict.fromkeys(
      (bool(about.get("quick_gelu")), json.dumps(preprocessing(about), sort_keys=True))
      for about in released[name].values() or [{}]
    )
    results = rows.get(
      f"open_clip {name}",
      lambda name=name, forms=forms: [
        of_training(name),
        *(OpenClip(name, quick).result(json.loads(preprocess)) for quick, preprocess in forms),
      ],
    )
    worst = max(results[1:], key=lambda result: (STATUSES.index(result.status), result.difference))
    found[name] = ([*released[name]], worst, results[0])
  return found


# --- transformers ---

TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
TEXTS = {**TOWER, "vocab_size": 99, "max_position_embeddings": 12, "bos_token_id": 97, "eos_token_id": 98}
IMAGES = {**TOWER, "image_size": 32, "patch_size": 8}
# Classes that are read, and the arguments of their configs; then others, of which only the config is written.
READ = {
  "CLIPModel": {"text_config": TEXTS, "vision_config": IMAGES, "projection_dim": 16},
  "CLIPTextModel": TEXTS,
  "CLIPTextModelWithProjection": {**TEXTS, "projection_dim": 16},
  "CLIPVisionModel": IMAGES,
  "CLIPVisionModelWithProjection": {**IMAGES, "projection_dim": 16},
  "MetaClip2Model": {"text_config": TEXTS, "vision_config": IMAGES, "projection_dim": 16},
  "MetaClip2TextModelWithProjection": {**TEXTS, "projection_dim": 16},
  "MetaClip2VisionModelWithProjection": {**IMAGES, "projection_dim": 16},
  "SiglipModel": {"text_config": TEXTS, "vision_config": IMAGES},
  "SiglipTextModel": TEXTS,
  "SiglipVisionModel": IMAGES,
}
REFUSED = ("AlignModel", "AltCLIPModel", "Blip2Model", "BlipModel", "ChineseCLIPModel", "CLIPSegModel", "GroupViTModel")
REFUSED += ("Owlv2Model", "OwlViTModel", "Siglip2Model", "XCLIPModel")


@torch.no_grad()
def of_class(name: str) -> list[Result]:
  """Whether a folder that a class of transformers saved is read."""
  kind = getattr(transformers, name)
  with tempfile.TemporaryDirectory() as path:
    if name in REFUSED:
      kind.config_class().save_pretrained(path)
      torch.save({"logit_scale": torch.ones(())}, Path(path) / "pytorch_model.bin")
    else:
      model = kind(kind.config_class(**READ[name])).eval()
      randomise(model)
      model.save_pretrained(path)
      sides = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
      (Path(path) / "preprocessor_config.json").write_text(json.dumps(sides))
    try:
      ours = load(path)
    except ValueError as error:
      return [Result("refused", remark=sentence(error, Path(path)))]
    difference, embeds = _embeddings_of_class(ours, model)
  if difference > TOLERANCE:
    return [Result("WRONG", difference)]
  return [Result("equal", difference) if embeds else Result("remark", 0, "no joint space: it initialises a run")]


def _embeddings_of_class(ours: Clip, model: Any) -> tuple[float, bool]:
  """The largest difference of unit embeddings of the towers that there are, and whether there are any."""
  rng = np.random.default_rng(0)
  pixels, ids = rng.normal(size=(2, 32, 32, 3)).astype(np.float32), rng.integers(2, 97, (3, 12))
  ids[:, -1] = 98
  calls = {
    "image": (ours.image_features, pixels, {"pixel_values": torch.from_numpy(np.moveaxis(pixels, -1, 1).copy())}),
    "text": (ours.text_features, ids, {"input_ids": torch.from_numpy(ids)}),
  }
  largest, embeds = 0.0, False
  for side, (features, inputs, theirs) in calls.items():
    if getattr(model, {"image": "get_image_features", "text": "get_text_features"}[side], None):
      found = getattr(model, f"get_{side}_features")(**theirs)
      found = getattr(found, "pooler_output", found)
    elif ("Vision" if side == "image" else "Text") in type(model).__name__:
      out = model(**theirs)
      found = getattr(out, f"{side}_embeds", None)
      found = out.pooler_output if found is None and "Siglip" in type(model).__name__ else found
    else:
      continue
    if found is not None:
      unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (features(inputs), found.numpy())]
      largest, embeds = max(largest, float(np.abs(unit[0] - unit[1]).max())), True
  return largest, embeds


# --- big_vision ---


def of_big_vision(checkout: Path, name: str, whole: bool = False) -> list[Result]:
  """Whether an `.npz` file of big_vision is read."""
  built = big_vision_models.build(checkout, big_vision_models.MODELS[name], whole)
  with tempfile.TemporaryDirectory() as path:
    file = Path(path) / f"{name}.npz"
    np.savez(file, **{f"params/{key}": tensor for key, tensor in built.tensors.items()})
    try:
      ours = load(file)
    except ValueError as error:
      return [Result("refused", remark=sentence(error, Path(path)))]
  if built.image is None or built.text is None:
    return [Result("WRONG", remark="read, but not compared")]
  mine = [ours.image_features(built.pixels), ours.text_features(built.ids)]
  image, text = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in mine)
  difference = max(
    float(np.abs(image - built.image).max()),
    float(np.abs(text - built.text).max()),
    float(np.abs(image @ text.T - built.image @ built.text.T).max()),
  )
  if not difference <= TOLERANCE or abs(built.scale - ours.logit_scale) > TOLERANCE:
    return [Result("WRONG", difference)]
  return [Result("remark" if ours.remarks else "equal", difference, "; ".join(ours.remarks))]


# One model of each family, built at its real size.
WHOLE = ("ViT-B-32-quickgelu", "RN50", "convnext_base", "coca_ViT-B-32", "ViT-B-16-SigLIP2", "ViT-L-14-CLIPA")
WHOLE_OF_BIG_VISION = ("webli_en_b16_224_63724782",)


def of_whole_models(rows: Rows, checkout: Path) -> dict[str, Result]:
  """Whether models of real size are read, by the name of their config or file."""
  calls = {name: lambda name=name: [OpenClip(name, False, whole=True).result({})] for name in WHOLE}
  calls |= {name: lambda name=name: of_big_vision(checkout, name, whole=True) for name in WHOLE_OF_BIG_VISION}
  return {name: rows.get(f"whole {name}", call)[0] for name, call in calls.items()}


# --- the report ---


def _cell(result: Result) -> str:
  if result.status == "equal":
    return f"equal, {result.difference:.0e}" if result.difference else "equal"
  return {"remark": "with a remark"}.get(result.status, result.status)


def _training_cell(result: Result) -> str:
  if result.status == "remark":
    return "guesses, named" + (f"; {result.remark.removeprefix('guesses wrongly ')} to be set" if result.remark else "")
  return "asks for settings" if "does not say" in result.remark else _cell(result)


def report(
  of_clip: Mapping[str, tuple[list[str], Result, Result]],
  classes: Mapping[str, Result],
  files: Mapping[str, Result],
  whole: Mapping[str, Result],
) -> str:
  """The page of the documentation."""
  names = collections.Counter()
  for tags, folder, _ in of_clip.values():
    names[folder.status] += len(tags)
  configs = collections.Counter(folder.status for _, folder, _ in of_clip.values())
  lines = [
    PAGE.format(
      readable=names["equal"] + names["remark"],
      total=sum(names.values()),
      refused=names["refused"],
      wrong=names["WRONG"],
      left=f"; {names['not compared']} were not compared" if names["not compared"] else "",
      configs=sum(configs.values()),
      read=configs["equal"] + configs["remark"],
      open_clip=open_clip.__version__,
      timm=timm.__version__,
      transformers=transformers.__version__,
      tolerance=f"{TOLERANCE:g}",
      pictures=len(pictures()),
      captions=CAPTIONS,
    )
  ]
  lines += ["| model config | released names | folder | training file |", "|---|---|---|---|"]
  lines += [
    f"| {name} | {', '.join(tags)} | {_cell(folder)} | {_training_cell(training)} |"
    for name, (tags, folder, training) in of_clip.items()
  ]
  lines += ["", "## Remarks and refusals", "", "| model config | sentence |", "|---|---|"]
  lines += [f"| {name} | `{folder.remark}` |" for name, (_, folder, _) in of_clip.items() if folder.remark]
  sections = {"transformers": ("class | folder", classes), "big_vision": ("file | read", files)}
  sections["Real size: all blocks, at their width"] = "model | read", whole
  for title, (kind, results) in sections.items():
    lines += ["", f"## {title}", "", f"| {kind} | sentence |", "|---|---|---|"]
    for name, result in results.items():
      lines.append(f"| {name} | {_cell(result)} | {f'`{result.remark}`' if result.remark else ''} |")
  return "\n".join([*lines, ""])


PAGE = """# Released weights

`make released-weights` writes this page. It builds every model config of open_clip {open_clip} (timm {timm}) and
classes of transformers {transformers} with random weights, few layers and every option of the config; saves them as
their projects do; reads them; and compares unit embeddings, cosines, temperature and the pixels of {pictures} odd
images to {tolerance}, and the ids of {captions} odd captions.

No weights are downloaded: names of open_clip that have other activations or preprocessing than their config are
compared with theirs, and tokenizers of transformers are small ones with the special tokens of the real ones.

**{readable} of the {total} released names of open_clip are read, {refused} are refused, and {wrong} are wrong{left}**;
of its {configs} model configs, {read} are read.

The folder is what the hub has: `open_clip_config.json` and the tensors. A training file (`.pt`) has the tensors alone,
here at full size; what they do not determine is guessed and named in a warning, or has to be set. "to be set" are
fields whose guess differs from the config.

big_vision's `.npz` files have no tokenizer and resize images without antialiasing, which the remark says; pixels and
ids are given here, and LiT is its image tower alone, since BERT is not part of its code. FlaxCLIP's
`flax_model.msgpack` is read; `tests/weights/one_tower_test.py` compares all tensors.

## open_clip
"""


def main(args: argparse.Namespace) -> None:
  warnings.simplefilter("ignore")
  rows = Rows(args.rows, args.only)
  of_clip = of_open_clip(rows)
  classes = {name: rows.get(f"transformers {name}", lambda name=name: of_class(name))[0] for name in (*READ, *REFUSED)}
  files = {
    name: rows.get(f"big_vision {name}", lambda name=name: of_big_vision(args.big_vision, name))[0]
    for name in big_vision_models.MODELS
  }
  args.output.write_text(report(of_clip, classes, files, of_whole_models(rows, args.big_vision)))
  if wrong := [key for key, results in rows.found.items() if any(result.status == "WRONG" for result in results)]:
    sys.exit(f"read wrong: {', '.join(wrong)}")


if __name__ == "__main__":
  flags = parser(__doc__)
  flags.add_argument("--only", default=".*", help="regular expression of the names to compare")
  text = "clone of google-research/big_vision"
  flags.add_argument("--big-vision", type=Path, default=Path(".venv-interop/big_vision"), help=text)
  flags.add_argument("--rows", type=Path, default=Path("runs/released_weights.jsonl"), help="file that keeps results")
  flags.add_argument("--output", type=Path, default=Path("docs/released_weights.md"), help="page to write")
  main(flags.parse_args())

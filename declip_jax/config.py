"""Every field of a config with its default and its meaning; a file under `configs/` changes what it wants to.

A duration is written as a dict with one of `steps`, `epochs` or `examples`; `steps_of` converts it once, at the start.
A field that is a tuple is set on the command line as `--config.data.train="('webdataset:/data/train-*.tar',)"`.
"""

import json
import math
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from declip_jax import architectures

# The methods of the papers: weights of the terms of `declip_jax.objectives`, and the recipe that makes their views.
METHODS = {
  "clip": {"recipe": "clip", "weights": {"clip": 1.0}},
  "slip": {"recipe": "slip", "weights": {"clip": 1.0, "simclr": 1.0}},
  "declip": {"recipe": "declip", "weights": {"clip": 0.4, "mvs": 0.2, "simsiam": 0.2, "mlm": 0.2, "nns": 0.2}},
}

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # SLIP's and DeCLIP's


def default(method: str = "clip", architecture: str = "ViT-B/32") -> ConfigDict:
  """An architecture trained by `method` as CLIP was (Radford et al. 2021, tables 18 to 20).

  Locked: only known fields can be set. `architectures.ARCHITECTURES` lists the names.

  Normalisation and optimiser are OpenAI's for every method, so that methods differ in nothing else. SLIP's and DeCLIP's
  own differ: both normalise with ImageNet's mean and standard deviation and use epsilon 1e-8; SLIP trains timm's ViT
  ("SLIP ViT-B/16") with learning rate 3e-3 and decay 0.1; DeCLIP trains "DeCLIP ViT-B/32" with its patch embedding
  frozen (`optimizer.frozen`), keeps the log scale in [3, 6], and uses learning rate 1e-3 and decay 0.1 after 2,500
  steps from 1e-4.

  Raises:
    ValueError: an unknown method or architecture.
  """
  if method not in METHODS:
    raise ValueError(f"method {method!r}: choose one of {sorted(METHODS)}")
  built = architectures.build(architecture)
  c = ConfigDict()
  c.seed = 0  # of the initial parameters, the shuffle, and every augmentation
  # Weight of each term; 0 leaves the term and its head out.
  c.weights = ConfigDict({"clip": 0.0, "mvs": 0.0, "simclr": 0.0, "simsiam": 0.0, "mlm": 0.0, "nns": 0.0})
  c.weights.update(METHODS[method]["weights"])
  c.batch_size = 4096  # pairs per step over all devices
  c.duration = duration(epochs=32)  # of the training
  c.data = _data(METHODS[method]["recipe"], built.image_size)
  c.model = _model(built)
  if c.weights.mlm:
    c.model.text.vocab_size = 49409  # the mask token, behind OpenAI's vocabulary
    c.model.heads.text_bias = True  # as in DeCLIP
  c.init_from = ConfigDict()  # weights to start from; see `weights.initial`
  c.init_from.path = ""  # a run, or any checkpoint that `declip_jax.load` reads
  c.init_from.parts = ("image", "text", "heads")  # what to take of it; the rest is drawn
  c.init_from.settings = ()  # what the file does not say, such as ("image.activation=gelu", "image.heads=16")
  c.optimizer = _optimizer()
  c.mesh = ConfigDict({"data": -1, "fsdp": 1})  # devices along each axis; -1 is whatever is left
  c.max_skipped_in_a_row = 20  # non-finite steps are skipped; after so many in a row the run stops
  c.log_every = 50  # steps between lines of metrics.jsonl
  c.evaluate_every = duration(epochs=1)
  c.evaluate_batch_size = 1024
  c.evals = ConfigDict()  # name -> `zero_shot(...)` or `retrieval(...)` of this module
  c.checkpoint = ConfigDict()
  c.checkpoint.every = duration(epochs=1)
  c.checkpoint.keep_last = 2
  c.checkpoint.keep_best = 1
  c.checkpoint.best_metric = ""  # such as "eval/zero_shot/top1"; higher is better; "" keeps only the last
  c.lock()
  c.evals.unlock()  # the one place where a config adds fields
  return c


def _data(recipe: str, image_size: int) -> ConfigDict:
  c = ConfigDict()
  c.train = ("scenes:train",)  # sources to train on, "kind:location" each
  c.mixture = (1.0,)  # weight of each source
  c.recipe = recipe  # a name of `data.recipes.RECIPES`
  c.image_size = image_size
  c.interpolation = "bilinear"  # of crops and of evaluation; OpenAI's CLIP evaluates with "bicubic"
  c.evaluation_resize = (
    0  # shorter side, in pixels, before evaluation cuts out the centre; 0 is image_size, DeCLIP's 256
  )
  c.mask_probability = 0.15  # of masked language modelling, per token (BERT: 0.15)
  c.mask_slots = 0  # masked positions kept per caption; 0 derives a bound that is seldom exceeded
  # Augmentation. None keeps the recipe's own value; see `data.recipes.Recipe` for what each means.
  for name in ("weak_scale", "strong_scale", "jitter", "blur_radius"):
    c[name] = placeholder(tuple)
  for name in ("jitter_probability", "grayscale_probability", "blur_probability", "flip_probability"):
    c[name] = placeholder(float)
  c.workers = 0  # processes that read and augment; 0 does it in threads of this one
  c.threads = 4  # threads in each
  c.max_substituted = 0.05  # stop when a larger share of samples had to be replaced because they cannot be read
  return c


def _model(built: architectures.Architecture) -> ConfigDict:
  c = ConfigDict()
  c.dtype = "bfloat16"  # of activations; parameters, softmax, norms and losses are float32
  # What the backward pass recomputes: "none", "dots" (all but the products of linear layers and convolutions; a third
  # of the memory for 0.2 % more FLOPs) or "full" (everything inside a block).
  c.remat = "dots"
  c.unroll = 1  # blocks of a transformer that the compiler sees at once; more take longer to compile
  c.mean, c.std = OPENAI_MEAN, OPENAI_STD
  c.image, c.text = built.image, built.text
  c.heads = ConfigDict()
  c.heads.embed_dim = built.embed_dim  # of the joint space
  c.heads.image_bias = built.image_bias
  c.heads.text_bias = built.text_bias
  c.heads.simclr_projector = (4096, 4096, 256)
  c.heads.simsiam_projector = (1024, 1024, 1024)
  c.heads.simsiam_predictor = (512, 1024)
  c.heads.bank_size = 65536  # texts that nearest-neighbour supervision searches
  return c


def _optimizer() -> ConfigDict:
  c = ConfigDict()
  c.learning_rate = 5e-4  # peak
  c.warmup = duration(steps=2000)
  c.warmup_start = 0.0  # learning rate of the first step
  c.end = 0.0  # learning rate that the cosine falls to
  c.weight_decay = 0.2  # decoupled; not on biases, norms and the temperature
  c.b1, c.b2, c.epsilon = 0.9, 0.98, 1e-6
  c.gradient_clip = 0.0  # largest global norm of the gradient; 0 does not clip
  # Paths of parameters that stay as they are: ("towers/image",) is a locked image tower (LiT), and DeCLIP freezes
  # ("towers/image/patch_embedding",).
  c.frozen = ()
  c.logit_scale_range = (0.0, 4.605170185988092)  # of the log inverse temperature after each step; the top is ln 100
  return c


def zero_shot(data: str, templates: tuple[str, ...] = ("a photo of a {}.",)) -> ConfigDict:
  """Zero-shot classification of a source with class names, by prompts averaged over `templates`."""
  return ConfigDict({"kind": "zero_shot", "data": data, "templates": templates})


def retrieval(data: str, equal_texts: bool = False) -> ConfigDict:
  """Image-text retrieval over a source; with `equal_texts` captions of the same wording count as each other's match."""
  return ConfigDict({"kind": "retrieval", "data": data, "equal_texts": equal_texts})


def duration(*, steps: int = 0, epochs: float = 0, examples: int = 0) -> ConfigDict:
  """A length of training in one of three units; the others are 0."""
  return ConfigDict({"steps": steps, "epochs": float(epochs), "examples": examples})


def steps_of(length: ConfigDict, *, name: str, batch_size: int, epoch_examples: int) -> int:
  """Converts a duration to steps, rounding up; all units 0 gives 0.

  Raises:
    ValueError: more than one unit is set, or one is negative.
  """
  given = {unit: value for unit, value in length.items() if value}
  if len(given) > 1 or any(value < 0 for value in given.values()):
    raise ValueError(f"config.{name}={given}: set one of steps, epochs, examples, and the others to 0")
  examples = length.examples or length.epochs * epoch_examples
  return length.steps or math.ceil(examples / batch_size)


def from_json(text: str) -> ConfigDict:
  """A config as `to_json_best_effort` wrote it. JSON knows no tuples: all its lists were tuples."""

  def restore(value: Any) -> Any:
    if isinstance(value, dict):
      return {name: restore(entry) for name, entry in value.items()}
    return tuple(map(restore, value)) if isinstance(value, list) else value

  return ConfigDict(restore(json.loads(text))).lock()

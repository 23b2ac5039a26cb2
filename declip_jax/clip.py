"""Trained models as functions: `load` reads any checkpoint that `weights.read` reads and returns a `Clip`."""

from collections.abc import Iterable, Mapping, Sequence
import copy
import os
from pathlib import Path
from typing import Any
import warnings

import jax
from jax.sharding import Mesh
from jaxtyping import Float, Int
import numpy as np
import PIL.Image

from declip_jax.data import images as image_ops
from declip_jax.data.pipeline import Reading
from declip_jax.data.text.tokenizer import make_tokenizer
from declip_jax.evals import prompts
from declip_jax.evals.encoders import EncodeFunction, EncoderFactory, Encoders, make_encode_functions
from declip_jax.evals.feature_cache import LIMIT, FeatureCache, tree_hash
from declip_jax.evals.similarity import Embeddings, concatenate, padded_size
from declip_jax.evals.text_cache import TextCache
from declip_jax.models.heads.joint import Joint
from declip_jax.models.model import make_model
from declip_jax.sharding import batch_sharding, make_mesh, replicated
from declip_jax.views import Views
from declip_jax.weights.read import Step, Weights, read

Image = PIL.Image.Image | np.ndarray | bytes | str | os.PathLike[str]
Images = Image | Iterable[Image] | jax.Array
Texts = str | Iterable[Any]  # of strings; an error names what is not one


class Clip:
  """A trained model as functions; see `load`.

  Attributes:
    origin: project or run that the weights are from, for messages.
    model: pure functions, whose first arguments are `params` and `collections`.
    params, collections: arrays on the devices of `mesh`.
    mesh: devices over which batches are split.
    tokenizer: function from texts to token ids.
    view: preprocessing of images, see `preprocess` and `normalise`.
    max_pixels: largest number of pixels of an image, see `images.open_photo`; may be set.
    tokens: whether images and texts are compared by their tokens (FILIP) instead of their embeddings.
    logit_scale: inverse temperature of the contrastive loss, a factor of the scores of `similarity`.
    remarks: guesses and omissions when the file was read.
    step: step of a run's checkpoint, None for other files.
    average: decay of the moving average of the weights of a run that these are; 0 if they are no average.
    fields: `config.model`, which describes the model.
    classnames: names of the classes of the classifier; empty if there is none, or they have no names.
  """

  def __init__(self, weights: Weights, mesh: Mesh):
    self.origin, self.remarks, self.step, self.mesh = weights.origin, weights.remarks, weights.step, mesh
    self.model = make_model(weights.model, views=Views(), heads=weights.heads)
    self._place(weights.params, weights.collections)
    self.fields = dict(weights.model)
    self.tokenizer = make_tokenizer(weights.model["text"]["tokenizer"], weights.model["text"]["context_length"])
    self.view, self.tokens, self.average = weights.view, weights.tokens, weights.average
    self.max_pixels = image_ops.MAX_PIXELS
    self.classnames = tuple(weights.model["heads"].get("classnames", ()))
    self._sides, self._warned = _joint_sides(weights), False
    self._functions = make_encode_functions(self.model, mesh, tokens=self.tokens)

  def __repr__(self) -> str:
    image, text = self.fields["image"], self.fields["text"]
    kind = f"{image['kind']}/{image['patch']}" if "patch" in image else image["kind"]
    towers = {
      "image": f"{kind}, images of {self.view.size} x {self.view.size}, ",
      "text": f"texts of {text['context_length']} tokens, ",
    }
    described = "".join(words for side, words in towers.items() if side in self.params["towers"])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(self.params))
    return f"Clip({self.origin}: {described}{parameters:,} parameters, {self.dtype})"

  def with_weights(self, params: Any, collections: Any) -> "Clip":
    """The same model with other weights; nothing is compiled again."""
    other = copy.copy(self)
    other._place(params, collections)
    return other

  def _place(self, params: Any, collections: Any) -> None:
    # A single tower has no temperature, and does not use one, but the head declares it.
    if "joint" in self.model.heads.members and "logit_scale" not in params["heads"]:
      params = {**params, "heads": {**params["heads"], "logit_scale": np.float32(0)}}
    self.params, self.collections = jax.device_put((params, collections), replicated(self.mesh))
    self._hash = ""

  @property
  def weights_hash(self) -> str:
    """32 hexadecimal digits that depend on parameters and collections."""
    if not self._hash:
      self._hash = tree_hash({"params": self.params, "collections": self.collections})
    return self._hash

  @property
  def dtype(self) -> str:
    """Name of the compute dtype."""
    return np.dtype(self.model.towers.dtype).name

  def feature_cache(self, folder: Path, limit: int = LIMIT) -> FeatureCache:
    """Features of images by this model in a folder; see `FeatureCache`."""
    return FeatureCache(folder, self.weights_hash, self._side("image"), self.feature_widths, limit)

  def text_cache(self, folder: Path) -> TextCache:
    """Embeddings of texts by this model in a folder; see `TextCache`."""
    return TextCache(folder, self.weights_hash, self._side("text"))

  def _side(self, tower: str) -> dict[str, Any]:
    """What the features of one tower depend on besides the weights."""
    return {tower: self.fields[tower], "heads": self.fields["heads"], "dtype": self.dtype}

  @property
  def logit_scale(self) -> float:
    """Inverse temperature of the contrastive loss.

    Raises:
      ValueError: the model has only one tower.
    """
    self._check("image")
    self._check("text")
    if self.tokens:
      return float(np.exp(self.params["heads"]["dense_logit_scale"]))
    scale, largest = float(np.exp(self.params["heads"]["logit_scale"])), self._joint.max_scale
    return min(scale, largest) if largest else scale

  @property
  def feature_widths(self) -> tuple[int, int]:
    """Widths of the pooled features and of the joint embeddings of images, 0 for those that there are not."""
    width = self.model.towers.image.feature_width if "image" in self.params["towers"] else 0
    return width, self._joint.embed_dim if "image" in self._sides else 0

  @property
  def _joint(self) -> Joint:
    """The head of the joint space."""
    return self.model.heads.members["joint"]

  def similarity(self, images: Images, texts: Texts, batch_size: int = 64) -> Float[np.ndarray, "n m"]:
    """Scores of images against texts: cosines of their embeddings, or FILIP's late interaction for a FILIP model.

    Late interaction is the mean, over an image's tokens, of the largest cosine with a token of the text.

    Args:
      images, texts: see `encode_image` and `encode_text`.
      batch_size: images and texts encoded at once.

    Raises:
      ValueError: an image cannot be read, a text is not a string, or the model's vocabulary is not that of its
        tokenizer.
    """
    self._check("image")
    self._check("text")
    images, texts = _listed(images), _listed_texts(texts)
    if not len(images) or not texts:
      return np.empty((len(images), len(texts)), np.float32)
    image = self._encode_images(self._functions.image, images, batch_size)
    return self._functions.similarity(image, self._encode_texts(self._functions.text, texts, batch_size))

  def encode_image(self, images: Images, batch_size: int = 64) -> Float[np.ndarray, "n d"]:
    """Unit-norm float32 embeddings of images.

    Args:
      images: one or more images, each a PIL image, uint8 pixels `[h w 3]` or `[h w]` of any size, a path, or the bytes
        of a file; or one array `[n h w 3]`.
      batch_size: images encoded at once.

    Raises:
      ValueError: an image cannot be read.
    """
    self._check("image")
    self._warn_about_pooling()
    return self._encode_images(self._functions.image_embeddings, _listed(images), batch_size)

  def encode_text(self, texts: Texts, batch_size: int = 256) -> Float[np.ndarray, "n d"]:
    """Unit-norm float32 embeddings of one or more texts; long texts are truncated.

    Raises:
      ValueError: a text is not a string, or the model's vocabulary is not that of its tokenizer.
    """
    self._warn_about_pooling()
    return self._encode_texts(self._functions.text_embeddings, _listed_texts(texts), batch_size)

  def classifier(self, classnames: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "classes d"]:
    """The zero-shot classifier of some classes: logits are its products with unit-norm embeddings of images.

    Each row is the unit-norm mean of the unit-norm embeddings of a class's prompts, times `logit_scale`.

    Args:
      classnames: names of the classes.
      templates: prompts with one {} each, for the name.

    Raises:
      ValueError: there are no names, a template is wrong, or the model compares tokens or has only one tower.
    """
    if not classnames:
      raise ValueError("a zero-shot classifier needs the names of the classes, and there are none")
    if self.tokens:
      raise ValueError(f"these weights ({self.origin}) compare tokens, so they have no linear zero-shot classifier")
    texts, rows = prompts.unique_prompts(prompts.from_templates(classnames, templates))
    unit = prompts.classifier(self.encode_text(texts), rows)
    return np.asarray(self.logit_scale * unit, np.float32)

  def image_features(self, images: Float[np.ndarray, "n h w 3"], batch_size: int = 64) -> Float[np.ndarray, "n d"]:
    """Joint embeddings, float32 and not of unit norm, of images after `preprocess` and `normalise`.

    Raises:
      ValueError: `images` are not of the size of the view.
    """
    self._check("image")
    images, size = np.asarray(images, np.float32), self.view.size
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
      raise ValueError(f"images of shape {images.shape}: expected [n {size} {size} 3], as of preprocess and normalise")
    return self._batched(self._functions.image_features, images, batch_size)

  def text_features(self, tokens: Int[np.ndarray, "n t"], batch_size: int = 256) -> Float[np.ndarray, "n d"]:
    """Joint embeddings, float32 and not of unit norm, of token ids.

    `t` may be smaller than the context length if the text tower ignores padding, see `TextTransformer`. The feature of
    a text is the state at the position of its pooling: its end-of-text id, or its first token if it has none; its last
    position; or a class token after it.

    Raises:
      ValueError: `tokens` are not rows of ids of the vocabulary, too long, or too short for a tower that sees padding.
    """
    self._check("text")
    tokens, text = np.asarray(tokens), self.model.towers.text
    shortest = 1 if self._functions.trims_texts else text.context_length
    if tokens.ndim != 2 or not shortest <= tokens.shape[1] <= text.context_length:
      lengths = f"from 1 to {text.context_length}" if shortest == 1 else f"{shortest}, as this text tower sees padding"
      raise ValueError(f"tokens of shape {tokens.shape}: expected [n t] with t {lengths}")
    if len(tokens) and not np.issubdtype(tokens.dtype, np.integer):
      raise ValueError(f"tokens of type {tokens.dtype}: expected integers")
    if len(wrong := tokens[(tokens < 0) | (tokens >= text.vocab_size)]):
      raise ValueError(f"tokens have the id {wrong[0]}: expected 0 to {text.vocab_size - 1}, the vocabulary")
    return self._batched(self._functions.text_features, tokens.astype(np.int32), batch_size)

  def preprocess(self, image: Image) -> np.ndarray:
    """Resizes an image and crops its centre: uint8 `[view.size view.size 3]`.

    Raises:
      ValueError: the image cannot be read.
    """
    if isinstance(image, (str, os.PathLike)):
      image = Path(image).read_bytes()
    return image_ops.eval_view(image_ops.decode(image, self.max_pixels), self.view)

  def normalise(self, views: np.ndarray) -> Float[np.ndarray, "n h w 3"]:
    """Turns outputs of `preprocess` into inputs of `image_features`."""
    return self.view.normalise(views)

  def encoders(
    self, batch_size: int, *, needs_text: bool = True, reading: Reading | None = None, field: str = "batch_size"
  ) -> Encoders:
    """Encode functions for the evaluators of `declip_jax.evals`.

    Args:
      batch_size: images and texts encoded at once.
      needs_text: whether texts will be encoded, besides images.
      reading: how images are read, by default within `max_pixels`.
      field: what sets the batch size, for messages, such as a flag.

    Raises:
      ValueError: the weights lack an image tower, or, if `needs_text`, a text tower with the vocabulary of the
        tokenizer; or the batch size is not a multiple of the number of devices.
    """
    if "image" not in self.params["towers"]:
      raise ValueError(f"these weights ({self.origin}) have no image tower: expected a model that encodes images")
    if needs_text:
      self._check_vocabulary()
    reading = reading or Reading(max_pixels=self.max_pixels)
    factory = EncoderFactory(self._functions, self.tokenizer, self.view, batch_size, reading, self.classnames, field)
    return factory.bind(self.params, self.collections)

  def _encode_images(
    self, function: EncodeFunction, images: Sequence[Image] | np.ndarray, batch_size: int
  ) -> Embeddings:
    _check_batch_size(batch_size)
    if not len(images):
      return np.empty((0, self._joint.embed_dim), np.float32)
    chunks = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    return concatenate([self._apply(function, np.stack([self.preprocess(x) for x in chunk])) for chunk in chunks])

  def _encode_texts(self, function: EncodeFunction, texts: Sequence[str], batch_size: int) -> Embeddings:
    self._check_vocabulary()
    return self._batched(function, self.tokenizer(texts), batch_size)

  def _batched(self, function: EncodeFunction, inputs: np.ndarray, batch_size: int) -> Embeddings:
    _check_batch_size(batch_size)
    if not len(inputs):
      return np.empty((0, self._joint.embed_dim), np.float32)
    starts = range(0, len(inputs), batch_size)
    return concatenate([self._apply(function, inputs[start : start + batch_size]) for start in starts])

  def _apply(self, function: EncodeFunction, batch: np.ndarray) -> Embeddings:
    """Encodes one batch, padded so that few shapes are compiled."""
    padding = padded_size(len(batch), self.mesh.size) - len(batch)
    padded = np.concatenate([batch, np.repeat(batch[-1:], padding, axis=0)])
    encoded = function(self.params, self.collections, jax.device_put(padded, batch_sharding(self.mesh)))
    return jax.tree.map(lambda x: np.asarray(x)[: len(batch)], encoded)

  def _check(self, side: str) -> None:
    if side not in self._sides:
      raise ValueError(
        f"these weights ({self.origin}) have no {side} tower with a joint space; they can initialise a run through "
        "config.init_from"
      )

  def _check_vocabulary(self) -> None:
    self._check("text")
    text = self.model.towers.text
    if text.vocab_size < self.tokenizer.plain_size or text.eot != self.tokenizer.eot:
      raise ValueError(
        f"these weights ({self.origin}) have {text.vocab_size} tokens and end texts with id {text.eot}, but the "
        f"tokenizer has {self.tokenizer.plain_size} and id {self.tokenizer.eot}: set the file of "
        "theirs, as in load(path, {'text.tokenizer': 'sentencepiece:spiece.model'}), or pass token ids to text_features"
      )

  def _warn_about_pooling(self) -> None:
    if self.tokens and not self._warned:
      self._warned = True
      warnings.warn(
        f"these weights ({self.origin}) were trained to compare tokens, so their pooled embeddings mean little: use "
        "similarity(images, texts)",
        stacklevel=3,
      )


def _joint_sides(weights: Weights) -> tuple[str, ...]:
  """The towers, "image" and "text", that have a place in a joint space."""
  heads = weights.params["heads"]
  ends_there = {side: not weights.model["heads"].get(f"{side}_linear", True) for side in ("image", "text")}
  return tuple(
    side
    for side, ends in ends_there.items()
    if "joint" in weights.heads and side in weights.params["towers"] and (ends or f"{side}_projection" in heads)
  )


def _listed(images: Images) -> Sequence[Image] | np.ndarray:
  if isinstance(images, jax.Array):
    images = np.asarray(images)
  one = isinstance(images, (PIL.Image.Image, bytes, str, os.PathLike))
  one |= isinstance(images, np.ndarray) and images.ndim in (2, 3)
  return [images] if one else images if isinstance(images, np.ndarray) else list(images)


def _listed_texts(texts: Texts) -> list[str]:
  if isinstance(texts, str):
    return [texts]
  if isinstance(texts, bytes) or not isinstance(texts, Iterable):
    raise ValueError(f"texts is of type {type(texts).__name__}: expected a string, or a sequence of strings")
  listed = list(texts)
  for index, text in enumerate(listed):
    if not isinstance(text, str):
      raise ValueError(f"texts[{index}] is of type {type(text).__name__}, {text!r:.80}: expected a string")
  return listed


def _check_batch_size(batch_size: int) -> None:
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: must be at least 1")


def load(path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None, *, step: Step = None) -> Clip:
  """A trained model on all devices, from a run or from any file or folder that `weights.read.read` reads.

  Guesses and omissions are warnings.

  Args:
    path: working directory of a run or one of its checkpoints, or a checkpoint file or folder.
    settings: fields that override what was recognised, such as `{"image.activation": "gelu"}`. Another `image_size`
      resizes the position embeddings of images, and a smaller `text.context_length` cuts those of texts. From a run
      with an average of the weights, `average=False` reads the weights themselves.
    step: checkpoint of a run, the newest by default; "best" is the best by its `config.checkpoint.best_metric`.

  Raises:
    FileNotFoundError: no such file or checkpoint.
    ValueError: the checkpoint is not recognised, does not match a model, lacks a field that has to be set, or
      a setting does not fit; the message names what differs.
  """
  weights = read(path, settings, step)
  for remark in weights.remarks:
    warnings.warn(f"{os.fspath(path)}: {remark}", stacklevel=2)
  return Clip(weights, make_mesh(-1, 1))

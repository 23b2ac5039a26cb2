"""Trained models as functions: `load` reads anything that `weights.read` knows and returns a `Clip`."""

from collections.abc import Mapping, Sequence
from functools import partial
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
from declip_jax.data.text.tokenizer import make_tokenizer
from declip_jax.evals.encoders import EncodeFunction, EncoderFactory, Encoders, make_encode_functions
from declip_jax.evals.similarity import Embeddings, concatenate, padded_size
from declip_jax.models.model import make_model
from declip_jax.sharding import batch_sharding, make_mesh, replicated
from declip_jax.types import Views
from declip_jax.weights.read import Weights, read

Image = PIL.Image.Image | np.ndarray | bytes | str | os.PathLike[str]


class Clip:
  """A trained model as functions; see `load`.

  Attributes:
    origin: where the weights are from, in words.
    model: the pure functions; `params` and `collections` are their first arguments.
    params, collections: on the devices of `mesh`.
    mesh: over which batches are split.
    tokenizer: texts to ids.
    view: preprocessing of images, see `preprocess` and `normalise`.
    tokens: whether images and texts are compared by their tokens (FILIP) and not by their embeddings.
    logit_scale: inverse temperature of the contrastive loss, by which the scores of `similarity` are multiplied.
    remarks: what should be known about how the file was read.
    step: of a run's checkpoint, None for other files.
  """

  def __init__(self, weights: Weights, mesh: Mesh):
    self.origin, self.remarks, self.step, self.mesh = weights.origin, weights.remarks, weights.step, mesh
    self.model = make_model(weights.model.to_dict(), views=Views(), heads=weights.heads)
    place = partial(jax.device_put, device=replicated(mesh))
    self.params, self.collections = place(weights.params), place(weights.collections)
    self.tokenizer = make_tokenizer(weights.model.text.tokenizer, weights.model.text.context_length)
    self.view, self.tokens = weights.view, weights.tokens
    self._has_text, self._warned = "joint" in weights.heads, False
    self._functions = make_encode_functions(self.model, mesh, tokens=self.tokens)

  @property
  def logit_scale(self) -> float:
    """Inverse temperature of the contrastive loss.

    Raises:
      ValueError: the model has no text tower.
    """
    self._check_text()
    if self.tokens:
      return float(np.exp(self.params["heads"]["dense_logit_scale"]))
    scale, largest = float(np.exp(self.params["heads"]["logit_scale"])), self.model.heads.max_scale
    return min(scale, largest) if largest else scale

  def similarity(
    self, images: Image | Sequence[Image], texts: str | Sequence[str], batch_size: int = 64
  ) -> Float[np.ndarray, "n m"]:
    """Scores of images against texts: cosines of their embeddings, or FILIP's late interaction where it was trained.

    The latter is the mean over an image's tokens of the largest cosine with a token of the text.

    Args:
      images, texts: see `encode_image` and `encode_text`.
      batch_size: images and texts that are encoded at once.

    Raises:
      ValueError: one of the images is no image, or the model has another vocabulary than OpenAI's.
    """
    images, texts = _listed(images), [texts] if isinstance(texts, str) else list(texts)
    if not len(images) or not texts:
      return np.empty((len(images), len(texts)), np.float32)
    image = self._encode_images(self._functions.image, images, batch_size)
    return self._functions.similarity(image, self._encode_texts(self._functions.text, texts, batch_size))

  def encode_image(self, images: Image | Sequence[Image], batch_size: int = 64) -> Float[np.ndarray, "n d"]:
    """Unit-norm float32 embeddings of images.

    Args:
      images: one or any number of them, each a PIL image, uint8 pixels `[h w 3]` or `[h w]` of any size, a path, or the
        bytes of a file; or one array `[n h w 3]`.
      batch_size: images that are encoded at once.

    Raises:
      ValueError: one of them is no image.
    """
    self._warn_of_pooling()
    return self._encode_images(self._functions.image_embeddings, _listed(images), batch_size)

  def encode_text(self, texts: str | Sequence[str], batch_size: int = 256) -> Float[np.ndarray, "n d"]:
    """Unit-norm float32 embeddings of one text or several; those that are too long are cut.

    Raises:
      ValueError: the model has another vocabulary than OpenAI's.
    """
    self._warn_of_pooling()
    texts = [texts] if isinstance(texts, str) else list(texts)
    return self._encode_texts(self._functions.text_embeddings, texts, batch_size)

  def image_features(self, images: Float[np.ndarray, "n h w 3"], batch_size: int = 64) -> Float[np.ndarray, "n d"]:
    """Joint embeddings, float32 and not of unit norm, of images that are already resized and normalised."""
    return self._batched(self._functions.image_features, np.asarray(images, np.float32), batch_size)

  def text_features(self, tokens: Int[np.ndarray, "n t"], batch_size: int = 256) -> Float[np.ndarray, "n d"]:
    """Joint embeddings, float32 and not of unit norm, of token ids; rows may be shorter than the context length.

    Each row needs an end-of-text id, whose state is its feature; without one it is that of the first token.
    """
    return self._batched(self._functions.text_features, np.asarray(tokens, np.int32), batch_size)

  def preprocess(self, image: Image) -> np.ndarray:
    """The view of an image that the model sees, uint8 `[image_size image_size 3]`: resized, centre cropped.

    Raises:
      ValueError: it is no image.
    """
    if isinstance(image, (str, os.PathLike)):
      image = Path(image).read_bytes()
    return image_ops.eval_view(image_ops.decode(image), self.view)

  def normalise(self, views: np.ndarray) -> Float[np.ndarray, "n h w 3"]:
    """What `image_features` takes, from what `preprocess` returns."""
    return self.view.normalise(views)

  def encoders(self, batch_size: int) -> Encoders:
    """What the evaluators of `declip_jax.evals` take."""
    self._check_vocabulary()
    factory = EncoderFactory(self._functions, self.tokenizer, self.view, batch_size)
    return factory.bind(self.params, self.collections)

  def _encode_images(self, function: EncodeFunction, images: Sequence[Image], batch_size: int) -> Embeddings:
    _check_batch_size(batch_size)
    if not len(images):
      return np.empty((0, self.model.heads.embed_dim), np.float32)
    chunks = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    return concatenate([self._apply(function, np.stack([self.preprocess(x) for x in chunk])) for chunk in chunks])

  def _encode_texts(self, function: EncodeFunction, texts: Sequence[str], batch_size: int) -> Embeddings:
    self._check_vocabulary()
    return self._batched(function, self.tokenizer(texts), batch_size)

  def _batched(self, function: EncodeFunction, inputs: np.ndarray, batch_size: int) -> Embeddings:
    _check_batch_size(batch_size)
    if not len(inputs):
      return np.empty((0, self.model.heads.embed_dim), np.float32)
    starts = range(0, len(inputs), batch_size)
    return concatenate([self._apply(function, inputs[start : start + batch_size]) for start in starts])

  def _apply(self, function: EncodeFunction, batch: np.ndarray) -> Embeddings:
    """Encodes one batch, padded so that few shapes are ever compiled."""
    self._check_text()
    padding = padded_size(len(batch), self.mesh.size) - len(batch)
    padded = np.concatenate([batch, np.repeat(batch[-1:], padding, axis=0)])
    encoded = function(self.params, self.collections, jax.device_put(padded, batch_sharding(self.mesh)))
    return jax.tree.map(lambda x: np.asarray(x)[: len(batch)], encoded)

  def _check_text(self) -> None:
    if not self._has_text:
      raise ValueError(
        f"these weights ({self.origin}) have no text tower and no joint space: start a run from them (config.init_from)"
      )

  def _check_vocabulary(self) -> None:
    self._check_text()
    text = self.model.towers.text
    if text.vocab_size < self.tokenizer.plain_size or text.eot != self.tokenizer.eot:
      raise ValueError(
        f"these weights ({self.origin}) have {text.vocab_size} tokens and end texts with {text.eot}, which is not "
        "the tokenizer's vocabulary: give token ids to text_features"
      )

  def _warn_of_pooling(self) -> None:
    if self.tokens and not self._warned:
      self._warned = True
      warnings.warn(
        f"these weights ({self.origin}) were trained to compare tokens and not pooled embeddings, which mean little: "
        "use similarity(images, texts)",
        stacklevel=3,
      )


def _listed(images: Image | Sequence[Image]) -> Sequence[Image]:
  if isinstance(images, jax.Array):
    images = np.asarray(images)
  one = isinstance(images, (PIL.Image.Image, bytes, str, os.PathLike))
  one |= isinstance(images, np.ndarray) and images.ndim in (2, 3)
  return [images] if one else images if isinstance(images, np.ndarray) else list(images)


def _check_batch_size(batch_size: int) -> None:
  if batch_size < 1:
    raise ValueError(f"batch_size is {batch_size}; at least 1")


def load(path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None, *, step: int | None = None) -> Clip:
  """A trained model on all devices, from a run or from any file or folder that `weights.read.read` knows.

  What should be known about how the file was read, such as a guess, is a warning.

  Args:
    path: of it.
    settings: fields that replace what was recognised, such as `{"image.activation": "gelu"}`.
    step: which checkpoint of a run; by default the newest.

  Raises:
    FileNotFoundError: there is nothing, or no such checkpoint.
    ValueError: it is no checkpoint that is known; the message says what does not fit.
  """
  weights = read(path, settings, step)
  for remark in weights.remarks:
    warnings.warn(f"{os.fspath(path)}: {remark}", stacklevel=2)
  return Clip(weights, make_mesh(-1, 1))

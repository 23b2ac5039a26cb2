"""Trained towers as functions: `load` anything that `weights.read` reads, or bind a run's parameters for evaluators."""

from collections.abc import Callable, Mapping, Sequence
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
from declip_jax.data.text.tokenizer import Tokenizer, make_tokenizer
from declip_jax.evals.embed import Encoders, Rows, Similarity, TextTokens, cosines, count, take
from declip_jax.models.model import Model, make_model
from declip_jax.objectives.filip import late_interaction
from declip_jax.sharding import batch_sharding, check_batch, local_rows, make_mesh, replicated, to_global
from declip_jax.types import Views
from declip_jax.weights.read import Weights, read

Tree = Any
Image = PIL.Image.Image | np.ndarray | bytes | str | os.PathLike[str]
_BLOCK = 1024  # images and texts whose tokens are compared in one call; 1 MiB of scores


class EncoderFactory:
  """Compiles the encode functions of a model once; `bind` makes `Encoders` of any parameters.

  Args:
    model: to encode with.
    mesh: to encode on.
    tokenizer: of the model.
    image_size, interpolation, resize: of the evaluation view, `images.eval_view`.
    batch_size: of every call, a multiple of the number of devices.
    tokens: whether images and texts are compared by their tokens (FILIP) and not by their embeddings.
  """

  def __init__(
    self,
    model: Model,
    mesh: Mesh,
    tokenizer: Tokenizer,
    *,
    image_size: int,
    interpolation: str,
    resize: int,
    batch_size: int,
    tokens: bool,
  ):
    check_batch(batch_size, mesh, "evaluate_batch_size")
    self._mesh, self._batch_size = mesh, batch_size
    view = {"image_size": image_size, "interpolation": interpolation, "resize": resize}
    compare = make_late_interaction(mesh) if tokens else cosines
    self._inputs = {"tokenizer": tokenizer, **view, "similarity": compare, "tokens": tokens}
    everywhere = replicated(mesh)
    image, text = _encode_functions(model, tokens)
    self._image = jax.jit(image, out_shardings=everywhere)
    self._text = jax.jit(text, out_shardings=everywhere)
    self._gather = jax.jit(lambda x: x, out_shardings=everywhere)

  def bind(self, params: Tree, collections: Tree) -> Encoders:
    """Encode functions of these parameters, from host arrays to host arrays."""
    place = partial(to_global, sharding=batch_sharding(self._mesh))
    fetch = partial(jax.tree.map, np.asarray)
    return Encoders(
      image=lambda images: fetch(self._image(params, collections, place(images))),
      text=lambda tokens: fetch(self._text(params, collections, place(tokens))),
      gather=lambda rows: fetch(self._gather(place(rows))),
      batch_size=self._batch_size,
      rows=local_rows(batch_sharding(self._mesh), self._batch_size),
      **self._inputs,
    )


def make_late_interaction(mesh: Mesh) -> Similarity:
  """The `Similarity` of tokens (FILIP, Yao et al. 2022, section 3.1), compiled once, on all devices of a mesh.

  Every host has all rows, gives its part of a block of images and of a block of texts, and gets all scores; so neither
  numbers of images and texts nor their tokens have to fit on a device. Products take the precision that
  `jax_default_matmul_precision` sets, as in training.
  """
  sharding = batch_sharding(mesh)
  compare = partial(late_interaction, devices=mesh.size)
  image_to_text = jax.jit(lambda image, text: compare(image, *text)[0], out_shardings=replicated(mesh))
  text_to_image = jax.jit(lambda text, image: compare(image, *text)[1], out_shardings=replicated(mesh))

  def place(rows: Rows, start: int, size: int) -> Tree:
    index = np.minimum(start + local_rows(sharding, size), count(rows) - 1)  # filled up with the last
    return to_global(take(rows, index), sharding)

  def similarity(query: Rows, key: Rows) -> Float[np.ndarray, "n m"]:
    compiled = text_to_image if isinstance(query, TextTokens) else image_to_text
    scores = np.empty((count(query), count(key)), np.float32)
    high, wide = (_filled(min(size, _BLOCK), mesh) for size in scores.shape)
    for row in range(0, scores.shape[0], high):
      queries = place(query, row, high)
      for column in range(0, scores.shape[1], wide):
        part = scores[row : row + high, column : column + wide]
        part[:] = np.asarray(compiled(queries, place(key, column, wide)))[: part.shape[0], : part.shape[1]]
    return scores

  return similarity


class Clip:
  """A trained model as functions; see `load`.

  Attributes:
    origin: where the weights are from, in words.
    model: the pure functions; `params` and `collections` are their first arguments.
    params, collections: on the devices of `mesh`.
    mesh: over which batches are split.
    tokenizer: texts to ids.
    image_size, interpolation, resize: of the view that an image is turned into, see `preprocess`.
    mean, std: by which pixels are normalised, per channel, on a scale of 0 to 1.
    tokens: whether images and texts are compared by their tokens (FILIP) and not by their embeddings.
    logit_scale: inverse temperature of the contrastive loss, by which the scores of `similarity` are multiplied.
    remarks: what should be known about how the file was read.
    step: of a run's checkpoint, None for other files.
  """

  def __init__(self, weights: Weights, mesh: Mesh):
    self.origin, self.remarks, self.step, self.mesh = weights.origin, weights.remarks, weights.step, mesh
    self.model = make_model(weights.model, views=Views(), heads=weights.heads)
    place = partial(jax.device_put, device=replicated(mesh))
    self.params, self.collections = place(weights.params), place(weights.collections)
    self.tokenizer = make_tokenizer(weights.model.text.tokenizer, weights.model.text.context_length)
    self.image_size, self.interpolation, self.resize = weights.image_size, weights.interpolation, weights.resize
    self.mean, self.std = weights.model.mean, weights.model.std
    self.tokens, self._warned = weights.tokens, False
    self._has_text = "joint" in weights.heads
    image_rows, text_rows = _encode_functions(self.model, self.tokens)
    functions = {
      "encode_image": self.model.encode_image,
      "encode_text": self.model.encode_text,
      "image_features": self.model.image_features,
      "text_features": self.model.text_features,
      "image_rows": image_rows,
      "text_rows": text_rows,
    }
    self._functions = {name: jax.jit(function, out_shardings=replicated(mesh)) for name, function in functions.items()}
    self._similarity = make_late_interaction(mesh) if self.tokens else cosines

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
    rows = self._encode_images("image_rows", images, batch_size), self._encode_texts("text_rows", texts, batch_size)
    return self._similarity(*rows)

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
    return self._encode_images("encode_image", _listed(images), batch_size)

  def encode_text(self, texts: str | Sequence[str], batch_size: int = 256) -> Float[np.ndarray, "n d"]:
    """Unit-norm float32 embeddings of one text or several; those that are too long are cut.

    Raises:
      ValueError: the model has another vocabulary than OpenAI's.
    """
    self._warn_of_pooling()
    return self._encode_texts("encode_text", [texts] if isinstance(texts, str) else list(texts), batch_size)

  def image_features(self, images: Float[np.ndarray, "n h w 3"], batch_size: int = 64) -> Float[np.ndarray, "n d"]:
    """Joint embeddings, float32 and not of unit norm, of images that are already resized and normalised."""
    return self._batched("image_features", np.asarray(images, np.float32), batch_size)

  def text_features(self, tokens: Int[np.ndarray, "n t"], batch_size: int = 256) -> Float[np.ndarray, "n d"]:
    """Joint embeddings, float32 and not of unit norm, of token ids; rows may be shorter than the context length.

    Each row needs an end-of-text id, whose state is its feature; without one it is that of the first token.
    """
    return self._batched("text_features", np.asarray(tokens, np.int32), batch_size)

  def preprocess(self, image: Image) -> np.ndarray:
    """The view of an image that the model sees, uint8 `[image_size image_size 3]`: resized, centre cropped.

    Raises:
      ValueError: it is no image.
    """
    if isinstance(image, (str, os.PathLike)):
      image = Path(image).read_bytes()
    pixels = image_ops.decode(image)
    return image_ops.eval_view(pixels, size=self.image_size, interpolation=self.interpolation, resize=self.resize)

  def normalise(self, views: np.ndarray) -> Float[np.ndarray, "n h w 3"]:
    """What `image_features` takes, from what `preprocess` returns."""
    mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
    return (np.asarray(views, np.float32) / 255 - mean) / std

  def encoders(self, batch_size: int) -> Encoders:
    """What the evaluators of `declip_jax.evals` take."""
    self._check_vocabulary()
    factory = EncoderFactory(
      self.model,
      self.mesh,
      self.tokenizer,
      image_size=self.image_size,
      interpolation=self.interpolation,
      resize=self.resize,
      batch_size=batch_size,
      tokens=self.tokens,
    )
    return factory.bind(self.params, self.collections)

  def _encode_images(self, name: str, images: Sequence[Image], batch_size: int) -> Rows:
    _check_batch_size(batch_size)
    if not len(images):
      return np.empty((0, self.model.heads.embed_dim), np.float32)
    chunks = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    return _joined([self._apply(name, np.stack([self.preprocess(x) for x in chunk])) for chunk in chunks])

  def _encode_texts(self, name: str, texts: Sequence[str], batch_size: int) -> Rows:
    self._check_vocabulary()
    return self._batched(name, self.tokenizer(texts), batch_size)

  def _batched(self, name: str, rows: np.ndarray, batch_size: int) -> Rows:
    _check_batch_size(batch_size)
    if not len(rows):
      return np.empty((0, self.model.heads.embed_dim), np.float32)
    return _joined([self._apply(name, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)])

  def _apply(self, name: str, rows: np.ndarray) -> Rows:
    """One call; rows are filled up so that few shapes are ever compiled."""
    self._check_text()
    filled = np.concatenate([rows, np.repeat(rows[-1:], _filled(len(rows), self.mesh) - len(rows), axis=0)])
    found = self._functions[name](self.params, self.collections, self._place(filled))
    return jax.tree.map(lambda x: np.asarray(x)[: len(rows)], found)

  def _place(self, rows: np.ndarray) -> jax.Array:
    return jax.device_put(rows, batch_sharding(self.mesh))

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


def _encode_functions(model: Model, tokens: bool) -> tuple[Callable[..., Tree], Callable[..., Tree]]:
  """Pure functions from parameters, collections and inputs to the `Rows` of images and of texts."""
  if not tokens:
    return model.encode_image, model.encode_text
  return model.encode_image_tokens, lambda *inputs: TextTokens(*model.encode_text_tokens(*inputs))


def _listed(images: Image | Sequence[Image]) -> Sequence[Image]:
  if isinstance(images, jax.Array):
    images = np.asarray(images)
  one = isinstance(images, (PIL.Image.Image, bytes, str, os.PathLike))
  one |= isinstance(images, np.ndarray) and images.ndim in (2, 3)
  return [images] if one else images if isinstance(images, np.ndarray) else list(images)


def _joined(parts: Sequence[Rows]) -> Rows:
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _filled(rows: int, mesh: Mesh) -> int:
  """A number of rows that is a power of two times the devices, so that few shapes are ever compiled."""
  size = mesh.size
  while size < rows:
    size *= 2
  return size


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

"""The encode functions of a model, compiled once: `Clip` calls them, and `evals.features` with parameters bound."""

from collections.abc import Callable, Sequence
import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int, UInt8
import numpy as np

from declip_jax.data.images import EvalView
from declip_jax.data.pipeline import Reading
from declip_jax.evals.similarity import (
  Embeddings,
  Similarity,
  TextTokens,
  concatenate,
  cosines,
  make_late_interaction,
)
from declip_jax.models.model import Model
from declip_jax.models.text import TextTransformer
from declip_jax.sharding import batch_rows, batch_sharding, check_batch, replicated, to_global, traced_over

Tree = Any
# From parameters, collections and a global batch to arrays that every device has.
EncodeFunction = Callable[[Tree, Tree, Any], Tree]


class ModelClassifier(NamedTuple):
  """The classifier of a fine-tuned model.

  Attributes:
    logits: function from pooled features of this host to logits; it runs on one of its devices.
    classnames: names of the classes; empty if they have none.
  """

  logits: Callable[[Float[np.ndarray, "n f"]], Float[np.ndarray, "n classes"]]
  classnames: tuple[str, ...]


class EncodeFunctions(NamedTuple):
  """Compiled pure functions of a model; see `make_encode_functions`.

  Attributes:
    mesh: devices over which batches are split.
    tokens: whether images and texts are compared by their tokens (FILIP) instead of their embeddings.
    image, text: functions that return the `Embeddings` that `similarity` compares.
    similarity: scores of these embeddings.
    pooled_and_joint: `Model.encode_image_features`; unlike the results of the others, its results stay split over the
      devices, like the batch.
    image_embeddings, text_embeddings: functions that return unit-norm pooled embeddings.
    image_features, text_features: functions from normalised pixels or token ids to pooled embeddings, not normalised.
    classify: function from the parameters of the heads and pooled features to logits; None without a classifier.
    gather: function that copies arrays to every device.
    trims_texts: whether padding that all texts have in common may be cut off.
  """

  mesh: Mesh
  tokens: bool
  image: EncodeFunction
  text: EncodeFunction
  similarity: Similarity
  pooled_and_joint: EncodeFunction
  image_embeddings: EncodeFunction
  text_embeddings: EncodeFunction
  image_features: EncodeFunction
  text_features: EncodeFunction
  classify: Callable[[Tree, Any], Any] | None
  gather: Callable[[Tree], Tree]
  trims_texts: bool = True


def make_encode_functions(model: Model, mesh: Mesh, *, tokens: bool) -> EncodeFunctions:
  """Wraps the encode functions of a model for compilation; each compiles when it is first called.

  Args:
    model: the model.
    mesh: devices over which batches are split.
    tokens: whether images and texts are compared by their tokens (FILIP) instead of their embeddings.
  """

  def compiled(function: Callable[..., Any], sharding: NamedSharding | None = None) -> Callable[..., Any]:
    return jax.jit(traced_over(mesh, function), out_shardings=sharding or replicated(mesh))

  image_embeddings, text_embeddings = compiled(model.encode_image), compiled(model.encode_text)
  image, text, similarity = image_embeddings, text_embeddings, cosines
  if tokens:
    image = compiled(model.encode_image_tokens)
    text = compiled(lambda *inputs: TextTokens(*model.encode_text_tokens(*inputs)))
    similarity = make_late_interaction(mesh)
  return EncodeFunctions(
    mesh=mesh,
    tokens=tokens,
    image=image,
    text=text,
    similarity=similarity,
    pooled_and_joint=compiled(model.encode_image_features, batch_sharding(mesh)),
    image_embeddings=image_embeddings,
    text_embeddings=text_embeddings,
    image_features=compiled(model.image_features),
    text_features=compiled(model.text_features),
    classify=jax.jit(model.classify) if "classifier" in model.heads.members else None,
    gather=compiled(lambda arrays: arrays),
    trims_texts=not isinstance(model.towers.text, TextTransformer) or model.towers.text.ignores_padding,
  )


@dataclass(frozen=True)
class Encoders:
  """Encode functions with parameters and placement bound, the preprocessing of their inputs, and their comparison.

  Attributes:
    image: function from this host's share of a global batch, uint8 `[b h w c]`, to pooled features `[B f]` and joint
      embeddings `[B d]`, not normalised, None without a joint space; they stay on the devices, see
      `sharding.local_rows`.
    text: function from this host's share of token ids, int32 `[b t]`, to the `Embeddings` `[B ...]` of all texts.
    tokenizer: function from texts to token ids.
    view: preprocessing of images.
    batch_size: global `B`, a multiple of the number of devices.
    batch_rows: indices of this host's rows in a global batch.
    similarity: scores of embeddings, on every host; all hosts must make the same calls.
    image_tokens: for models that compare tokens (FILIP), a function from this host's share of images to the tokens of
      all, `[B n e]`; None for other models.
    reading: how images are read.
    classifier: the model's classifier, None without one.
    trims_texts: whether padding that all texts have in common may be cut off.
    features_dtype: dtype to which features of images are rounded; they are float32 arrays in any case.
  """

  image: Callable[[UInt8[np.ndarray, "b h w c"]], tuple[Any, Any]]
  text: Callable[[Int[np.ndarray, "b t"]], Embeddings]
  tokenizer: Callable[[Sequence[str]], np.ndarray]
  view: EvalView
  batch_size: int
  batch_rows: Int[np.ndarray, "b"]
  similarity: Similarity = cosines
  image_tokens: Callable[[UInt8[np.ndarray, "b h w c"]], Embeddings] | None = None
  reading: Reading = field(default_factory=Reading)
  classifier: ModelClassifier | None = None
  trims_texts: bool = True
  features_dtype: str = "float32"

  def with_callback(self, callback: Callable[[], None]) -> "Encoders":
    """A copy that calls `callback` before each batch, since an evaluation can take long."""

    def calling(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
      def call(inputs: Any) -> Any:
        callback()
        return function(inputs)

      return call

    image_tokens = self.image_tokens and calling(self.image_tokens)
    return dataclasses.replace(self, image=calling(self.image), text=calling(self.text), image_tokens=image_tokens)


class EncoderFactory:
  """Binds parameters to encode functions: `bind` makes `Encoders` for any parameters without compiling again.

  Args:
    functions: encode functions of the model.
    tokenizer: tokenizer of the model.
    view: preprocessing of images.
    batch_size: global batch size of every call, a multiple of the number of devices.
    reading: how images are read.
    classnames: names of the classes of the model's classifier.
    field: what sets the batch size, for messages.

  Raises:
    ValueError: the batch size is not a multiple of the number of devices.
  """

  def __init__(
    self,
    functions: EncodeFunctions,
    tokenizer: Callable[[Sequence[str]], np.ndarray],
    view: EvalView,
    batch_size: int,
    reading: Reading | None = None,
    classnames: Sequence[str] = (),
    field: str = "config.evaluate_batch_size",
  ):
    check_batch(batch_size, functions.mesh, field)
    self._classnames = tuple(classnames)
    self._functions, self._sharding = functions, batch_sharding(functions.mesh)
    self._inputs = {
      "tokenizer": tokenizer,
      "view": view,
      "batch_size": batch_size,
      "batch_rows": batch_rows(self._sharding, batch_size),
      "similarity": functions.similarity,
      "trims_texts": functions.trims_texts,
      "reading": reading or Reading(),
    }

  def bind(self, params: Tree, collections: Tree) -> Encoders:
    """Binds parameters; the resulting functions map host arrays to host arrays, except `image`."""
    functions = self._functions
    place = partial(to_global, sharding=self._sharding)

    def fetch(encode: EncodeFunction) -> Callable[[Any], Any]:
      return lambda inputs: jax.tree.map(np.asarray, encode(params, collections, place(inputs)))

    return Encoders(
      image=lambda images: functions.pooled_and_joint(params, collections, place(images)),
      text=fetch(functions.text),
      image_tokens=fetch(functions.image) if functions.tokens else None,
      classifier=self._classifier(params) if functions.classify else None,
      **self._inputs,
    )

  def _classifier(self, params: Tree) -> ModelClassifier:
    gathered = self._functions.gather(params["heads"])
    heads = jax.tree.map(lambda array: array.addressable_data(0), gathered)

    def logits(pooled: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n classes"]:
      return np.asarray(self._functions.classify(heads, pooled))

    return ModelClassifier(logits, self._classnames)


def encode_texts(texts: Sequence[str], encoders: Encoders) -> Embeddings:
  """Encodes texts in batches of one size, trimmed where the model ignores padding.

  A text is encoded together with those of its own length, so its embedding does not depend on the others. Where
  embeddings are tokens, all have one length, which depends on the longest text.
  """
  tokens = encoders.tokenizer(texts)
  if not encoders.trims_texts:
    return _encode(tokens, encoders)
  lengths = _rounded_lengths(tokens)
  if encoders.image_tokens is not None:
    return _encode(tokens[:, : lengths.max()], encoders)
  found = np.unique(lengths)
  encoded = concatenate([_encode(tokens[lengths == length, :length], encoders) for length in found], len(tokens))
  rows = np.concatenate([np.flatnonzero(lengths == length) for length in found])
  return encoded[np.argsort(rows)]


def _encode(tokens: Int[np.ndarray, "n t"], encoders: Encoders) -> Embeddings:
  """Embeddings of rows of token ids."""
  size = encoders.batch_size
  padded = np.concatenate([tokens, np.repeat(tokens[-1:], -len(tokens) % size, axis=0)])
  encoded = [encoders.text(batch[encoders.batch_rows]) for batch in padded.reshape(-1, size, tokens.shape[1])]
  return concatenate(encoded, len(tokens))


def _rounded_lengths(tokens: Int[np.ndarray, "n t"]) -> Int[np.ndarray, "n"]:
  """Length of each text, rounded up to a multiple of 16, so that few lengths are compiled."""
  lengths = tokens.shape[1] - (tokens[:, ::-1] != 0).argmax(axis=1)
  return -(-lengths // 16) * 16

"""What every evaluator needs: embeddings of a whole source, or of many texts, by pure encode functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int, UInt8
import numpy as np

from declip_jax.data.pipeline import EvaluationBatches
from declip_jax.data.sources import Source
from declip_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoders:
  """Encode functions with parameters and placement bound, and how inputs are made for them.

  Attributes:
    image: this host's part of a global batch, uint8 `[b h w c]`, to all unit-norm embeddings `[B d]` on every host.
    text: likewise for token ids int32 `[b t]`.
    gather: likewise for any rows, without encoding: `[b ...]` to `[B ...]`.
    tokenizer: of the texts.
    image_size, interpolation, resize: of the evaluation view, `images.eval_view`.
    batch_size: global `B`, a multiple of the number of devices.
    rows: which rows of a global batch are this host's.
  """

  image: Callable[[UInt8[np.ndarray, "b h w c"]], Float[np.ndarray, "B d"]]
  text: Callable[[Int[np.ndarray, "b t"]], Float[np.ndarray, "B d"]]
  gather: Callable[[Any], Any]
  tokenizer: Tokenizer
  image_size: int
  interpolation: str
  resize: int
  batch_size: int
  rows: Int[np.ndarray, "b"]


class EmbeddedImages(NamedTuple):
  """A source's images in order; `readable` is False where an image could not be decoded and its row means nothing."""

  embedding: Float[np.ndarray, "n d"]
  label: Int[np.ndarray, "n"]
  readable: Bool[np.ndarray, "n"]


def embed_images(source: Source, encoders: Encoders) -> EmbeddedImages:
  """Embeds every image of a source. Neither batch size nor number of devices or hosts changes the result."""
  batches = EvaluationBatches(
    source,
    encoders.batch_size,
    encoders.image_size,
    encoders.interpolation,
    encoders.resize,
    encoders.rows,
  )
  parts = [(encoders.image(b["image"]), *encoders.gather((b["label"], b["mask"]))) for b in batches]
  embedding, label, readable = (np.concatenate(column)[: len(source)] for column in zip(*parts, strict=True))
  return EmbeddedImages(embedding, label, readable)


def embed_texts(texts: Sequence[str], encoders: Encoders) -> Float[np.ndarray, "n d"]:
  """Embeds texts, in batches padded to one size."""
  tokens = encoders.tokenizer(texts)
  size = encoders.batch_size
  padded = np.concatenate([tokens, np.repeat(tokens[-1:], -len(tokens) % size, axis=0)])
  parts = [encoders.text(batch[encoders.rows]) for batch in padded.reshape(-1, size, tokens.shape[1])]
  return np.concatenate(parts)[: len(tokens)]

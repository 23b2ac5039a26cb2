"""A source of grey squares and a model that knows their grey, shared by the tests of evaluations."""

from typing import Any

import numpy as np

from declip_jax.data.images import EvalView
from declip_jax.evals.encoders import Encoders


class Greys(list):
  """Squares `(grey, label)`; a grey of None cannot be read."""

  name, classnames, skipped, left_out, stamp = "greys", ("even", "odd"), {}, {}, "1"

  def __getitem__(self, index: int) -> dict[str, Any]:
    grey, label = super().__getitem__(index)
    image = b"broken" if grey is None else np.full((16, 16, 3), grey, np.uint8)
    return {"image": image, "captions": (), "label": label, "id": f"greys:{index}"}


def grey_encoders(batch_size: int, events: list[str] | None = None) -> Encoders:
  """The pooled feature of an image is its grey, and its joint embedding (grey, 3)."""

  def encode(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if events is not None:
      events.append("encode")
    grey = images[:, 0, 0, :1].astype(np.float32)
    return grey, np.concatenate([grey, 0 * grey + 3], axis=1)

  def encode_text(tokens: np.ndarray) -> np.ndarray:
    if events is not None:
      events.append("text")
    return tokens.astype(np.float32)

  return Encoders(
    encode,
    encode_text,
    lambda texts: np.array([[len(text)] for text in texts]),
    EvalView(16),
    batch_size,
    np.arange(batch_size),
  )

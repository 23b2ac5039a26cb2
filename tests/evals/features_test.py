"""Tests of `declip_jax.evals.features`: one pass of a model gives pooled features and joint embeddings, in order."""

from typing import Any

import numpy as np
import pytest

from declip_jax.data.images import EvalView
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.features import Split, Texts, host_rows, make_data


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


@pytest.mark.parametrize("batch_size", [1, 4, 7, 16])
def test_rows_are_those_of_the_source_for_any_batch_size(batch_size: int) -> None:
  source = Greys([(10, 0), (21, 1), (None, 1), (30, -1), (41, 1), (5, 1), (60, 0)])
  features = Split(source, grey_encoders(batch_size)).features
  readable = features.readable
  np.testing.assert_array_equal(readable, [grey is not None for grey, _ in list.__iter__(source)])
  np.testing.assert_array_equal(features.pooled[readable, 0], [10, 21, 30, 41, 5, 60])
  np.testing.assert_array_equal(features.embedding[:, 1], 3)
  np.testing.assert_array_equal(features.label, [0, 1, -1, -1, 1, 1, 0])  # -1 where an image cannot be read
  assert [features.id[0], features.id[6], features.id[2]] == ["greys:0", "greys:6", "sample 2"]
  images = Split(source, grey_encoders(batch_size)).images
  np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-6)


def test_splits_and_texts_are_encoded_once() -> None:
  events: list[str] = []
  encoders = grey_encoders(4, events)
  split, texts = Split(Greys([(1, 0), (2, 1)]), encoders), Texts(encoders)
  for _ in range(2):
    data = make_data(encoders, texts, split)
    assert data.test.images.shape == (2, 2)
    np.testing.assert_array_equal(data.texts(["a", "bcd"]), [[1], [3]])
  assert sorted(events) == ["encode", "text"]


def test_an_empty_split_is_named() -> None:
  with pytest.raises(ValueError, match="greys has no samples"):
    _ = Split(Greys([]), grey_encoders(4)).features


@pytest.mark.parametrize(("size", "hosts"), [(10, 3), (4, 4), (3, 4), (0, 2), (9, 1)])
def test_hosts_share_the_rows_in_order(size: int, hosts: int) -> None:
  shares = [host_rows(size, host, hosts) for host in range(hosts)]
  assert [row for share in shares for row in share] == [*range(size)]
  assert max(map(len, shares)) == len(shares[0]) == -(-size // hosts)

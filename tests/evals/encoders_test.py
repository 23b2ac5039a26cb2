"""Tests of `declip_jax.evals.encoders`: texts are encoded at the price of their tokens."""

import numpy as np
import pytest

from declip_jax.data.images import EvalView
from declip_jax.evals.encoders import Encoders, encode_texts

TEXTS = ["a" * length for length in (3, 20, 16, 70, 1, 17, 33)]
SHAPES: list[tuple[int, ...]] = []


def tokenise(texts: list[str]) -> np.ndarray:
  """One token per letter, of a context of 77."""
  return np.array([[7] * len(text) + [0] * (77 - len(text)) for text in texts], np.int32)


def encode_text(tokens: np.ndarray) -> np.ndarray:
  """The length of a text, and of the row that it is encoded in."""
  SHAPES.append(tokens.shape)
  return np.stack([(tokens != 0).sum(axis=1), np.full(len(tokens), tokens.shape[1])], axis=1)


def encoders(**fields: object) -> Encoders:
  SHAPES.clear()
  return Encoders(lambda images: (images, None), encode_text, tokenise, EvalView(8), 2, np.arange(2), **fields)


def test_each_text_is_encoded_with_those_of_its_length_in_batches_of_one_size() -> None:
  expected = [[3, 16], [20, 32], [16, 16], [70, 77], [1, 16], [17, 32], [33, 48]]
  np.testing.assert_array_equal(encode_texts(TEXTS, encoders()), expected)
  assert SHAPES == [(2, 16), (2, 16), (2, 32), (2, 48), (2, 77)]
  for text, row in zip(TEXTS, expected, strict=True):  # whatever the others are
    np.testing.assert_array_equal(encode_texts([text], encoders()), [row])


@pytest.mark.parametrize(
  ("texts", "fields", "length"),
  [(TEXTS, {"trims_texts": False}, 77), (TEXTS[:3], {"image_tokens": lambda images: images}, 32)],
)
def test_all_texts_have_one_length_if_padding_matters_or_tokens_are_compared(
  texts: list[str], fields: dict, length: int
) -> None:
  found = encode_texts(texts, encoders(**fields))
  assert found.tolist() == [[len(text), length] for text in texts]

"""Tests of `declip_jax.evals.text_cache`: which texts are encoded again."""

from dataclasses import replace
import os
from pathlib import Path

from greys import grey_encoders
import numpy as np
import pytest

from declip_jax.evals.feature_cache import remove_oldest
from declip_jax.evals.features import Texts
from declip_jax.evals.text_cache import TextCache


class Counting:
  """Texts that are encoded as their length, by one model, in batches of two; counts the batches."""

  def __init__(self, folder: Path, weights: str = "w"):
    self.events: list[str] = []
    cache = TextCache(folder, weights, {"width": 1})
    self.texts = Texts(grey_encoders(2, self.events), cache.encode)

  def __call__(self, *texts: str) -> list[float]:
    return self.texts(texts)[:, 0].tolist()


def test_texts_are_encoded_once_by_a_model_whatever_lists_they_are_in(tmp_path: Path) -> None:
  first = Counting(tmp_path)
  assert first("a", "bcd", "a") == [1, 3, 1]
  assert first("efghi", "a") == [5, 1]
  assert len(first.events) == 2
  again = Counting(tmp_path)
  assert again("efghi", "bcd", "a") == [5, 3, 1]
  assert again.events == []
  assert again("bcd", "xy") == [3, 2]
  assert len(again.events) == 1
  other = Counting(tmp_path, "other weights")
  assert other("a") == [1]
  assert len(other.events) == 1


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_texts_in_a_damaged_file_are_encoded_again(content: bytes | None, tmp_path: Path) -> None:
  Counting(tmp_path)("a", "bcd")
  (path,) = tmp_path.glob("*/*.npz")
  whole = path.read_bytes()
  place = whole.index(np.float32([1, 3]).tobytes())
  path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :] if content is None else content)
  again = Counting(tmp_path)
  assert again("a", "bcd") == [1, 3]
  assert len(again.events) == 1
  assert path.read_bytes() == whole


def test_the_entry_of_texts_is_removed_like_those_of_features(tmp_path: Path) -> None:
  Counting(tmp_path)("a")
  (entry,) = tmp_path.iterdir()
  os.utime(entry / "about.json", (0, 0))
  Counting(tmp_path)("a")
  assert (entry / "about.json").stat().st_mtime > 0
  assert [*remove_oldest(tmp_path, 0, set())] == []  # it was used just now
  os.utime(entry / "about.json", (0, 0))
  assert [*remove_oldest(tmp_path, 0, set())] == [entry]


def test_tokens_are_not_kept(tmp_path: Path) -> None:
  cache = TextCache(tmp_path, "w", {})
  encoders = replace(grey_encoders(2), image_tokens=lambda images: images)
  encoders = replace(encoders, tokenizer=lambda texts: np.ones((len(texts), 16), np.int32))
  Texts(encoders, cache.encode)(["a"])
  assert not [*tmp_path.iterdir()]

"""Tests of `declip_jax.evals.features`: one pass of a model gives pooled features and joint embeddings, in order."""

from dataclasses import replace
import errno
from typing import Any

import cv2
from greys import Greys, grey_encoders
import numpy as np
import pytest

from declip_jax.evals import features
from declip_jax.evals.features import DecodedImages, Split, Texts, host_rows, make_data


@pytest.mark.parametrize("batch_size", [1, 4, 7, 16])
def test_rows_are_those_of_the_source_for_any_batch_size(batch_size: int) -> None:
  source = Greys([(10, 0), (21, 1), (None, 1), (30, -1), (41, 1), (5, 1), (60, 0)])
  found = Split(source, grey_encoders(batch_size)).features
  readable = found.readable
  np.testing.assert_array_equal(readable, [grey is not None for grey, _ in list.__iter__(source)])
  np.testing.assert_array_equal(found.pooled[readable, 0], [10, 21, 30, 41, 5, 60])
  np.testing.assert_array_equal(found.embedding[:, 1], 3)
  np.testing.assert_array_equal(found.label, [0, 1, -1, -1, 1, 1, 0])  # -1 where an image cannot be read
  assert [found.id[0], found.id[6], found.id[2]] == ["greys:0", "greys:6", "sample 2"]
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


class Annotated(Greys):
  """Greys with two labels of three and a region; the first one and each tenth cannot be read."""

  def __getitem__(self, index: int) -> dict:
    example = super().__getitem__(index)
    if index % 10 == 0:
      return {**example, "image": b"broken"}
    return {**example, "labels": np.array([1, 0, -1], np.int8), "groups": {"region": index}}


def test_several_labels_and_groups_are_those_of_the_source_for_any_batch_size() -> None:
  source = Annotated([(grey, -1) for grey in range(12)])
  source.classnames = ("a", "b", "c")
  for batch_size in (1, 4, 16):
    split = Split(source, grey_encoders(batch_size), classes=np.array([2, 0, 1]))
    np.testing.assert_array_equal(split.labels[split.readable], [[0, -1, 1]] * 10)
    np.testing.assert_array_equal(split.groups["region"], [-1, *range(1, 10), -1, 11])


def test_labels_are_classes_of_the_data_set_and_some_are_left_out() -> None:
  source = Greys([(10, 0), (20, 1), (30, -1)])
  split = Split(source, grey_encoders(4), classes=np.array([1, -1]))
  np.testing.assert_array_equal(split.label, [1, -1, -1])
  np.testing.assert_array_equal(split.features.label, split.label)


@pytest.mark.parametrize(("limit", "reads"), [(2**20, 3), (3 * 3 * 16 * 16 - 1, 6)])
def test_small_sources_are_decoded_once_for_all_evaluations_of_a_run(limit: int, reads: int) -> None:
  read: list[int] = []

  class Counting(Greys):
    def __getitem__(self, index: int) -> dict:
      read.append(index)
      return super().__getitem__(index)

  source, decoded = Counting([(10, 0), (20, 1), (30, 1)]), DecodedImages(limit)
  found = [Split(source, grey_encoders(2), read=decoded).features for _ in range(2)]
  assert len(read) == reads
  np.testing.assert_array_equal(found[0].pooled, found[1].pooled)


def test_sources_are_read_again_after_errors_that_pass() -> None:
  read, broken = [], [True]

  class Flaky(Greys):
    def __getitem__(self, index: int) -> dict:
      read.append(index)
      if broken[0] and index == 1:
        raise OSError(errno.EIO, "fails")
      return super().__getitem__(index)

  source, decoded = Flaky([(10, 0), (20, 1), (30, 1)]), DecodedImages(2**20)
  split = [Split(source, grey_encoders(2), read=decoded).features for broken[0] in (True, False, False)]
  assert [one.readable.tolist() for one in split] == [[True, False, True], [True] * 3, [True] * 3]
  assert len(read) == 6


def test_the_content_of_a_split_tells_other_images_of_the_same_names_apart() -> None:
  class Encoded(Greys):
    def __getitem__(self, index: int) -> dict:
      image = super().__getitem__(index)["image"]
      return {**super().__getitem__(index), "image": image if isinstance(image, bytes) else png(image)}

  def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()

  first, *others = (Split(Encoded([(10, 0), (None, 0), (grey, 1)]), grey_encoders(2)).content for grey in (20, 20, 30))
  assert others[0] == first
  assert others[1]["content"] == first["content"]
  assert others[1]["images"] != first["images"]
  assert "images" not in Split(Greys([(10, 0)]), grey_encoders(2)).content  # they are not encoded


def test_hosts_agree_on_a_label_that_is_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
  split = Split(Greys([(10, 0), (20, 7)]), grey_encoders(2))
  with pytest.raises(ValueError, match="greys: sample 1 has label 7, but there are 2 classes"):
    _ = split.label
  monkeypatch.setattr(features, "first_error", lambda mine: mine or "host 1: greys: sample 9 has label 5")
  with pytest.raises(ValueError, match="host 1: greys: sample 9"):
    _ = Split(Greys([(10, 0), (20, 1)]), grey_encoders(2)).label


def test_tokens_are_dropped_and_embeddings_are_not() -> None:
  for tokens, encoded in ((None, ["text"]), (lambda images: images, ["text", "text"])):
    events: list[str] = []
    texts = Texts(replace(grey_encoders(4, events), image_tokens=tokens))
    for _ in range(2):
      texts(["a", "bcd"])
      texts.drop_tokens()
    assert events == encoded


def test_the_content_of_a_split_depends_on_ids_labels_and_captions_but_not_on_its_folder() -> None:
  def content(folder: str, *examples: tuple[str, int, tuple[str, ...]]) -> dict[str, Any]:
    class Named(list):
      name, classnames, stamp = folder, (), "1"

      def __getitem__(self, index: int) -> dict[str, Any]:
        place, label, captions = super().__getitem__(index)
        image = b"broken" if place == "broken" else np.zeros((4, 4, 3), np.uint8)
        return {"image": image, "captions": captions, "label": label, "id": f"{folder}/{place}"}

    return Split(Named(examples), grey_encoders(2)).content

  rows = [("a", 0, ()), ("b", 1, ("a cat",)), ("broken", 1, ())]
  found = content("/here", *rows)
  assert found["readable"] == 2
  assert content("/moved/there", *rows) == found
  changed = [("c", 0, ()), rows[1]], [("a", 1, ()), rows[1]], [rows[0], ("b", 1, ("a dog",))], [rows[1], rows[0]]
  hashes = {content("/here", *own)["content"] for own in (*changed, rows[:2])}
  assert len(hashes) == 5
  assert content("/here", *rows[:2])["content"] == found["content"]

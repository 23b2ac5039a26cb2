"""Tests of `declip_jax.evals.retrieval` against CLIP_benchmark, against loops, and over a small source."""

import io

import numpy as np
from PIL import Image
import pytest
import references as reference

from declip_jax.data.images import EvalView
from declip_jax.evals import metrics
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.features import Split, Texts, make_data
from declip_jax.evals.metrics import recall
from declip_jax.evals.retrieval import METRICS, retrieval
from declip_jax.evals.similarity import TextTokens


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def own_captions(image_of_text):
  """`match` and `group` if each text belongs to one image."""
  return np.eye(image_of_text.max() + 1, dtype=bool), image_of_text


@pytest.mark.parametrize("captions", ["retrieval", "retrieval_var"])
@pytest.mark.parametrize("chunk", [1024, 7])
def test_recall_equals_clip_benchmark(captions, chunk, monkeypatch):
  monkeypatch.setattr(metrics, "_CHUNK", chunk)
  golden = reference.load("metrics")
  match, group = own_captions(golden[f"{captions}/text_to_image_index"])
  image, text = unit(golden["retrieval/image_embeddings"]), unit(golden[f"{captions}/text_embeddings"])
  found = recall(image, text, match, group)
  theirs = {"image_to_text": "text_retrieval", "text_to_image": "image_retrieval"}
  assert len(found) == 6
  for way, name in theirs.items():
    for k in (1, 5, 10):
      expected = golden[f"{captions}/{name}_recall_at_{k}"]
      np.testing.assert_allclose(found[f"{way}_r{k}"], expected, atol=1e-6, err_msg=f"{way} at {k}")


def test_recall_with_shared_captions_equals_loops():
  rng = np.random.default_rng(0)
  image, text = rng.normal(size=(15, 4)), rng.normal(size=(20, 4))
  match, group = rng.random((15, 6)) < 0.3, rng.integers(0, 6, 20)
  match[np.arange(15), rng.integers(0, 6, 15)] = True
  match[0] = True
  similarity = image @ text.T
  relevant = np.array([[match[i, group[t]] for t in range(20)] for i in range(15)])

  def share(similarity, relevant, k):
    return np.mean([hits[np.argsort(-row)[:k]].any() for row, hits in zip(similarity, relevant, strict=True)])

  found = recall(image, text, match, group)
  for k in (1, 5, 10):
    np.testing.assert_allclose(found[f"image_to_text_r{k}"], share(similarity, relevant, k))
    np.testing.assert_allclose(found[f"text_to_image_r{k}"], share(similarity.T, relevant.T, k))


@pytest.mark.parametrize("chunk", [1024, 7])
def test_each_direction_has_scores_of_its_own(chunk, monkeypatch):
  # Rows are tokens, here the index of the row, and the two directions are independent.
  monkeypatch.setattr(metrics, "_CHUNK", chunk)
  rng = np.random.default_rng(0)
  image, text = np.arange(15)[:, None, None], TextTokens(np.arange(30)[:, None, None], np.ones((30, 1), bool))
  to_text, to_image = rng.normal(size=(15, 30)), rng.normal(size=(30, 15))

  def similarity(query, key):
    if isinstance(query, TextTokens):
      return to_image[np.ix_(query.token.ravel(), key.ravel())]
    return to_text[np.ix_(query.ravel(), key.token.ravel())]

  match, group = own_captions(np.arange(30) // 2)
  found = recall(image, text, match, group, similarity)
  for k in (1, 5, 10):
    texts = [{2 * i, 2 * i + 1} & set(np.argsort(-to_text[i])[:k]) for i in range(15)]
    images = [t // 2 in np.argsort(-to_image[t])[:k] for t in range(30)]
    np.testing.assert_allclose(found[f"image_to_text_r{k}"], np.mean([bool(hits) for hits in texts]))
    np.testing.assert_allclose(found[f"text_to_image_r{k}"], np.mean(images))
  assert 0 < found["text_to_image_r5"] != found["image_to_text_r5"] > 0


def test_a_collapsed_model_scores_zero():
  match, group = own_captions(np.repeat(np.arange(12), 2))
  found = recall(np.ones((12, 3)), np.ones((24, 3)), match, group)
  assert set(found.values()) == {0.0}


def test_a_model_with_nans_scores_zero():
  match, group = own_captions(np.repeat(np.arange(12), 2))
  found = recall(np.full((12, 3), np.nan), np.full((24, 3), np.nan), match, group)
  assert set(found.values()) == {0.0}


def search(source, encoders, **options):
  return retrieval(make_data(encoders, Texts(encoders), Split(source, encoders)), None, **options).metrics


class Source(list):
  """Pictures of one grey each, `20 * index`; entries that are not integers cannot be read."""

  name, classnames, skipped, left_out = "greys", (), {}, {}

  def __getitem__(self, index):
    grey, captions = super().__getitem__(index)
    image = np.full((8, 8, 3), 20 * grey, np.uint8) if isinstance(grey, int) else b"broken"
    return {"image": image, "captions": captions, "label": -1, "id": str(index)}


def encoders(words, batch_size=4):
  """Looks images up by their grey and texts by their word, in rows of the identity: equal numbers match."""
  table = np.eye(8, dtype=np.float32)
  return Encoders(
    image=lambda images: (table[np.rint(images.mean(axis=(1, 2, 3)) / 20).astype(int)],) * 2,
    text=lambda tokens: table[tokens[:, 0]],
    tokenizer=lambda texts: np.array([[words[text]] for text in texts]),
    view=EvalView(8),
    batch_size=batch_size,
    batch_rows=np.arange(batch_size),
  )


def test_unusable_samples_are_skipped():
  source = Source(
    [(0, ("zero", "nought")), ("broken", ("lost",)), (1, ("one",)), (2, ()), (3, ("three",)), (4, ("five",))]
  )
  words = {"zero": 0, "nought": 0, "one": 1, "three": 3, "five": 5}
  found = search(source, encoders(words))
  assert tuple(found) == METRICS
  assert (found["images"], found["texts"]) == (4, 5)
  assert found["image_to_text_r1"] == 0.75  # the picture of a four has only a text about a five
  assert found["text_to_image_r1"] == 0.8


class EncodedSource(Source):
  """The same pictures as PNG."""

  def __getitem__(self, index):
    example = super().__getitem__(index)
    file = io.BytesIO()
    Image.fromarray(example["image"]).save(file, "PNG")
    return {**example, "image": file.getvalue()}


@pytest.mark.parametrize(
  ("samples", "images", "expected"),
  [
    ([(1, ("one",)), (2, ("two",)), (1, ("uno",)), (2, ("due",))], 2, 1.0),
    ([(1, ("one",)), (2, ("two", "due")), (1, ("uno",))], 3, 1 / 3),  # samples are images if any has several captions
  ],
)
def test_samples_of_one_image_count_once_if_each_has_one_caption(samples, images, expected):
  words = {"one": 1, "uno": 1, "two": 2, "due": 2}
  found = search(EncodedSource(samples), encoders(words))
  assert (found["images"], found["texts"]) == (images, 4)
  assert found["image_to_text_r1"] == pytest.approx(expected)


@pytest.mark.parametrize(("equal_texts", "expected"), [(True, 1.0), (False, 0.5)])
def test_equal_texts_may_match_each_others_images(equal_texts, expected):
  # Two pictures of a one share their caption. Without shared captions they tie with each other and count as misses.
  source = Source([(1, ("one",)), (2, ("two",)), (1, ("one",)), (3, ("three",))])
  found = search(source, encoders({"one": 1, "two": 2, "three": 3}), equal_texts=equal_texts)
  assert found["image_to_text_r1"] == found["text_to_image_r1"] == expected


def test_a_source_without_captions_is_named():
  with pytest.raises(ValueError, match="greys has no readable image with a caption"):
    search(Source([(1, ()), ("broken", ("lost",))]), encoders({}))

"""Tests of `declip_jax.evals.ranks` against CLIP_benchmark, numbers in float64, and loops."""

import jax
import numpy as np
import pytest
import references as reference

from declip_jax.evals import ranks
from declip_jax.evals.ranks import METRICS, recalls, retrieval_ranks
from declip_jax.evals.similarity import TextTokens, cosines
from declip_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def golden():
  return reference.load("retrieval")


@pytest.fixture(params=[1024, 16])
def block(request, monkeypatch):
  """Queries in one block, and in several."""
  monkeypatch.setattr(ranks, "_BLOCK", request.param)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("captions", ["retrieval", "retrieval_var"])
def test_recalls_equal_clip_benchmark(captions, block):
  golden = reference.load("metrics")
  image, text = golden["retrieval/image_embeddings"], golden[f"{captions}/text_embeddings"]
  found = recalls(retrieval_ranks(image, text, golden[f"{captions}/text_to_image_index"]))
  assert tuple(found) == METRICS
  theirs = {"image_to_text": "text_retrieval", "text_to_image": "image_retrieval"}
  for way, name in theirs.items():
    for k in (1, 5, 10):
      expected = golden[f"{captions}/{name}_recall_at_{k}"]
      np.testing.assert_allclose(found[f"{way}_r{k}"], expected, atol=1e-6, err_msg=f"{way} at {k}")


@pytest.mark.parametrize("path", ["devices", "similarity"])
def test_ranks_equal_those_in_float64(path, golden, block):
  """One image has no text, and many texts are equal, so that ranks with and without ties differ."""
  image, text, similarity = golden["image"], golden["text"], None
  if path == "similarity":
    image, text, similarity = unit(image), unit(text), cosines
  result = retrieval_ranks(image, text, golden["text_to_image"], similarity=similarity)
  np.testing.assert_array_equal(result.images, golden["kept_images"])
  found = recalls(result)
  for way in ranks.DIRECTIONS:
    own = getattr(result, way)
    np.testing.assert_array_equal(own.low, golden[f"{way}/rank_ties_for_the_model"])
    np.testing.assert_array_equal(own.high, golden[f"{way}/rank_ties_against"])
    for name in ("mean_rank", "median_rank"):
      np.testing.assert_allclose(found[f"{way}_{name}"], golden[f"{way}/{name}"])
    for k in (1, 5, 10):
      np.testing.assert_allclose(found[f"{way}_r{k}"], golden[f"{way}/r{k}"])
  assert (result.image_to_text.low < result.image_to_text.high).any()
  six = [golden[f"{way}/r{k}"] for way in ranks.DIRECTIONS for k in (1, 5, 10)]
  np.testing.assert_allclose(found["mean_recall"], np.mean(six))
  np.testing.assert_allclose(found["mean_r1"], (six[0] + six[3]) / 2)


def test_equal_texts_may_match_each_others_images(golden):
  group = golden["equal_texts/group"].astype(int)
  found = recalls(retrieval_ranks(golden["image"], golden["text"], golden["text_to_image"], group))
  for way in ranks.DIRECTIONS:
    for k in (1, 5, 10):
      np.testing.assert_allclose(found[f"{way}_r{k}"], golden[f"equal_texts/{way}_r{k}"])


def test_folds_equal_separate_searches(golden):
  found = recalls(retrieval_ranks(golden["image"], golden["text"], golden["text_to_image"], folds=5))
  for way in ranks.DIRECTIONS:
    for k in (1, 5, 10):
      np.testing.assert_allclose(found[f"{way}_r{k}"], golden[f"folds5/{way}_r{k}"])


def test_ranks_do_not_depend_on_the_number_of_devices(golden, monkeypatch):
  assert jax.device_count() == 8
  monkeypatch.setattr(ranks, "make_mesh", lambda *sizes: make_mesh(*sizes, jax.devices()[:1]))
  result = retrieval_ranks(golden["image"], golden["text"], golden["text_to_image"])
  for way in ranks.DIRECTIONS:
    np.testing.assert_array_equal(getattr(result, way).high, golden[f"{way}/rank_ties_against"])


def test_each_direction_has_scores_of_its_own(block):
  # Rows are tokens, here the index of the row, and the two directions are independent.
  rng = np.random.default_rng(0)
  image, text = np.arange(15)[:, None, None], TextTokens(np.arange(30)[:, None, None], np.ones((30, 1), bool))
  to_text, to_image = rng.normal(size=(15, 30)), rng.normal(size=(30, 15))

  def similarity(query, key):
    if isinstance(query, TextTokens):
      return to_image[np.ix_(query.token.ravel(), key.ravel())]
    return to_text[np.ix_(query.ravel(), key.token.ravel())]

  found = recalls(retrieval_ranks(image, text, np.arange(30) // 2, similarity=similarity))
  for k in (1, 5, 10):
    texts = [{2 * i, 2 * i + 1} & set(np.argsort(-to_text[i])[:k]) for i in range(15)]
    images = [t // 2 in np.argsort(-to_image[t])[:k] for t in range(30)]
    np.testing.assert_allclose(found[f"image_to_text_r{k}"], np.mean([bool(hits) for hits in texts]))
    np.testing.assert_allclose(found[f"text_to_image_r{k}"], np.mean(images))
  assert 0 < found["text_to_image_r5"] != found["image_to_text_r5"] > 0


@pytest.mark.parametrize("value", ["equal", 0.0, np.nan])
def test_a_collapsed_model_or_one_with_nans_scores_zero(value):
  row = np.random.default_rng(0).normal(size=37) if value == "equal" else np.full(37, value)
  found = recalls(retrieval_ranks(np.tile(row, (13, 1)), np.tile(row, (26, 1)), np.repeat(np.arange(13), 2)))
  assert {found[name] for name in METRICS if "_r" in name and "rank" not in name} == {0.0}
  assert found["text_to_image_mean_rank"] == 13
  assert found["image_to_text_median_rank"] == 25


def test_arguments_that_do_not_fit_are_named():
  rows = np.eye(4)
  with pytest.raises(ValueError, match="4 texts, but the images of 3"):
    retrieval_ranks(rows, rows, np.arange(3))
  with pytest.raises(ValueError, match="2 images with a text: expected at least 5"):
    retrieval_ranks(rows, rows, np.array([0, 0, 1, 1]), folds=5)

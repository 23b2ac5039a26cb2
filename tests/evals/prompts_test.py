"""Tests of `declip_jax.evals.prompts` against CLIP_benchmark and numbers in float64."""

import numpy as np
import pytest
import references as reference

from declip_jax.evals.prompts import classifier, from_templates, token_classifier, unique_prompts
from declip_jax.evals.similarity import cosines, unit_rows


@pytest.fixture(scope="module")
def golden():
  return reference.load("prompts")


def classes(golden, templates=slice(None), synonyms=slice(None)):
  """Rows of the reference's embeddings of each class's prompts, of some templates and synonyms."""
  owner, template, synonym = golden["class_template_synonym"].astype(int).T
  chosen = np.isin(template, np.unique(template)[templates]) & np.isin(synonym, np.unique(synonym)[synonyms])
  return [np.flatnonzero(chosen & (owner == number)) for number in range(owner.max() + 1)]


def predictions(golden, weights):
  return (unit_rows(golden["image_embedding"]) @ weights.T).argmax(axis=1)


@pytest.mark.parametrize(
  ("choice", "some"),
  [
    ("all_in_one_mean", {}),
    ("first_synonym_only", {"synonyms": slice(1)}),
    ("first_template_only", {"templates": slice(1)}),
  ],
)
def test_templates_and_synonyms_share_one_mean(choice, some, golden):
  weights = classifier(golden["text_embedding"], classes(golden, **some))
  np.testing.assert_allclose(weights, golden[f"{choice}/weights_class_dim"], atol=1e-6)
  np.testing.assert_array_equal(predictions(golden, weights), golden[f"{choice}/pred"])


def test_the_mean_before_normalising_is_another_classifier(golden):
  """The order of operations matters for embeddings whose norms vary, as those of the reference do."""
  weights = classifier(golden["text_embedding"], classes(golden))
  wrong = golden["wrong_mean_before_normalising/weights_class_dim"]
  assert np.abs(weights - wrong).max() > 0.1
  assert (predictions(golden, weights) != golden["wrong_mean_before_normalising/pred"]).sum() == 6


def test_prompts_of_each_class_equal_clip_benchmark(golden):
  owner = golden["own_prompts/class"].astype(int)
  rows = [np.flatnonzero(owner == number) for number in range(owner.max() + 1)]
  weights = classifier(golden["own_prompts/text_embedding"], rows)
  np.testing.assert_allclose(weights, golden["own_prompts/weights_class_dim"], atol=1e-6)
  np.testing.assert_array_equal(predictions(golden, weights), golden["own_prompts/pred"])


def test_scores_averaged_over_prompts_equal_the_reference(golden):
  score = token_classifier(unit_rows(golden["text_embedding"]), classes(golden), cosines)
  np.testing.assert_array_equal(
    score(unit_rows(golden["image_embedding"])).argmax(axis=1), golden["mean_of_cosines/pred"]
  )


def test_classifier_equals_clip_benchmark():
  golden = reference.load("metrics")
  classes, templates, dim = golden["zeroshot/template_embeddings"].shape
  rows = np.arange(classes * templates).reshape(classes, templates)
  weights = classifier(golden["zeroshot/template_embeddings"].reshape(-1, dim), list(rows))
  np.testing.assert_allclose(weights, golden["zeroshot/weights_dim_by_class"].T, atol=1e-6)
  logits = 100 * unit_rows(golden["zeroshot/image_embeddings"]) @ weights.T
  np.testing.assert_allclose(logits, golden["zeroshot/logits_x100"], atol=1e-4)
  np.testing.assert_array_equal(logits.argmax(axis=1), golden["zeroshot/pred"])


def test_equal_prompts_have_one_row():
  texts, rows = unique_prompts((("a cat", "an animal"), ("a dog", "a pup", "an animal")))
  assert texts == ["a cat", "an animal", "a dog", "a pup"]
  assert [own.tolist() for own in rows] == [[0, 1], [2, 3, 1]]


def test_every_class_has_every_template():
  assert from_templates(["cat", "dog"], ["a {}", "the {}."]) == (("a cat", "the cat."), ("a dog", "the dog."))
  with pytest.raises(ValueError, match="prompt template 'a photo' needs one {}"):
    from_templates(["cat"], ["a {}", "a photo"])

"""Tests of `declip_jax.evals.zero_shot` against SLIP's and CLIP_benchmark's evaluation, and over a small source."""

import numpy as np
import pytest
import references as reference

from declip_jax.data.images import EvalView
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.features import Split, Texts, make_data
from declip_jax.evals.prompts import token_classifier
from declip_jax.evals.similarity import TextTokens
from declip_jax.evals.zero_shot import METRICS, zero_shot


@pytest.fixture(scope="module")
def golden():
  return reference.load("metrics")


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def encoders(text_rows, prompts, image_rows=None, batch_size=4):
  """Looks prompts up in `text_rows` and images, by the value of their pixels, in `image_rows`."""
  ids = {prompt: index for index, prompt in enumerate(prompts)}
  return Encoders(
    image=lambda images: (image_rows[images[:, 0, 0, 0]],) * 2,
    text=lambda tokens: text_rows[tokens[:, 0]],
    tokenizer=lambda texts: np.array([[ids[text]] for text in texts]),
    view=EvalView(8),
    batch_size=batch_size,
    batch_rows=np.arange(batch_size),
  )


def classify(source, encoders, **options):
  return scores_of(source, encoders, **options).metrics


def scores_of(source, encoders, **options):
  return zero_shot(make_data(encoders, Texts(encoders), Split(source, encoders)), None, **options)


class Source(list):
  """Pictures `(value of all pixels, label)`; None cannot be read."""

  name, skipped, left_out = "pictures", {}, {}

  def __init__(self, examples, classnames):
    super().__init__(examples)
    self.classnames = classnames

  def __getitem__(self, index):
    value, label = super().__getitem__(index)
    image = b"broken" if value is None else np.full((8, 8, 3), value, np.uint8)
    return {"image": image, "captions": (), "label": label, "id": str(index)}


def test_scores_equal_slip_and_clip_benchmark(golden):
  """Images are the rows of logits, and prompts those of the identity."""
  logits, label = golden["classification/logits"], golden["classification/labels"]
  length = np.linalg.norm(logits, axis=1, keepdims=True)  # which has no effect on the order of classes
  names = [f"name {index}" for index in range(logits.shape[1])]
  source = Source([*enumerate(label)], names)
  found = classify(source, encoders(np.eye(len(names)), names, logits / length), templates=("{}",))
  np.testing.assert_allclose(found["top1"], golden["classification/clipbench_acc1"], atol=1e-7)
  np.testing.assert_allclose(found["top5"], golden["classification/clipbench_acc5"], atol=1e-7)
  np.testing.assert_allclose(
    found["mean_per_class"], golden["classification/clipbench_mean_per_class_recall"], atol=1e-7
  )
  np.testing.assert_allclose(100 * found["top1"], golden["classification/slip_top1_percent"], atol=1e-4)
  np.testing.assert_allclose(100 * found["top5"], golden["classification/slip_top5_percent"], atol=1e-4)
  np.testing.assert_allclose(
    100 * found["mean_per_class"], golden["classification/slip_mean_per_class_percent"], atol=1e-4
  )
  most = max(np.mean(golden["classification/labels"] == name) for name in range(10))
  np.testing.assert_allclose(found["majority_share"], most)


def test_classes_without_an_image_do_not_count():
  source = Source([(0, 0), (0, 1), (1, 1)], [*"abcd"])
  found = classify(source, encoders(np.eye(4), [*"abcd"], np.eye(4)), templates=("{}",))
  expected = {"top1": 2 / 3, "mean_per_class": 0.75, "majority_share": 2 / 3}
  assert {name: found[name] for name in expected} == expected
  assert "top5" not in found


@pytest.fixture(scope="module")
def reference_prompts(golden):
  """Names, templates and a lookup of the reference's embeddings of them, in batches that do not divide them."""
  classes, templates, dim = golden["zeroshot/template_embeddings"].shape
  names = [f"name {index}" for index in range(classes)]
  forms = [f"form {index} of {{}}" for index in range(templates)]
  texts = [form.format(name) for name in names for form in forms]
  rows = unit(golden["zeroshot/template_embeddings"]).reshape(-1, dim)
  return names, forms, texts, rows


def test_accuracy_over_a_source_equals_clip_benchmark(golden, reference_prompts):
  names, forms, texts, rows = reference_prompts
  images = unit(golden["zeroshot/image_embeddings"])
  examples = [(index, label) for index, label in enumerate(golden["zeroshot/labels"])]
  source = Source([(None, 0), *examples, (0, -1)], names)  # an unreadable image and one without a label
  found = scores_of(source, encoders(rows, texts, images), templates=forms)
  assert found.metrics["images"] == len(examples)
  assert tuple(found.metrics) == METRICS
  np.testing.assert_allclose(found.metrics["top1"], golden["zeroshot/acc1"], atol=1e-6)
  np.testing.assert_array_equal(found.predictions["predicted"], golden["zeroshot/pred"])


def test_tokens_are_compared_with_every_prompt_and_scores_averaged_over_templates():
  """By a loop over images, classes and templates; averaging embeddings first would give another result."""
  rng = np.random.default_rng(0)
  names, forms = [f"name {index}" for index in range(3)], [f"form {index} of {{}}" for index in range(4)]
  texts = [form.format(name) for name in names for form in forms]
  image, token = unit(rng.normal(size=(9, 5, 6))), unit(rng.normal(size=(12, 7, 6)))
  valid = np.arange(7) < rng.integers(1, 8, (12, 1))
  ids = {text: index for index, text in enumerate(texts)}
  calls = []

  def similarity(query, key):
    calls.append(len(query))
    products = np.einsum("nke,mte->nmkt", query, key.token)
    return np.where(key.valid[:, None], products, -np.inf).max(axis=3).mean(axis=2)

  found = Encoders(
    image=lambda images: pytest.fail("the tokens are what is compared"),
    image_tokens=lambda images: image[images[:, 0, 0, 0]],
    text=lambda tokens: TextTokens(token[tokens[:, 1]], valid[tokens[:, 1]]),
    tokenizer=lambda texts: np.array([[1, ids[text]] + 30 * [0] for text in texts]),
    view=EvalView(8),
    batch_size=4,
    batch_rows=np.arange(4),
    similarity=similarity,
  )
  logits = np.zeros((9, 3))
  for i in range(9):
    for c in range(3):
      own = range(4 * c, 4 * c + 4)
      logits[i, c] = np.mean(
        [np.mean([max(patch @ word for word in token[p][valid[p]]) for patch in image[i]]) for p in own]
      )
  own = list(np.arange(12).reshape(3, 4))
  np.testing.assert_allclose(token_classifier(TextTokens(token, valid), own, similarity)(image), logits, atol=1e-12)
  label = np.argsort(-logits, axis=1)[np.arange(9), np.arange(9) % 2]  # every other one is wrong
  source = Source([(None, 0), *enumerate(label), (0, -1)], names)
  calls.clear()
  result = classify(source, found, templates=forms)
  assert (result["images"], result["top1"]) == (9, 5 / 9)
  assert calls == [4, 4, 4]  # a batch at a time, whose tokens are then forgotten


def test_a_source_that_cannot_be_classified_is_named():
  with pytest.raises(ValueError, match="pictures has no class names"):
    classify(Source([(0, 0)], ()), encoders(np.eye(2), []))
  source = Source([(0, -1), (None, 0)], ("cat", "dog"))
  with pytest.raises(ValueError, match="pictures: no readable image has a class label"):
    classify(source, encoders(np.eye(2), ["cat", "dog"], np.eye(2)), templates=("{}",))


def test_of_classes_with_the_same_prompts_the_first_is_answered():
  """ImageNet has two classes "missile"; products of equal columns may differ in the last digit."""
  rng = np.random.default_rng(0)
  rows, images = unit(rng.normal(size=(9, 300))), unit(rng.normal(size=(40, 300)))
  texts = [f"a {name}" for name in range(9)]
  owner = [*range(9), 4, 7, *range(6)]
  data = make_data(
    encode := encoders(rows.astype(np.float32), texts, images.astype(np.float32)),
    Texts(encode),
    Split(Source([(row, row % 15) for row in range(40)], [str(name) for name in owner]), encode),
    prompts=[[texts[name]] for name in owner],
  )
  scores = zero_shot(data, None)
  best = (images @ rows.T).argmax(axis=1)
  np.testing.assert_array_equal(scores.predictions["predicted"], best)
  assert scores.metrics["ties"] == np.isin(best, [*range(6), 7]).sum()


def test_prompts_of_the_data_set_come_before_templates():
  source = Source([(0, 0), (1, 1)], ("cat", "dog"))
  texts, rows = ["a cat", "a kitten", "a dog"], np.eye(3, dtype=np.float32)
  encode = encoders(rows, texts, rows[[1, 2]])
  data = make_data(encode, Texts(encode), Split(source, encode), prompts=[["a cat", "a kitten"], ["a dog"]])
  assert zero_shot(data, None).metrics["top1"] == 1

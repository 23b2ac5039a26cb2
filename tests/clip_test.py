"""Tests of `declip_jax.clip`: FILIP is compared by its tokens, in blocks, on one and on several devices."""

import copy
import functools
import inspect
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import references as reference
from tiny import tiny_config

from declip_jax import architectures
from declip_jax.clip import Clip
from declip_jax.data.images import EvalView
from declip_jax.data.sources import open_source
from declip_jax.evals import similarity as similarity_lib
from declip_jax.evals.encoders import encode_texts
from declip_jax.evals.features import Split
from declip_jax.evals.prompts import from_templates, token_classifier, unique_prompts
from declip_jax.evals.similarity import TextTokens, make_late_interaction
from declip_jax.objectives import make_objective
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.sharding import local_rows, make_mesh
from declip_jax.training.state import State
from declip_jax.weights.layout import abstract_variables
from declip_jax.weights.read import Weights, from_state_dict, read
from declip_jax.weights.write import write

TEXTS = ["a ring", "two small red stars beside a large blue ring", "", "a photo of a green square"]


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def late_interaction_by_loops(image, text):
  """Image to text and text to image as the paper defines them, without padding."""
  to_text, to_image = np.empty((len(image), len(text.valid))), np.empty((len(text.valid), len(image)))
  for i, patches in enumerate(image):
    for j, (tokens, valid) in enumerate(zip(*text, strict=True)):
      words = tokens[valid]
      to_text[i, j] = np.mean([max(patch @ word for word in words) for patch in patches])
      to_image[j, i] = np.mean([max(patch @ word for patch in patches) for word in words])
  return to_text, to_image


@pytest.fixture(scope="module")
def rows():
  """Tokens of 11 images and of 19 texts of 1 to 7 tokens; the padding is random too."""
  rng = np.random.default_rng(0)
  image, text = (unit(rng.normal(size=shape)).astype(np.float32) for shape in ((11, 5, 8), (19, 7, 8)))
  return image, TextTokens(text, np.arange(7) < rng.integers(1, 8, (19, 1)))


@pytest.mark.parametrize(("devices", "block"), [(1, 1024), (8, 1024), (8, 8), (1, 4)])
def test_late_interaction_equals_loops_on_any_mesh_and_in_any_blocks(rows, devices, block, monkeypatch):
  monkeypatch.setattr(similarity_lib, "_BLOCK", block)
  similarity = make_late_interaction(make_mesh(-1, 1, jax.devices()[:devices]))
  image, text = rows
  to_text, to_image = late_interaction_by_loops(image, text)
  np.testing.assert_allclose(similarity(image, text), to_text, atol=1e-6)
  np.testing.assert_allclose(similarity(text, image), to_image, atol=1e-6)
  assert np.abs(to_text - to_image.T).max() > 0.1


def test_late_interaction_equals_the_fixture():
  golden = reference.load("losses")
  image, text = (unit(golden[f"filip_topk/{name}_tokens"]) for name in ("image", "text"))
  rows = image, TextTokens(text, golden["filip_topk/text_valid"])
  similarity, scale = make_late_interaction(make_mesh(-1, 1)), np.exp(golden["filip_log_scale"])
  np.testing.assert_allclose(scale * similarity(*rows), golden["filip_clean/logits_i2t"], atol=1e-5)
  np.testing.assert_allclose(scale * similarity(*rows[::-1]), golden["filip_clean/logits_t2i"], atol=1e-5)


@functools.cache
def make_weights(method):
  """Random weights of a method, for texts of up to 32 tokens; newly initialised towers would embed everything alike."""
  c = tiny_config(method)
  c.model.heads.dense_dim, c.model.text.context_length = 8, 32
  objective, model, rng = make_objective(c.objective.to_dict()), c.model.to_dict(), np.random.default_rng(0)
  _, shapes = abstract_variables(model, objective.heads, 16)

  def draw(path, leaf):
    mean = {"scale": 1.0, "var": 1.0, "logit_scale": 2.5, "dense_logit_scale": 2.5}.get(path[-1].key, 0.0)
    noise = 0.0 if path[-1].key == "var" else 0.3 * rng.normal(size=leaf.shape)
    return np.asarray(mean + noise + np.zeros(leaf.shape), leaf.dtype)

  drawn = jax.tree.map_with_path(draw, shapes)
  tokens = objective.compares_tokens
  return Weights("nowhere", model, objective.heads, **drawn, view=EvalView(16), tokens=tokens)


@pytest.fixture(scope="module")
def filip():
  """FILIP with random weights on all devices."""
  return Clip(make_weights("filip"), make_mesh(-1, 1))


@pytest.fixture(scope="module")
def tokens_of(filip):
  """A function of up to 16 images and 64 texts to their tokens, by the model alone."""
  encode_image, encode_text = jax.jit(filip.model.encode_image_tokens), jax.jit(filip.model.encode_text_tokens)

  def tokens(images, texts):
    rows = np.pad(images, [(0, 16 - len(images))] + [(0, 0)] * 3)
    image = encode_image(filip.params, filip.collections, rows)
    text = encode_text(filip.params, filip.collections, np.resize(filip.tokenizer(texts), (64, 32)))
    return np.asarray(image)[: len(images)], TextTokens(*(np.asarray(x)[: len(texts)] for x in text))

  return tokens


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


def test_the_limit_of_pixels_can_be_set(filip, images, monkeypatch):
  monkeypatch.setattr(filip, "max_pixels", 16 * 16 - 1)
  monkeypatch.setattr(filip, "_warned", True)  # about pooled embeddings
  assert filip.encoders(16).reading.max_pixels == 255
  with pytest.raises(ValueError, match="16 x 16 pixels are more than 255"):
    filip.encode_image(PIL.Image.fromarray(images[0]))


def test_filip_similarity_is_late_interaction(filip, tokens_of, images):
  expected, _ = late_interaction_by_loops(*tokens_of(images, TEXTS))
  with warnings.catch_warnings(action="error"):
    found = filip.similarity(images, TEXTS, batch_size=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(filip.similarity(images[0], TEXTS[1]), expected[:1, 1:2], atol=1e-5)
    assert filip.similarity([], TEXTS).shape == (0, 4)
    assert filip.similarity(images, []).shape == (3, 0)
  assert filip.logit_scale == pytest.approx(np.exp(filip.params["heads"]["dense_logit_scale"]))


def test_filips_pooled_embeddings_warn_once(filip, images, monkeypatch):
  warn, callers = warnings.warn, []

  def record(message, *args, stacklevel=1, **kwargs):
    frames = [frame.filename for frame in inspect.stack(0)]
    ours = [name for name in frames if "jaxtyping" not in name and "beartype" not in name]  # not those of the contracts
    callers.append(ours[stacklevel])
    warn(message, *args, stacklevel=stacklevel, **kwargs)

  clip = copy.copy(filip)  # with the functions compiled for that one
  clip._warned = False
  monkeypatch.setattr(warnings, "warn", record)
  with pytest.warns(UserWarning, match=r"nowhere\).* tokens.*similarity"):
    rows = clip.encode_image(images)
  assert callers == [__file__]
  assert rows.shape == (3, 16)
  with warnings.catch_warnings(action="error"):
    assert clip.encode_text(TEXTS).shape == (4, 16)


def test_clip_similarity_is_the_product_of_embeddings(images):
  clip = Clip(make_weights("clip"), make_mesh(-1, 1))
  with warnings.catch_warnings(action="error"):
    expected = clip.encode_image(images) @ clip.encode_text(TEXTS).T
    np.testing.assert_array_equal(clip.similarity(images, TEXTS), expected)
  assert not clip.tokens
  assert clip.logit_scale == pytest.approx(np.exp(clip.params["heads"]["logit_scale"]))


def test_a_model_without_a_text_tower_rejects_texts(images):
  clip = Clip(make_weights("simclr"), make_mesh(-1, 1))
  calls = (
    lambda: clip.encode_image(images),
    lambda: clip.encode_text(TEXTS),
    lambda: clip.similarity(images, TEXTS),
    lambda: clip.encoders(8),
    lambda: clip.logit_scale,
  )
  for call in calls:
    with pytest.raises(ValueError, match=r"nowhere\) have no (image|text) tower"):
      call()
  assert clip.encoders(8, needs_text=False).view == clip.view


@pytest.mark.parametrize(
  ("texts", "message"),
  [
    (["a", None], r"texts\[1\] is of type NoneType, None: expected a string"),
    ([float("nan")], r"texts\[0\] is of type float, nan"),
    ([b"a"], r"texts\[0\] is of type bytes, b'a'"),
    ([["a", "b"]], r"texts\[0\] is of type list"),
    (b"a dog", "texts is of type bytes: expected a string, or a sequence"),
  ],
)
def test_texts_that_are_not_strings_are_named(filip, texts, message):
  for call in (filip.encode_text, lambda texts: filip.similarity([], texts)):
    with pytest.raises(ValueError, match=message), warnings.catch_warnings(action="ignore"):
      call(texts)


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    ([[49406, 99999, 49407]], "tokens have the id 99999: expected 0 to 49407"),
    ([[-1]], "tokens have the id -1: expected 0 to 49407"),
    ([[0] * 33], r"tokens of shape \(1, 33\): expected \[n t\] with t from 1 to 32"),
    (np.zeros((1, 0), int), r"tokens of shape \(1, 0\): expected"),
  ],
)
def test_ids_that_the_model_does_not_have_are_named(filip, tokens, message):
  assert filip.model.towers.text.vocab_size == 49408
  with pytest.raises(ValueError, match=message):
    filip.text_features(np.array(tokens))


@pytest.mark.parametrize("fields", [{"pooling": "last"}, {"causal": False}])
def test_short_rows_are_rejected_by_a_tower_that_sees_padding(fields):
  weights = make_weights("clip")
  clip = Clip(weights._replace(model=weights.model | {"text": weights.model["text"] | fields}), make_mesh(-1, 1))
  with pytest.raises(ValueError, match=r"tokens of shape \(2, 31\): expected \[n t\] with t 32, as .* sees padding"):
    clip.text_features(np.zeros((2, 31), int))
  assert len(clip.text_features(np.zeros((0, 32), int))) == 0


@pytest.mark.parametrize("shape", [(1, 20, 20, 3), (2, 8, 16, 3)])
def test_normalised_images_of_another_size_are_named(filip, shape):
  expected = r"images of shape \({}, {}, {}, {}\): expected \[n 16 16 3\]".format(*shape)
  with pytest.raises(ValueError, match=expected):
    filip.image_features(np.zeros(shape, np.float32))


def test_one_pass_gives_the_pooled_feature_and_its_projection(filip):
  """On all devices and on one; neither is of unit length."""
  one = Clip(make_weights("filip"), make_mesh(-1, 1, jax.devices()[:1]))
  pictures = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
  pooled, joint = map(local_rows, filip.encoders(16).image(pictures))
  for found, expected in zip(one.encoders(16).image(pictures), (pooled, joint), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5)
  with warnings.catch_warnings(action="ignore"):  # they mean little for FILIP
    np.testing.assert_allclose(unit(joint), filip.encode_image(pictures, 16), atol=1e-5)
  assert (pooled.shape, joint.shape) == ((16, 32), (16, 16))
  kernel = np.asarray(filip.params["heads"]["image_projection"]["kernel"], np.float64)
  np.testing.assert_allclose(joint, pooled @ kernel, atol=1e-5)
  assert np.abs(np.linalg.norm(joint, axis=1) - 1).min() > 0.1


@pytest.mark.parametrize("method", ["clip", pytest.param("simclr", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  "image",
  [pytest.param(architectures.resnet(4, (1, 1, 1, 1)), marks=pytest.mark.slow), architectures.vit(8, 32, 1, 2)],
)
def test_towers_without_a_joint_space_have_pooled_features(method, image):
  c = tiny_config(method)
  c.model.image, c.model.dtype = image, "bfloat16"
  heads = make_objective(c.objective.to_dict()).heads
  model, shapes = abstract_variables(c.model.to_dict(), heads, 32)
  pixels = jax.ShapeDtypeStruct((2, 32, 32, 3), np.uint8)
  pooled, joint = jax.eval_shape(model.encode_image_features, *shapes.values(), pixels)
  assert (pooled.shape, pooled.dtype) == ((2, model.towers.image.feature_width), np.float32)
  assert joint is None if method == "simclr" else (joint.shape, joint.dtype) == ((2, 16), np.float32)


@pytest.mark.slow
def test_filip_evaluators_compare_tokens_for_any_batch_and_devices(filip, tokens_of):
  source = open_source("scenes:heldout/12/24")
  templates = ("a {}.", "a photo of one {}.")
  one = Clip(make_weights("filip"), make_mesh(-1, 1, jax.devices()[:1]))
  texts, rows = unique_prompts(from_templates(source.classnames, templates))

  def classify(encoders):
    return token_classifier(encode_texts(texts, encoders), rows, encoders.similarity)

  found = []
  for encoders in (filip.encoders(16), one.encoders(5)):
    logits = Split(source, encoders).map_images(classify(encoders))
    found.append((logits, Split(source, encoders).images, encode_texts(TEXTS, encoders)))
  for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  logits, image, text = found[0]
  views = np.stack([filip.preprocess(source[index]["image"]) for index in range(12)])
  expected_image, expected_prompt = tokens_of(views, texts)
  np.testing.assert_allclose(image, expected_image, atol=1e-5)
  expected = late_interaction_by_loops(expected_image, expected_prompt)[0].reshape(12, -1, 2).mean(axis=2)
  np.testing.assert_allclose(logits, expected, atol=1e-5)
  assert np.ptp(expected, axis=1).min() > 0.01
  # Only the padding that all texts share is trimmed.
  _, expected_text = tokens_of(views, TEXTS)
  assert (text.token.shape, expected_text.token.shape) == ((4, 16, 8), (4, 32, 8))
  assert expected_text.valid.sum(axis=1).tolist() == [4, 11, 2, 8]
  np.testing.assert_array_equal(text.valid, expected_text.valid[:, :16])
  np.testing.assert_allclose(text.token[text.valid], expected_text.token[expected_text.valid], atol=1e-5)


def test_an_export_records_whether_tokens_are_compared(tmp_path):
  for name, tokens in (("filip", True), ("other", False)):
    write(make_weights("filip")._replace(tokens=tokens), tmp_path / name, "orbax")
    assert read(tmp_path / name).tokens is tokens
  file = tmp_path / "filip" / "weights.json"
  about = json.loads(file.read_text())
  file.write_text(json.dumps({name: value for name, value in about.items() if name != "tokens"}))
  assert read(tmp_path / "filip").tokens is False  # written before FILIP existed


@pytest.mark.parametrize(
  ("weights", "tokens"),
  [
    ({"filip": 1.0}, True),
    pytest.param({"filip": 1.0, "clip": 0.1}, False, marks=pytest.mark.slow),
    pytest.param({"clip": 1.0}, False, marks=pytest.mark.slow),
  ],
)
def test_whether_tokens_are_compared_follows_from_the_weights_of_a_run(weights, tokens, tmp_path):
  c = tiny_config("clip")
  c.objective.clip.weight = 0.0
  for term, weight in weights.items():
    c.objective[term].weight = weight
  _, variables = abstract_variables(c.model.to_dict(), make_objective(c.objective.to_dict()).heads, c.data.image_size)
  arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)
  zero = jnp.zeros((), jnp.int32)
  state = State(zero, arrays["params"], {}, arrays["collections"], {"total": zero, "in_a_row": zero})
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state, data={}, config=c.to_dict())
  checkpoints.close()
  assert read(tmp_path).tokens is tokens


@pytest.mark.parametrize(
  ("left_out", "tokens"),
  [
    pytest.param((), False, marks=pytest.mark.slow),  # DeFILIP
    (("projector", "predictor"), True),  # FILIP
    pytest.param(("image_mapping", "text_mapping", "logit_scale_dense"), False, marks=pytest.mark.slow),  # DeCLIP
  ],
)
def test_released_filip_is_recognised(left_out, tokens):
  tensors = reference.below(reference.load("declip"), "sd/")
  tensors = {name: x for name, x in tensors.items() if not any(part in name for part in left_out)}
  assert from_state_dict(tensors, {"image.heads": 2, "text.heads": 3}).tokens is tokens


def test_a_model_says_what_it_is(filip: Clip) -> None:
  text = repr(filip)
  size = sum(leaf.size for leaf in jax.tree.leaves(filip.params))
  assert text.startswith(f"Clip({filip.origin}: ")
  assert f"{size:,} parameters, {filip.dtype})" in text
  assert f"images of {filip.view.size} x {filip.view.size}" in text

"""Tests of `declip_jax.objectives.filip` against loops, DeCLIP's code and an independent float64 computation."""

from functools import partial
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
import references as reference

from declip_jax.objectives.filip import filip, late_interaction, selected_interaction
from declip_jax.types import Outputs
from declip_jax.unit_norm import unit_norm

MODULE = sys.modules[filip.__module__]  # the package has a function of this name


@pytest.fixture(scope="module")
def golden():
  return reference.load("losses")


def step(top_k):
  """Value, metrics, and gradients for unit-norm tokens and the logarithm of the scale."""

  def loss(image, text, log_scale, valid):
    outputs = Outputs(
      image_tokens=unit_norm(image), text_tokens=unit_norm(text), text_valid=valid, dense_scale=jnp.exp(log_scale)
    )
    return filip(outputs, {}, top_k=top_k)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def random_tokens(seed, images=5, texts=5, n=3, t=4, e=6):
  """Unit tokens, and captions of all lengths from 1 to `t`."""
  rng = np.random.default_rng(seed)
  image, text = (rng.normal(size=(count, length, e)) for count, length in ((images, n), (texts, t)))
  valid = np.arange(t) < 1 + np.arange(texts)[:, None] % t
  return *((x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32) for x in (image, text)), valid


def loops_of_the_paper(image, text, valid):
  """Both directions, pair by pair and token by token; padding does not exist."""
  texts = [
    [token for token, here in zip(tokens, kept, strict=True) if here] for tokens, kept in zip(text, valid, strict=True)
  ]
  image_to_text = [[np.mean([max(x @ y for y in words) for x in patches]) for words in texts] for patches in image]
  text_to_image = [[np.mean([max(x @ y for x in patches) for y in words]) for patches in image] for words in texts]
  return np.array(image_to_text), np.array(text_to_image)


def loops_of_the_release(image, text, k):
  """Both directions; of a candidate only the `k` tokens with the largest sums, padding like any other token."""

  def selected(tokens, partner):
    sums = [sum(x @ y for y in partner) for x in tokens]
    return tokens[np.argsort(sums)[::-1][:k]]

  texts = [selected(text[i], image[i]) for i in range(len(text))]
  images = [selected(image[i], text[i]) for i in range(len(image))]
  image_to_text = [[np.mean([max(x @ y for y in words) for x in patches]) for words in texts] for patches in image]
  text_to_image = [[np.mean([max(x @ y for x in patches) for y in words]) for patches in images] for words in text]
  return np.array(image_to_text), np.array(text_to_image)


def symmetric(image_to_text, text_to_image, label_smoothing):
  """Mean of the two cross-entropies, query by query."""
  losses = []
  for logits in (image_to_text, text_to_image):
    for i, row in enumerate(logits):
      target = np.full(len(row), label_smoothing / len(row))
      target[i] += 1 - label_smoothing
      losses.append(np.log(np.sum(np.exp(row))) - np.sum(target * row))
  return np.mean(losses)


@pytest.mark.parametrize("name", ["filip_topk", "filip_clean"])
def test_value_and_gradient_equal_declip_and_float64(golden, name):
  inputs = [golden[f"filip_topk/{key}"] for key in ("image_tokens", "text_tokens")]
  run = step(int(golden["filip_top_k"]) if name == "filip_topk" else 0)
  (value, metrics), gradients = run(*inputs, golden["filip_log_scale"], golden["filip_topk/text_valid"])
  np.testing.assert_allclose(value, golden[f"{name}/loss"], atol=7.5e-7)
  for field, gradient in zip(("image_tokens", "text_tokens", "log_scale"), gradients, strict=True):
    np.testing.assert_allclose(gradient, golden[f"{name}/grad_{field}"], atol=7.5e-7, err_msg=field)
  for short, long in (("i2t", "image_to_text"), ("t2i", "text_to_image")):
    hits = np.argmax(golden[f"{name}/logits_{short}"], axis=1) == np.arange(10)
    np.testing.assert_allclose(metrics[f"filip_{long}_accuracy"], hits.mean(), rtol=1e-6)


def test_selected_interaction_equals_declip(golden):
  tokens = (jax.jit(unit_norm)(golden[f"filip_topk/{key}"]) for key in ("image_tokens", "text_tokens"))
  pairs = jax.jit(partial(selected_interaction, top_k=int(golden["filip_top_k"])))(*tokens)
  for way, similarity in zip(("i2t", "t2i"), pairs, strict=True):
    logits = np.exp(golden["filip_log_scale"]) * similarity
    np.testing.assert_allclose(logits, golden[f"filip_topk/logits_{way}"], atol=2.5e-6)


def test_the_selected_tokens_are_declips(golden):
  tokens = {kind: unit_norm(jnp.asarray(golden[f"filip_topk/{kind}_tokens"])) for kind in ("image", "text")}
  for kind, other in (("image", "text"), ("text", "image")):
    found = MODULE._most_similar(tokens[kind], tokens[other], int(golden["filip_top_k"]))
    ids = np.argmax(np.einsum("bke,bne->bkn", found, tokens[kind]), axis=-1)
    np.testing.assert_array_equal(np.sort(ids), np.sort(golden[f"filip_topk/selected_{kind}_ids"]))


def test_late_interaction_equals_float64(golden):
  tokens = (jax.jit(unit_norm)(golden[f"filip_topk/{key}"]) for key in ("image_tokens", "text_tokens"))
  image_to_text, text_to_image = jax.jit(late_interaction)(*tokens, golden["filip_topk/text_valid"])
  scale = np.exp(golden["filip_log_scale"])
  np.testing.assert_allclose(scale * image_to_text, golden["filip_clean/logits_i2t"], atol=2.5e-6)
  np.testing.assert_allclose(scale * text_to_image, golden["filip_clean/logits_t2i"], atol=2.5e-6)


@pytest.mark.parametrize(("images", "texts"), [(5, 5), (3, 7), (6, 1)])
@pytest.mark.parametrize("block", [2**24, 100])
def test_late_interaction_of_any_number_of_images_and_texts_equals_loops(monkeypatch, images, texts, block):
  monkeypatch.setattr(MODULE, "BLOCK", block)
  image, text, valid = random_tokens(0, images, texts)
  run = jax.jit(lambda *tokens: late_interaction(*tokens))  # a new function, which no other test has traced
  image_to_text, text_to_image = run(image, text, valid)
  expected = loops_of_the_paper(image, text, valid)
  np.testing.assert_allclose(image_to_text, expected[0], atol=1e-6)
  np.testing.assert_allclose(text_to_image, expected[1], atol=1e-6)


@pytest.mark.parametrize(("count", "sizes"), [(5, {}), (2, {"n": 7, "t": 3, "e": 9}), (9, {"n": 4, "t": 11, "e": 3})])
def test_value_equals_loops(count, sizes):
  image, text, valid = random_tokens(1, count, count, **sizes)
  outputs = Outputs(image_tokens=image, text_tokens=text, text_valid=valid, dense_scale=jnp.float32(4.0))
  cases = [(0, 0.0), (0, 0.1), (1, 0.0), (2, 0.1), (3, 0.0)]  # one program for all
  losses = jax.jit(lambda x: [filip(x, {}, top_k=top_k, label_smoothing=amount)[0] for top_k, amount in cases])
  for (top_k, amount), loss in zip(cases, losses(outputs), strict=True):
    expected = loops_of_the_release(image, text, top_k) if top_k else loops_of_the_paper(image, text, valid)
    value = symmetric(4 * expected[0], 4 * expected[1], amount)
    np.testing.assert_allclose(loss, value, rtol=1e-5, err_msg=f"top_k={top_k}, label_smoothing={amount}")


def test_padding_has_no_effect_in_the_method_of_the_paper():
  image, text, valid = random_tokens(2)
  other = np.where(valid[..., None], text, random_tokens(3)[1])
  paper, release = step(0), step(2)
  (value, _), (_, gradient, _) = paper(image, text, np.float32(1), valid)
  assert paper(image, other, np.float32(1), valid)[0][0] == value
  assert release(image, other, np.float32(1), valid)[0][0] != release(image, text, np.float32(1), valid)[0][0]
  np.testing.assert_array_equal(gradient[~valid], 0)
  assert np.abs(gradient[valid]).max(axis=-1).min() > 0


@pytest.mark.parametrize(("top_k", "count", "block"), [(0, 24, 432), (2, 16, 8)])
def test_blocks_and_devices_change_neither_value_nor_gradient(monkeypatch, top_k, count, block):
  """All at once on one device; in blocks on one; and in blocks on eight. 24 are padded to two blocks of 16."""
  inputs = *random_tokens(4, count, count)[:2], np.float32(1.5), random_tokens(4, count, count)[2]
  whole = step(top_k)(*inputs)
  monkeypatch.setattr(MODULE, "BLOCK", block)
  blocks = step(top_k)
  assert "scan" in str(jax.make_jaxpr(blocks)(*inputs))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows = [NamedSharding(mesh, PartitionSpec("data") if np.ndim(x) else PartitionSpec()) for x in inputs]
  for placed in (inputs, jax.device_put(inputs, tuple(rows))):
    found = blocks(*placed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, whole)


def arrays_of(jaxpr):
  """The shapes of everything that a program computes, also within loops."""
  for equation in jaxpr.eqns:
    yield from (out.aval.shape for out in equation.outvars)
    for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        yield from arrays_of(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("block", [2**24, 2**11])
def test_no_array_of_the_gradient_is_larger_than_a_block(monkeypatch, block):
  monkeypatch.setattr(MODULE, "BLOCK", block)
  image, text, valid = map(jnp.asarray, random_tokens(5, 16, 16, n=8, t=8, e=2))

  def loss(image, text):
    return sum(x.sum() for x in late_interaction(image, text, valid))

  program = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(image, text)
  largest = max(np.prod(shape, dtype=int) for shape in arrays_of(program.jaxpr))
  assert largest == min(16 * 8 * 16 * 8, block)


@pytest.mark.parametrize("top_k", [-1, 4])
def test_numbers_of_tokens_that_do_not_exist_are_rejected(top_k):
  image, text, valid = random_tokens(6)
  outputs = Outputs(image_tokens=image, text_tokens=text, text_valid=valid, dense_scale=jnp.float32(4.0))
  with pytest.raises(
    ValueError, match=f"config.objective.filip.top_k={top_k}: images have 3 tokens and texts 4, so choose 1 to 3"
  ):
    filip(outputs, {}, top_k=top_k)


def test_the_first_of_equal_tokens_gets_the_gradient_as_in_pytorch():
  image, text = jnp.ones((1, 1, 2)), jnp.array([[[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]])  # all at the same similarity
  valid = jnp.ones((1, 3), bool)
  gradient = jax.jit(jax.grad(lambda text: late_interaction(image, text, valid)[0].sum()))(text)
  np.testing.assert_array_equal(gradient, [[[1, 1], [0, 0], [0, 0]]])
  gradient = jax.jit(jax.grad(lambda text: late_interaction(image, text, valid.at[0, 0].set(False))[0].sum()))(text)
  np.testing.assert_array_equal(gradient, [[[0, 0], [1, 1], [0, 0]]])

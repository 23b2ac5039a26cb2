"""SigLIP by transformers, open_clip and big_vision: features, logits, loss, gradients and every tensor.

`fixtures/make_siglip.py` made the numbers. Images have 36 pixels and patches 8, so that 4 pixels are not seen.
"""

from flax.traverse_util import flatten_dict
import jax
import numpy as np
import pytest
import references as reference

from declip_jax.models.model import make_model
from declip_jax.views import Views
from declip_jax.weights import dialects
from declip_jax.weights.layout import layout, to_state_dict
from declip_jax.weights.read import from_state_dict

NAMES = {
  "transformers": "SigLIP in transformers",
  "open_clip": "SigLIP in open_clip",
  "big_vision": "SigLIP in big_vision",
}
HEADS = {"image.heads": 2, "text.heads": 2}
FORWARD = {"rtol": 2e-5, "atol": 5e-6}


def read_golden(name, **settings):
  arrays = reference.load(f"siglip_{name}")
  tensors = {key.removeprefix("params/"): x for key, x in reference.below(arrays, "sd/").items()}
  weights = from_state_dict(tensors, (HEADS if name != "big_vision" else {}) | {"image_size": 36} | settings)
  fields = {**weights.model, "mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}
  return arrays, tensors, weights, make_model(fields, views=Views(), heads=weights.heads)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", NAMES)
def test_features_and_logits(name):
  arrays, tensors, weights, model = read_golden(name)
  assert (weights.origin, weights.heads, weights.view.size, weights.view.squash) == (
    NAMES[name],
    ("joint", "sigmoid"),
    36,
    True,
  )
  image = jax.jit(model.image_features)(weights.params, weights.collections, np.moveaxis(arrays["images"], 1, -1))
  text = jax.jit(model.text_features)(weights.params, weights.collections, arrays["tokens"])
  if name == "big_vision":
    np.testing.assert_allclose(unit(image), arrays["image"], **FORWARD)
    np.testing.assert_allclose(unit(text), arrays["text"], **FORWARD)
  else:
    np.testing.assert_allclose(image, arrays["image_features"], **FORWARD)
    np.testing.assert_allclose(text, arrays["text_features"], **FORWARD)
  heads = weights.params["heads"]
  logits = np.exp(heads["logit_scale"]) * unit(image) @ unit(text).T + heads["logit_bias"]
  count = arrays["logits_per_image"].shape[1]
  np.testing.assert_allclose(logits[:, :count], arrays["logits_per_image"], rtol=2e-5, atol=2e-5)


def theirs(variables, weights, name):
  """Some of our arrays under the project's names and in its layout."""
  present = flatten_dict(variables, sep="/").keys()
  entries = {path: entry for path, entry in layout(weights.model, weights.heads).items() if path in present}
  return dialects.from_openai(to_state_dict(variables, entries), NAMES[name])


@pytest.mark.parametrize("name", ["transformers", "open_clip"])
def test_every_tensor_comes_back(name):
  _, tensors, weights, _ = read_golden(name)
  again = theirs({"params": weights.params}, weights, name)
  assert again.keys() == tensors.keys()
  for key, tensor in tensors.items():
    np.testing.assert_array_equal(again[key], tensor, err_msg=key)


def test_the_loss_and_all_gradients_are_those_of_transformers():
  arrays, tensors, weights, model = read_golden("transformers")
  batch = {"image": reference.pixels(arrays["images"]), "text": arrays["tokens"][:3, None]}
  loss, gradient, *_ = reference.differentiate(model, weights.params, weights.collections, batch, sigmoid=1.0)
  np.testing.assert_allclose(loss, arrays["loss"], rtol=1e-5)
  ours, expected = theirs({"params": gradient}, weights, "transformers"), reference.below(arrays, "grad/")
  assert ours.keys() == expected.keys() == tensors.keys()
  for key, value in expected.items():
    np.testing.assert_allclose(ours[key], value, rtol=3e-4, atol=2e-5, err_msg=key)


def test_stacked_blocks_and_half_precision_of_big_vision():
  """Towers that were trained with `scan` have one array for all blocks, and bfloat16 arrays are bytes for NumPy."""
  _, tensors, weights, _ = read_golden("big_vision")
  stacked = dict(tensors)
  for key in tensors:
    if "/encoderblock_0/" in key:
      other = key.replace("/encoderblock_0/", "/encoderblock_1/")
      stacked[key.replace("/encoderblock_0/", "/encoderblock/")] = np.stack([stacked.pop(key), stacked.pop(other)])
  again = from_state_dict(stacked)
  jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)

"""Tests of `declip_jax.models.vit` against OpenAI's tower, and of what rematerialisation may change: nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_weights as reference

from declip_jax.models.vit import ViT

TINY = {"patch": 4, "width": 16, "depth": 3, "heads": 2}


@pytest.fixture(scope="module")
def openai():
  """OpenAI's vision transformer in a model whose text features are given, and the numbers to compare with."""
  golden = reference.load("openai_vit")
  sd = reference.below(golden, "sd/visual.")
  model = reference.make_model(
    ViT(patch=8, width=64, depth=2, heads=1),
    reference.GivenTexts(),
    image_width=64,
    text_width=48,
    embed_dim=48,
  )
  params = {
    "towers": {"image": reference.openai_vit(sd)},
    "heads": {
      "image_projection": {"kernel": sd["proj"]},
      "text_projection": {"kernel": np.eye(48, dtype=np.float32)},
      "logit_scale": golden["sd/logit_scale"],
    },
  }
  batch = {"image": reference.pixels(golden["images"]), "text": golden["text_features"][:, None]}
  with jax.default_matmul_precision("highest"):
    result = reference.differentiate(model, params, {"towers": {}, "heads": {}}, batch, clip=1.0)
  return golden, sd, result


def test_features_equal_openai(openai):
  golden, sd, (_, _, features, outputs, _) = openai
  np.testing.assert_allclose(features.image[:, 0] @ sd["proj"], golden["image_features"], rtol=1e-4, atol=2e-5)
  logits = outputs.scale * outputs.image[0] @ outputs.text[0].T
  np.testing.assert_allclose(logits, golden["logits_per_image"], rtol=1e-4, atol=2e-4)


def test_loss_and_gradient_equal_openai(openai):
  golden, _, (loss, gradient, *_) = openai
  np.testing.assert_allclose(loss, golden["loss"], atol=1e-5)
  tower, heads = gradient["towers"]["image"], gradient["heads"]
  ours = {
    "visual.proj": heads["image_projection"]["kernel"],
    "visual.class_embedding": tower["class_embedding"],
    "visual.ln_post.weight": tower["post_norm"]["scale"],
    "visual.transformer.resblocks.0.attn.in_proj_bias": tower["transformer"]["blocks"]["qkv"]["bias"][0],
    "logit_scale": heads["logit_scale"],
  }
  assert set(ours) == set(reference.below(golden, "grad/"))
  for name, value in ours.items():
    np.testing.assert_allclose(value, golden[f"grad/{name}"], rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def tiny():
  """Parameters and images of a three-layer tower."""
  images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
  return jax.jit(ViT(**TINY).init)(jax.random.key(0), images), images


def test_remat_changes_neither_value_nor_gradient(tiny):
  variables, images = tiny

  def compiled(remat):
    vit = ViT(**TINY, remat=remat)
    return jax.jit(jax.value_and_grad(lambda v: jnp.sum(jnp.sin(vit.apply(v, images))))).lower(variables).compile()

  steps = {remat: compiled(remat) for remat in ("none", "dots", "full")}
  value, gradient = steps["none"](variables)
  for remat in ("dots", "full"):
    again, gradient_again = steps[remat](variables)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), gradient_again, gradient)
  # They are three different programs: the more is recomputed, the more is computed.
  work = [steps[remat].cost_analysis()["flops"] for remat in ("none", "dots", "full")]
  memory = [steps[remat].memory_analysis().temp_size_in_bytes for remat in ("none", "dots", "full")]
  print(work, memory)


def test_options_add_and_remove_parameters(tiny):
  images = tiny[1]
  shapes = jax.eval_shape(ViT(**TINY, pre_norm=False, patch_bias=True).init, jax.random.key(0), images)["params"]
  assert set(tiny[0]["params"]) - set(shapes) == {"pre_norm"}
  assert set(shapes["patch_embedding"]) - set(tiny[0]["params"]["patch_embedding"]) == {"bias"}


@pytest.mark.parametrize("initializer", ["torch", "openai_text", "timm"])
def test_initial_deviations(initializer):
  width, depth = 64, 4
  vit = ViT(patch=4, width=width, depth=depth, heads=2, initializer=initializer)
  params = jax.jit(vit.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  residual = width**-0.5 * (2 * depth) ** -0.5
  uniform = 3**-0.5  # deviation of U(-1, 1)
  expected = {  # of: qkv, out, fc1, fc2, positions
    "torch": (uniform * (6 / (4 * width)) ** 0.5, uniform / 8, uniform / 8, uniform / 16, width**-0.5),
    "openai_text": (width**-0.5, residual, (2 * width) ** -0.5, residual, 0.01),
    "timm": (0.02, 0.02, 0.02, 0.02, 0.02),
  }[initializer]
  blocks = params["transformer"]["blocks"]
  found = [np.std(blocks[name]["kernel"]) for name in ("qkv", "out", "fc1", "fc2")]
  np.testing.assert_allclose([*found, np.std(params["position_embedding"])], expected, rtol=0.06)
  # The layers are drawn separately, not copies of one.
  assert not np.allclose(blocks["qkv"]["kernel"][0], blocks["qkv"]["kernel"][1])

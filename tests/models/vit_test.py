"""Tests of `declip_jax.models.vit`: rematerialisation changes nothing; options; initialisation."""

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from declip_jax.models.transformer import INITS, REMAT_POLICIES, Transformer
from declip_jax.models.vit import ViT

TINY = {"patch": 4, "width": 64, "depth": 3, "heads": 2, "initializer": "openai_text"}


@pytest.fixture(scope="module")
def tiny():
  """Parameters and images of a three-layer tower."""
  images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
  return jax.jit(ViT(**TINY).init)(jax.random.key(0), images), images


@pytest.mark.slow
def test_remat_preserves_value_and_gradient(tiny):
  variables, images = tiny

  def compiled(remat):
    vit = ViT(**TINY, remat=remat)
    return jax.jit(jax.value_and_grad(lambda v: jnp.sum(jnp.sin(vit.apply(v, images)[0])))).lower(variables).compile()

  steps = {remat: compiled(remat) for remat in REMAT_POLICIES}
  value, gradient = steps["none"](variables)
  for remat in ("dots", "narrow_dots", "full"):
    again, gradient_again = steps[remat](variables)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), gradient_again, gradient)
  # They are four programs: activations that are not stored are recomputed.
  operations = [step.cost_analysis()["flops"] for step in steps.values()]
  memory = [step.memory_analysis().temp_size_in_bytes for step in steps.values()]
  assert operations == sorted(set(operations))
  assert memory == sorted(set(memory), reverse=True)


def test_tokens_exclude_the_class_token(tiny):
  variables, images = tiny
  feature, tokens = jax.jit(ViT(**TINY).apply)(variables, images)
  assert tokens.shape == (2, 16, 64)
  centred = tokens - tokens.mean(axis=-1, keepdims=True)
  normed = centred / jnp.sqrt(tokens.var(axis=-1, keepdims=True) + 1e-5)  # as the class token was
  assert (jnp.abs(normed - feature[:, None]).max(axis=-1) > 0.1).all()


def test_options_add_and_remove_parameters(tiny):
  images = tiny[1]
  shapes = jax.eval_shape(ViT(**TINY, pre_norm=False, patch_bias=True).init, jax.random.key(0), images)["params"]
  assert set(tiny[0]["params"]) - set(shapes) == {"pre_norm"}
  assert set(shapes["patch_embedding"]) - set(tiny[0]["params"]["patch_embedding"]) == {"bias"}


def assert_deviations(kernels, expected):
  found = {name: np.std(kernels[name]) for name in expected}
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=0.06, err_msg=name)


WIDTH, DEPTH = TINY["width"], TINY["depth"]
UNIFORM = 3**-0.5  # deviation of U(-1, 1)
RESIDUAL = WIDTH**-0.5 * (2 * DEPTH) ** -0.5
DEVIATIONS = {
  "torch": {
    "qkv": UNIFORM * (6 / (4 * WIDTH)) ** 0.5,
    "out": UNIFORM * WIDTH**-0.5,
    "fc1": UNIFORM * WIDTH**-0.5,
    "fc2": UNIFORM * (4 * WIDTH) ** -0.5,
  },
  "openai_text": {"qkv": WIDTH**-0.5, "out": RESIDUAL, "fc1": (2 * WIDTH) ** -0.5, "fc2": RESIDUAL},
  "timm": dict.fromkeys(("qkv", "out", "fc1", "fc2"), 0.02),
}


@pytest.mark.parametrize("initializer", sorted(DEVIATIONS))
def test_initial_deviations(initializer):
  shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "fc1": (WIDTH, 4 * WIDTH), "fc2": (4 * WIDTH, WIDTH)}
  draw = INITS[initializer](WIDTH, DEPTH, 4 * WIDTH)
  kernels = {name: draw[name](jax.random.key(0), shape) for name, shape in shapes.items()}
  assert_deviations(kernels, DEVIATIONS[initializer])


def test_each_layer_has_its_own_initializer_and_key(tiny):
  params = tiny[0]["params"]
  blocks = params["transformer"]["blocks"]
  kernels = {name: blocks[name]["kernel"] for name in ("qkv", "out", "fc1", "fc2")}
  assert_deviations(kernels, DEVIATIONS["openai_text"])
  assert_deviations(params, {"position_embedding": 0.01})
  for kernel in kernels.values():
    assert not np.allclose(kernel[0], kernel[1])


def test_the_output_depends_on_hidden_positions_but_not_on_hidden_pixels():
  vit = ViT(patch=4, width=16, depth=1, heads=2)
  images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  hidden = jnp.array([[True, False, False, False], [False, False, False, True]])
  variables = vit.init(jax.random.key(0), images, False, hidden)
  encode = jax.jit(lambda images, hidden: vit.apply(variables, images, False, hidden))
  changed = images.at[0, :4, :4].add(1)  # under the first patch of the first image
  feature, tokens = encode(images, hidden)
  again = encode(changed, hidden)
  np.testing.assert_array_equal(feature, again[0])
  np.testing.assert_array_equal(tokens, again[1])
  assert np.abs(feature[0] - encode(images, np.roll(hidden, 1, axis=1))[0][0]).max() > 1e-4
  seen, _ = encode(images, np.zeros_like(hidden))
  np.testing.assert_allclose(seen, vit.apply(variables, images)[0], atol=1e-6)


def test_branch_scales_multiply_the_residual_branches(tiny):
  """A factor of 1 changes nothing; with 0 everywhere only the tokens before the blocks remain."""
  variables, images = tiny
  vit = ViT(**TINY, remat="dots")
  encode = jax.jit(lambda scale: vit.apply(variables, images, True, None, scale))
  ones = jnp.ones((2, DEPTH, 2))
  feature, tokens = jax.jit(vit.apply)(variables, images)
  np.testing.assert_allclose(encode(ones)[0], feature, atol=1e-5)
  np.testing.assert_allclose(encode(ones)[1], tokens, atol=1e-5)
  dropped = encode(ones.at[0].set(0))
  np.testing.assert_allclose(dropped[0][1], feature[1], atol=1e-5)  # the other image
  before = jax.jit(vit.apply)({"params": {**variables["params"], "transformer": zero_branches(variables)}}, images)
  np.testing.assert_allclose(dropped[1][0], before[1][0], atol=1e-6)
  # Attention and MLP of each block have their own factor.
  changed = [encode(ones.at[0, block, branch].set(0))[1][0] for block in range(DEPTH) for branch in range(2)]
  assert all(np.abs(a - b).max() > 1e-3 for index, a in enumerate(changed) for b in (*changed[:index], tokens[0]))


def test_only_kept_patches_enter_the_transformer(tiny):
  """The class token and these patches, with the embeddings of their own positions, and nothing else."""
  variables, images = tiny
  params, kept = variables["params"], jnp.array([[3, 0, 14], [15, 7, 8]])

  def norm(name, x):
    return nn.LayerNorm(epsilon=1e-5).apply({"params": params[name]}, x)

  @jax.jit
  def by_hand(kept):
    patches = rearrange(images, "b (y p) (x q) c -> b (y x) (p q c)", p=4, q=4)
    embedded = jnp.stack([patches[example, kept[example]] for example in range(2)])
    embedded = embedded @ params["patch_embedding"]["kernel"] + params["position_embedding"][kept + 1]
    first = params["class_embedding"] + params["position_embedding"][0]
    x = jnp.concatenate([jnp.tile(first[None, None], (2, 1, 1)), embedded], axis=1)
    transformer = Transformer(width=WIDTH, heads=2, depth=DEPTH)
    x = transformer.apply({"params": params["transformer"]}, norm("pre_norm", x))
    return norm("post_norm", x[:, 0]), x[:, 1:]

  found = jax.jit(lambda kept: ViT(**TINY).apply(variables, images, True, kept=kept))(kept)
  for ours, expected in zip(found, by_hand(kept), strict=True):
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def zero_branches(variables):
  """The blocks with output layers of zeros, so that branches add nothing."""
  blocks = variables["params"]["transformer"]["blocks"]
  zeros = {name: jax.tree.map(jnp.zeros_like, blocks[name]) for name in ("out", "fc2")}
  return {"blocks": {**blocks, **zeros}}

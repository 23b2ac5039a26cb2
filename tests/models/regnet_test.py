"""Tests of `declip_jax.models.regnet` against timm's RegNet; `fixtures/make_regnet.py` made the numbers."""

import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as reference

from declip_jax.models.regnet import RegNetY, stages

# Generator parameters (w_0, w_a, w_m, depth, group width), then width and blocks of each stage, then parameters of the
# trunk: timm 1.0.31, `timm.models.regnet.model_cfgs` and `timm.create_model(name, num_classes=0)` of regnety_004, _080,
# _160, _320 and _640. With a classifier of 1,000 classes they are the 4.3, 39.2, 83.6 and 145.0 M of pycls's model zoo.
PUBLISHED = {
  "400MF": ((48, 27.89, 2.09, 16, 8), ((48, 1), (104, 3), (208, 6), (440, 6)), 3_903_144),
  "8GF": ((192, 76.82, 2.19, 17, 56), ((168, 2), (448, 4), (896, 10), (2016, 1)), 37_163_068),
  "16GF": ((200, 106.23, 2.48, 18, 112), ((224, 2), (448, 4), (1232, 11), (3024, 1)), 80_565_140),
  "32GF": ((232, 115.89, 2.53, 20, 232), ((232, 2), (696, 5), (1392, 12), (3712, 1)), 141_333_770),
  "64GF": ((352, 147.48, 2.4, 20, 328), ((328, 2), (984, 5), (1968, 12), (4920, 1)), 276_457_786),
}
TINY = {"initial_width": 8, "slope": 6.0, "multiplier": 1.8, "depth": 7, "group_width": 12, "stem_width": 16}

LAYERS = {
  "conv1.conv": "conv1",
  "conv1.bn": "norm1",
  "conv2.conv": "conv2",
  "conv2.bn": "norm2",
  "se.fc1": "squeeze",
  "se.fc2": "excite",
  "conv3.conv": "conv3",
  "conv3.bn": "norm3",
  "downsample.conv": "shortcut_conv",
  "downsample.bn": "shortcut_norm",
}
LEAVES = {
  "running_mean": ("batch_stats", "mean"),
  "running_var": ("batch_stats", "var"),
  "bias": ("params", "bias"),
  "weight": ("params", "kernel"),
}


def ours(name, value):
  """The path of our variable for one of timm's, its block in the stack, and its value in our layout."""
  path, leaf = name.rsplit(".", 1)
  collection, leaf = LEAVES[leaf]
  if leaf == "kernel" and value.ndim == 1:
    leaf = "scale"
  if value.ndim == 4:
    value = value.transpose(2, 3, 1, 0)
  if ".se." in name and leaf == "kernel":
    value = value[0, 0]
  if path.startswith("stem."):
    return (collection, {"stem.conv": "stem_conv", "stem.bn": "stem_norm"}[path], leaf), None, value
  stage, block, layer = re.fullmatch(r"s(\d)\.b(\d)\.(.+)", path).groups()
  index = None if block == "1" else int(block) - 2
  part = "first" if index is None else "rest"
  return (collection, f"stage{stage}_{part}", LAYERS[layer], leaf), index, value


def from_timm(sd):
  """Our variables of a state dict."""
  flat, stacks = {}, {}
  for path, index, value in (ours(name, value) for name, value in sd.items()):
    if index is None:
      flat[path] = value
    else:
      stacks.setdefault(path, {})[index] = value
  stacked = {path: np.stack([stack[index] for index in range(len(stack))]) for path, stack in stacks.items()}
  return traverse_util.unflatten_dict(flat | stacked)


def assert_equals_timm(variables, expected, **tolerance):
  flat = traverse_util.flatten_dict(variables)
  for name, value in expected.items():
    path, index, value = ours(name, value)
    found = flat[path] if index is None else flat[path][index]
    np.testing.assert_allclose(found, value, err_msg=name, **tolerance)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name):
  parameters, expected, _ = PUBLISHED[name]
  assert stages(*parameters) == expected
  assert RegNetY(*parameters).feature_width == expected[-1][0]


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=() if name == "64GF" else pytest.mark.slow) for name in PUBLISHED]
)
def test_published_parameter_counts(name):
  parameters, _, count = PUBLISHED[name]
  module = RegNetY(*parameters)
  shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


@pytest.mark.parametrize(
  ("parameters", "named"),
  [
    ((20, 1.0, 2.0, 4, 8), "initial_width=20"),
    ((16, -1.0, 2.0, 4, 8), "slope=-1.0"),
    ((16, 1.0, 1.0, 4, 8), "multiplier=1.0"),
    ((16, 1.0, 2.0, 0, 8), "depth=0"),
    ((16, 1.0, 2.0, 4, 0), "group_width=0"),
  ],
)
def test_rejects_parameters_without_a_valid_network(parameters, named):
  with pytest.raises(ValueError, match=named):
    stages(*parameters)


@pytest.fixture(scope="module")
def tiny():
  """timm's numbers, variables with its weights, images."""
  golden = reference.load("regnet")
  return golden, from_timm(reference.below(golden, "sd/")), jnp.asarray(reference.pixels(golden["images"])[:, 0])


def differentiate(module, variables, images):
  """The compiled pass in training mode whose gradients the fixture has; and its result."""

  def loss(params):
    (features, _), new = module.apply(variables | {"params": params}, images, True, mutable=["batch_stats"])
    return jnp.sum(jnp.sin(features)), (features, new)

  step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(variables["params"]).compile()
  return step, step(variables["params"])


@pytest.fixture(scope="module")
def trained(tiny):
  _, variables, images = tiny
  return differentiate(RegNetY(**TINY), variables, images)


def test_features_equal_timm_in_evaluation_mode(tiny):
  golden, variables, images = tiny
  features, cells = jax.jit(RegNetY(**TINY).apply)(variables, images)
  np.testing.assert_allclose(cells.mean(axis=1), features, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(features, golden["eval/features"], rtol=2.5e-5, atol=5e-6)


@pytest.mark.slow
def test_features_and_statistics_equal_timm_in_training_mode(tiny, trained):
  golden, variables, _ = tiny
  _, ((_, (features, new)), _) = trained
  np.testing.assert_allclose(features, golden["train/features"], rtol=2.5e-5, atol=2.5e-5)
  expected = reference.below(golden, "train/sd/")
  assert jax.tree.map(jnp.shape, new["batch_stats"]) == jax.tree.map(jnp.shape, variables["batch_stats"])
  assert len(expected) == 2 * (1 + 3 * 7 + 4)  # every norm of the network
  assert_equals_timm(new, expected, rtol=2.5e-5, atol=5e-6)


@pytest.mark.slow
def test_gradients_equal_timm(tiny, trained):
  _, (_, gradient) = trained
  assert_equals_timm({"params": gradient}, reference.below(tiny[0], "grad/"), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_remat_changes_neither_gradient_nor_statistics():
  """In one stage of two blocks, which compiles fast."""
  fields = {"initial_width": 8, "slope": 0.0, "multiplier": 2.0, "depth": 2, "group_width": 4, "stem_width": 8}
  images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
  variables = jax.jit(RegNetY(**fields).init)(jax.random.key(0), images)
  step, result = differentiate(RegNetY(**fields), variables, images)
  step_again, result_again = differentiate(RegNetY(**fields, remat="full"), variables, images)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), result_again, result)
  # They are two programs: activations that are not stored are recomputed.
  assert step_again.cost_analysis()["flops"] > step.cost_analysis()["flops"]


def test_computes_in_bfloat16_from_float32_variables(tiny):
  _, variables, images = tiny
  (features, _), initial = jax.eval_shape(
    RegNetY(**TINY, dtype=jnp.bfloat16).init_with_output, jax.random.key(0), jnp.asarray(images)
  )
  assert features.dtype == jnp.bfloat16
  assert features.shape == (len(images), 48)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), initial) == jax.tree.map(lambda x: (x.shape, x.dtype), variables)


@pytest.mark.slow
def test_initial_parameters_equal_pycls():
  module = RegNetY(initial_width=48, slope=0.0, multiplier=2.0, depth=3, group_width=12)
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  first, rest = params["stage1_first"], params["stage1_rest"]
  # `init_weights` in pycls/models/blocks.py counts outgoing connections to all groups.
  for kernel, fan_out in (
    (params["stem_conv"]["kernel"], 9 * 32),
    (first["conv2"]["kernel"], 9 * 48),
    (first["shortcut_conv"]["kernel"], 48),
    (rest["conv2"]["kernel"], 9 * 48),
    (rest["squeeze"]["kernel"], 12),
    (rest["excite"]["kernel"], 48),
  ):
    np.testing.assert_allclose(np.std(kernel), (2 / fan_out) ** 0.5, rtol=0.1)
  assert not np.allclose(rest["conv2"]["kernel"][0], rest["conv2"]["kernel"][1])
  assert 0.8 * 12**-0.5 < np.abs(rest["excite"]["bias"]).max() < 12**-0.5
  assert all(np.all(block["norm3"]["scale"] == 1) for block in (first, rest))

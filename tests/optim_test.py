"""Tests of `declip_jax.optim` against SLIP's and DeCLIP's schedules and PyTorch's AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as reference

from declip_jax import architectures, config
from declip_jax.data.recipes import RECIPES
from declip_jax.models.model import make_model
from declip_jax.objectives import heads_for
from declip_jax.optim import adamw, decay_mask, warmup_cosine


@pytest.fixture(scope="module")
def golden():
  return reference.load("schedule")


def assert_same_schedule(found, expected):
  np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-7 * np.max(expected))


@pytest.mark.parametrize("name", ["slip_cosine", "slip2_cosine"])
def test_schedule_equals_slip(golden, name):
  base, final, epochs, steps_per_epoch, warmup_epochs, start = golden[f"{name}/args"]
  total, warmup = int(epochs * steps_per_epoch), int(warmup_epochs * steps_per_epoch)
  schedule = warmup_cosine(peak=base, warmup_steps=warmup, total_steps=total, start=start, end=final)
  assert_same_schedule(schedule(jnp.arange(total)), golden[f"{name}/lr_all"])


def test_schedule_equals_declip_but_for_one_more_step_at_the_peak(golden):
  """DeCLIP counts from 1 and starts the cosine at the last step of the warm-up, we start it behind."""
  start, peak, end, warmup, total = golden["declip_cosine/args_base_peak_min_warmup_max"]
  warmup, total = int(warmup), int(total)
  schedule = warmup_cosine(peak=peak, warmup_steps=warmup, total_steps=total, start=start, end=end)
  found, expected = schedule(jnp.arange(total)), golden["declip_cosine/lr_all_1based"]
  assert_same_schedule(found[:warmup], expected[:warmup])
  assert_same_schedule(found[warmup:], expected[warmup - 1 : -1])


def test_schedule_equals_declip_release(golden):
  steps = golden["declip_release/steps1"]
  schedule = warmup_cosine(peak=1e-3, warmup_steps=2500, total_steps=128001, start=1e-4, end=0.0)
  found = schedule(jnp.asarray(np.where(steps <= 2500, steps - 1, steps)))
  assert_same_schedule(found, golden["declip_release/lr"])


def test_schedule_without_warmup_starts_at_the_peak_and_stays_at_the_end():
  schedule = warmup_cosine(peak=1.0, warmup_steps=0, total_steps=10, start=0.0, end=0.1)
  np.testing.assert_allclose(schedule(jnp.array([0, 5, 10, 99])), [1, 0.55, 0.1, 0.1], rtol=1e-6)


def test_a_warmup_longer_than_the_training_is_refused():
  with pytest.raises(ValueError, match=r"config.optimizer.warmup is 11 steps, longer than the training of 10"):
    warmup_cosine(peak=1.0, warmup_steps=11, total_steps=10, start=0.0, end=0.0)


# PyTorch's three tensors under names by which the decay mask takes the same one.
NAMES = {"kernel": "kernel", "bias": "bias", "scalar": "logit_scale"}


@pytest.mark.parametrize(("b2", "epsilon", "name"), [(0.98, 1e-8, "1e-8"), (0.98, 1e-6, "1e-6"), (0.999, 1e-8, "1e-8")])
def test_trajectory_equals_pytorch(golden, b2, epsilon, name):
  assert [golden[f"optim/wd/{tensor}"] for tensor in NAMES] == [0.1, 0, 0]
  optimizer = adamw(b1=0.9, b2=b2, epsilon=epsilon, weight_decay=0.1, gradient_clip=0.0)
  params = {ours: jnp.asarray(golden[f"optim/init/{theirs}"]) for theirs, ours in NAMES.items()}
  state = optimizer.init(params)
  for step, lr in enumerate(golden["optim/lr"]):
    gradient = {ours: golden[f"optim/grads/{theirs}"][step] for theirs, ours in NAMES.items()}
    update, state = optimizer.update(gradient, state, params)
    params = jax.tree.map(lambda param, change, lr=lr: param - lr * change, params, update)
    for theirs, ours in NAMES.items():
      expected = golden[f"adamw_b0.9_{b2}_eps{name}/f32/{theirs}"][step]
      np.testing.assert_allclose(params[ours], expected, rtol=2e-6, atol=2e-6, err_msg=f"{theirs} at step {step}")


def test_gradient_clip_equals_pytorch(golden):
  gradient = {ours: golden[f"optim/grads/{theirs}"][1] for theirs, ours in NAMES.items()}
  limit = float(golden["clip_grad_norm/max_norm"])
  assert golden["clip_grad_norm/total_norm"] > limit
  # Adam's first moment shows what it was given.
  optimizer = adamw(b1=0.9, b2=0.98, epsilon=1e-8, weight_decay=0.0, gradient_clip=limit)
  _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
  moments = next(part.mu for part in state if hasattr(part, "mu"))
  for theirs, ours in NAMES.items():
    np.testing.assert_allclose(moments[ours] / 0.1, golden[f"clip_grad_norm/grad_step1/{theirs}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "image"), [("declip", "vit"), ("slip", "resnet")])
def test_decay_spares_biases_gains_and_temperature_and_nothing_else(method, image):
  c = config.default(method)
  if image == "resnet":
    c.model.image = architectures.resnet(64, (1, 1, 1, 1))
    c.model.heads.image_bias = True
  recipe = RECIPES[c.data.recipe]
  model = make_model(c.model, views=recipe.views, heads=heads_for(c.weights))
  shape = jax.ShapeDtypeStruct
  batch = {
    "image": shape((2, len(recipe.image_views), 64, 64, 3), jnp.uint8),
    "text": shape((2, len(recipe.text_views), 77), jnp.int32),
    "mlm_position": shape((2, 5), jnp.int32),
  }
  params, _ = jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), batch)
  decayed = {
    jax.tree_util.keystr(path): decay for path, decay in jax.tree_util.tree_leaves_with_path(decay_mask(params))
  }
  assert set(decayed) == {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  kinds = {True: set(), False: set()}
  for path, decay in decayed.items():
    kinds[decay].add(path.split("'")[-2])
  assert kinds[False] == {"bias", "scale", "logit_scale"}
  assert kinds[True] == {"kernel", "embedding", "position_embedding"} | (
    {"class_embedding"} if image == "vit" else set()
  )
  # A stacked bias is a matrix, and still a bias.
  blocks = params["towers"]["text"]["transformer"]["blocks"]
  assert blocks["qkv"]["bias"].ndim == 2
  assert not decayed["['towers']['text']['transformer']['blocks']['qkv']['bias']"]

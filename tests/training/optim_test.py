"""Tests of `declip_jax.training.optim` against the optimisers of SLIP, DeCLIP, open_clip and PyTorch."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as reference

from declip_jax import architectures, build, config
from declip_jax.models.model import make_model
from declip_jax.models.paths import parameter_paths, stop_gradient_below, trainable_mask
from declip_jax.training import optim, schedules
from declip_jax.views import Views

SETTINGS = {"epsilon": 1e-8, "weight_decay": 0.1}  # of the golden trajectories; the other defaults are the config's
PRECISIONS = {"f32": np.float32, "f64": np.float64}


def make(name, **settings):
  defaults = config.default().optimizer
  return optim.make_optimizer(
    build.read_settings(optim.OptimizerSettings, defaults, "optimizer", name=name, **SETTINGS | settings)
  )


def precise(precision):
  return jax.enable_x64(True) if precision == "f64" else contextlib.nullcontext()


@pytest.fixture(scope="module")
def golden():
  return reference.load("schedule")


# PyTorch's three tensors have names by which the mask "weights" decays the same one.
NAMES = {"kernel": "kernel", "bias": "bias", "scalar": "logit_scale"}
CASES = {
  "adamw_b0.9_0.98_eps1e-8": ("adamw", {}, 1),
  "adamw_b0.9_0.98_eps1e-6": ("adamw", {"epsilon": 1e-6}, 1),
  "adamw_b0.9_0.999_eps1e-8": ("adamw", {"b2": 0.999}, 1),
  "sgd_m0.9": ("sgd", {}, 10),
  "sgd_m0.9_nesterov": ("sgd", {"nesterov": True}, 10),
  "lars_m0.9_eta0.001": ("lars", {}, 100),
}
MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq", "trace": "momentum_buffer"}


def run_optimizer(optimizer, params, gradients, lrs):
  """Parameters after each step, and the last state, as the train step uses an optimiser."""

  def step(carry, inputs):
    params, state = carry
    gradient, lr = inputs
    update, state = optimizer.update(gradient, state, params)
    params = jax.tree.map(lambda param, change: param - lr * change, params, update)
    return (params, state), params

  (_, state), trajectory = jax.lax.scan(step, (params, optimizer.init(params)), (gradients, lrs))
  return trajectory, state


@pytest.fixture(scope="module", params=PRECISIONS)
def trajectories(request, golden):
  """Precision, and the result of `run_optimizer` for each of `CASES`, in one compilation."""
  dtype = PRECISIONS[request.param]

  def run_all(init, gradients, lrs):
    return {
      name: run_optimizer(make(optimizer, **settings), init, gradients, lrs * factor)
      for name, (optimizer, settings, factor) in CASES.items()
    }

  with precise(request.param):
    init, gradients = (
      {ours: golden[f"optim/{kind}/{theirs}"].astype(dtype) for theirs, ours in NAMES.items()}
      for kind in ("init", "grads")
    )
    return request.param, jax.device_get(jax.jit(run_all)(init, gradients, golden["optim/lr"].astype(dtype)))


@pytest.mark.parametrize("case", CASES)
def test_trajectories_and_moments_equal_pytorch_and_declip(golden, trajectories, case):
  precision, results = trajectories
  assert [golden[f"optim/wd/{tensor}"] for tensor in NAMES] == [SETTINGS["weight_decay"], 0, 0]
  assert [golden[f"optim/lr_multiplier_{name}"] for name in ("sgd", "lars")] == [10, 100]
  trajectory, state = results[case]
  limits = {"f32": {"rtol": 2e-6, "atol": 2e-6}, "f64": {"rtol": 1e-12, "atol": 1e-12}}[precision]
  for theirs, ours in NAMES.items():
    expected = golden[f"{case}/{precision}/{theirs}"]
    assert trajectory[ours].dtype == expected.dtype
    np.testing.assert_allclose(trajectory[ours], expected, **limits, err_msg=theirs)
    for moment, name in MOMENTS.items():
      expected = golden.get(f"{case}/{precision}/state_{name}/{theirs}")
      if expected is not None:
        np.testing.assert_allclose(optax.tree.get(state, moment)[ours], expected, **limits, err_msg=f"{name} {theirs}")


def test_every_array_of_the_optimisers_is_compared(golden):
  """The loop above asks for each moment by name and would pass if none were found."""
  found = {key.split("/")[0] for key in golden if "/f32/" in key}
  assert found == set(CASES)
  moments = {(key.split("_")[0], key.split("/")[2].removeprefix("state_")) for key in golden if "/state_" in key}
  wanted = {("adamw", "exp_avg"), ("adamw", "exp_avg_sq"), ("sgd", "momentum_buffer"), ("lars", "momentum_buffer")}
  assert moments == wanted


def update_of(optimizer, params, gradient=None):
  """The first update; the gradient is one everywhere unless given."""
  gradient = gradient or jax.tree.map(np.ones_like, params)
  return jax.jit(lambda params, gradient: optimizer.update(gradient, optimizer.init(params), params)[0])(
    params, gradient
  )


PLAIN = {"momentum": 0.0, "weight_decay": 0.0}  # SGD whose update is the gradient


def test_the_gradient_is_clipped_as_by_pytorch(golden):
  gradient = {ours: jnp.asarray(golden[f"optim/grads/{theirs}"][1]) for theirs, ours in NAMES.items()}
  limit = float(golden["clip_grad_norm/max_norm"])
  norm = optax.tree.norm(gradient)
  np.testing.assert_allclose(norm, golden["clip_grad_norm/total_norm"], rtol=1e-6)
  assert norm > limit
  clipped = update_of(make("sgd", **PLAIN, gradient_clip=limit), gradient, gradient)
  for theirs, ours in NAMES.items():
    np.testing.assert_allclose(clipped[ours], golden[f"clip_grad_norm/grad_step1/{theirs}"], rtol=2e-6, atol=1e-7)
  left = update_of(make("sgd", **PLAIN, gradient_clip=2.0), gradient, gradient)
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, left, gradient)))


def test_the_two_halves_of_the_hybrid_are_clipped_by_one_norm():
  params = {"towers": {"image": {"kernel": jnp.ones(())}, "text": {"kernel": jnp.ones(())}}}
  gradient = {"towers": {"image": {"kernel": jnp.float32(3.0)}, "text": {"kernel": jnp.float32(4.0)}}}
  for side, expected in (("image", 0.6), ("text", 0.8)):
    optimizer = make("adamw_sgd", momentum=0.0, weight_decay=0.0, gradient_clip=1.0, sgd_side=side)
    update = update_of(optimizer, params, gradient)["towers"]
    np.testing.assert_allclose(update[side]["kernel"], expected, rtol=1e-6)
    other = {"image": "text", "text": "image"}[side]
    np.testing.assert_allclose(update[other]["kernel"], 1.0, rtol=1e-3)  # of Adam's first step
  with pytest.raises(ValueError, match=r"config.optimizer.sgd_side='both': choose one of \['image', 'text'\]"):
    make("adamw_sgd", sgd_side="both")


def test_lars_scales_each_stacked_block_separately():
  rng = np.random.default_rng(0)
  param, gradient = rng.normal(size=(2, 3, 4, 5)).astype(np.float32) * np.array([1, 10, 100])[:, None, None]
  for scan in ("blocks", "stage1_rest"):
    stacked = {scan: {"fc1": {"kernel": jnp.asarray(param)}}}
    found = update_of(make("lars"), stacked, {scan: {"fc1": {"kernel": jnp.asarray(gradient)}}})[scan]["fc1"]["kernel"]
    for index in range(3):
      separate = update_of(make("lars"), {"kernel": param[index]}, {"kernel": gradient[index]})["kernel"]
      np.testing.assert_allclose(found[index], separate, rtol=1e-6)


def test_lars_is_finite_and_does_not_change_zeros():
  params = {"new": {"bias": jnp.zeros(3)}, "unused": {"bias": jnp.ones(3)}, "nothing": {"bias": jnp.zeros(3)}}
  gradient = {"new": {"bias": jnp.ones(3)}, "unused": {"bias": jnp.zeros(3)}, "nothing": {"bias": jnp.zeros(3)}}
  update = update_of(make("lars"), params, gradient)
  assert not any(leaf.any() for leaf in jax.tree.leaves(update))


# A tree with one of everything; `image` and `text` are the sides of the hybrid.
def small_tree():
  def ones(*shape):
    return np.ones(shape, np.float32)

  def block(depth):
    return {
      "attention_norm": {"scale": ones(depth, 4), "bias": ones(depth, 4)},
      "qkv": {"kernel": ones(depth, 4, 12), "bias": ones(depth, 12)},
    }

  image = {
    "class_embedding": ones(4),
    "position_embedding": ones(3, 4),
    "mask_embedding": ones(4),
    "patch_embedding": {"kernel": ones(6, 4), "bias": ones(4)},
    "pre_norm": {"scale": ones(4), "bias": ones(4)},
    "transformer": {"blocks": block(2)},
    "post_norm": {"scale": ones(4), "bias": ones(4)},
  }
  text = {
    "token_embedding": {"embedding": ones(7, 4)},
    "position_embedding": ones(3, 4),
    "transformer": {"blocks": block(3)},
  }
  heads = {name: ones() for name in ("logit_scale", "dense_logit_scale", "logit_bias")}
  heads |= {name: {"kernel": ones(4, 4), "bias": ones(4)} for name in ("image_projection", "text_projection")}
  return {"towers": {"image": image, "text": text}, "heads": heads}


def by_path(tree):
  return dict(zip(*map(jax.tree.leaves, (parameter_paths(tree), tree)), strict=True))


WEIGHTS = {
  "towers/image/patch_embedding/kernel",
  "towers/image/transformer/blocks/qkv/kernel",
  "towers/text/token_embedding/embedding",
  "towers/text/transformer/blocks/qkv/kernel",
  "heads/image_projection/kernel",
  "heads/text_projection/kernel",
}
EMBEDDINGS = {
  "towers/image/class_embedding",
  "towers/image/position_embedding",
  "towers/image/mask_embedding",
  "towers/text/position_embedding",
}
PACKED = {"towers/image/transformer/blocks/qkv/bias", "towers/text/transformer/blocks/qkv/bias"}


def test_decay_acts_on_the_parameters_that_each_rule_names():
  expected = {"finetune": WEIGHTS, "weights": WEIGHTS | EMBEDDINGS, "declip": WEIGHTS | EMBEDDINGS | PACKED}
  expected["all"] = set(by_path(small_tree()))
  assert set(expected) == set(optim.DECAY_MASKS)
  for name, paths in expected.items():
    assert {path for path, decay in by_path(optim.DECAY_MASKS[name](small_tree())).items() if decay} == paths
  # SGD on a parameter of ones without a gradient shows the decay alone.
  tree = small_tree()
  update = update_of(make("sgd", decay_mask="declip"), tree, jax.tree.map(np.zeros_like, tree))
  for path, leaf in by_path(update).items():
    np.testing.assert_allclose(leaf, 0.1 if path in expected["declip"] else 0.0, err_msg=path)


@pytest.mark.parametrize(
  ("method", "image"), [("declip", "vit"), pytest.param("slip", "resnet", marks=pytest.mark.slow)]
)
def test_decay_excludes_biases_gains_and_temperatures_of_the_models_and_nothing_else(method, image):
  c = config.default(method)
  if image == "resnet":
    c.model.image = architectures.resnet(64, (1, 1, 1, 1))
    c.model.heads.image_bias = True
  built = build.build(c)
  batch = built.batch_shape(8)
  params, _ = jax.eval_shape(lambda batch: built.model.init(jax.random.key(0), batch), batch)
  kinds = {True: set(), False: set()}
  for path, decay in by_path(optim.decay_weights(params)).items():
    kinds[decay].add(path.split("/")[-1])
  assert kinds[False] == {"bias", "scale", "logit_scale"}
  assert kinds[True] == {"kernel", "embedding", "position_embedding"} | (
    {"class_embedding"} if image == "vit" else set()
  )
  # A stacked bias is a matrix, and still a bias.
  blocks = params["towers"]["text"]["transformer"]["blocks"]
  assert blocks["qkv"]["bias"].ndim == 2
  assert not by_path(optim.decay_weights(params))["towers/text/transformer/blocks/qkv/bias"]
  packed = {"towers/text/transformer/blocks/qkv/bias", "towers/image/transformer/blocks/qkv/bias"}
  weights, declip = (by_path(rule(params)) for rule in (optim.decay_weights, optim.decay_declip))
  assert {path for path in declip if declip[path] != weights[path]} == packed & set(declip)
  # Every rate of a layer is found, too.
  if image == "vit":
    rates = by_path(optim.rate_multipliers(params, multipliers=(), layer_decay=0.65))
    assert {path for path, rate in rates.items() if np.ndim(rate)} == {
      path for path in rates if path.startswith("towers/image/transformer/blocks")
    }
    np.testing.assert_allclose(rates["towers/image/position_embedding"], 0.65**13)
  else:
    with pytest.raises(ValueError, match=r"config\.optimizer\.layer_decay=0\.65"):
      jax.eval_shape(make("adamw", layer_decay=0.65).init, params)


def test_layer_decay_equals_beit():
  """Ids as in its fine-tuning: 0 before the blocks, block i has i + 1, all else depth + 1; here the depth is 2."""
  update = by_path(update_of(make("sgd", **PLAIN, layer_decay=0.5), small_tree()))
  for path in (
    "class_embedding",
    "position_embedding",
    "mask_embedding",
    "patch_embedding/kernel",
    "patch_embedding/bias",
    "pre_norm/scale",
    "pre_norm/bias",
  ):
    np.testing.assert_array_equal(update.pop(f"towers/image/{path}"), 0.125, err_msg=path)
  for path in ("attention_norm/scale", "attention_norm/bias", "qkv/kernel", "qkv/bias"):
    first, second = update.pop(f"towers/image/transformer/blocks/{path}")
    np.testing.assert_array_equal(first, 0.25, err_msg=path)
    np.testing.assert_array_equal(second, 0.5, err_msg=path)
  assert len(update) == 2 + 6 + 3 + 4  # the image tower's norm, the text tower, temperatures, projections
  for path, leaf in update.items():
    np.testing.assert_array_equal(leaf, 1.0, err_msg=path)


# BeiT's names of the parameters before and after the blocks, and in a block.
BEIT_NAMES = {
  "class_embedding": "cls_token",
  "position_embedding": "pos_embed",
  "patch_embedding": "patch_embed.proj",
  "post_norm": "norm",
  "classifier": "head",
  "attention_norm": "norm1",
  "qkv": "attn.qkv",
  "out": "attn.proj",
  "mlp_norm": "norm2",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
}


def by_beit_name(tree):
  """Numbers of a fine-tuned model by BeiT's names of its parameters; those of stacked blocks one by one."""
  found = {}
  for path, value in by_path(tree).items():
    *_, module, leaf = path.split("/")
    leaf = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}.get(leaf, "")
    name = f"{BEIT_NAMES[module if leaf else path.rpartition('/')[2]]}{leaf}"
    if "/blocks/" not in path:
      found[name] = float(value)
      continue
    for index, number in enumerate(np.ravel(value)):
      found[f"blocks.{index}.{name}"] = number
  return found


@pytest.mark.parametrize(("size", "layer_decay"), [("S", 0.65), ("B", 0.65), ("L", 0.75)])
def test_rates_and_decays_of_fine_tuning_equal_beit(size, layer_decay):
  """Of every parameter of the models that SLIP fine-tunes."""
  beit = reference.load("beit_finetuning")
  c = config.default("finetune", f"SLIP ViT-{size}/16")
  c.model.heads.num_classes = 1000
  model = make_model(c.model.to_dict(), views=Views(classified_image=(0,)), heads=("classifier",))
  images = {"image": jax.ShapeDtypeStruct((1, 1, 224, 224, 3), jnp.uint8)}
  params, _ = jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), images)
  rates = by_beit_name(optim.rate_multipliers(params, multipliers=(), layer_decay=layer_decay))
  names = beit[f"layer_decay/{size}/name"]
  assert set(rates) == set(names)
  expected = dict(zip(names, beit[f"layer_decay/{size}/lr_scale"], strict=True))
  np.testing.assert_allclose([rates[name] for name in names], [expected[name] for name in names], rtol=1e-12)
  depth = c.model.image.depth
  decayed = jax.tree.map(
    lambda decay, path: np.full(depth, decay) if "/blocks/" in path else decay,
    optim.decay_finetune(params),
    parameter_paths(params),
  )
  found = by_beit_name(decayed)
  np.testing.assert_array_equal([0.05 * found[name] for name in names], beit[f"layer_decay/{size}/weight_decay"])


def test_adamw_with_the_rates_of_layers_equals_beit():
  beit = reference.load("beit_finetuning")
  names = {"a": "kernel", "b": "bias", "head": "weight"}
  multipliers = tuple((names[name], float(beit[f"adamw/lr_scale/{name}"])) for name in names)
  assert [float(beit[f"adamw/weight_decay/{name}"]) for name in names] == [0.05, 0, 0.05]
  with precise("f64"):
    optimizer = make("adamw", b1=0.9, b2=0.999, epsilon=1e-8, weight_decay=0.05, multipliers=multipliers)
    params = {names[name]: beit[f"adamw/initial/{name}"].astype(np.float64) for name in names}
    gradients = {
      names[name]: np.stack([beit[f"adamw/grad{step}/{name}"] for step in range(5)]).astype(np.float64)
      for name in names
    }
    trajectory, _ = jax.jit(lambda *given: run_optimizer(optimizer, *given))(params, gradients, beit["adamw/lr"])
    trajectory = jax.device_get(trajectory)
  for step in range(5):
    for name, ours in names.items():
      np.testing.assert_allclose(trajectory[ours][step], beit[f"adamw/after{step}/{name}"], rtol=1e-9, atol=1e-12)


def test_multipliers_scale_everything_below_a_path():
  multipliers = (("heads", 2.0), ("heads/logit_scale", 0.0), ("towers/image", 3.0))
  update = by_path(update_of(make("sgd", **PLAIN, layer_decay=0.5, multipliers=multipliers), small_tree()))
  expected = {
    "heads/logit_scale": 0,
    "heads/dense_logit_scale": 2,
    "heads/text_projection/bias": 2,
    "towers/image/post_norm/bias": 3,
    "towers/image/class_embedding": 0.375,
    "towers/text/position_embedding": 1,
  }
  for path, factor in expected.items():
    np.testing.assert_array_equal(update[path], factor, err_msg=path)


def test_multipliers_scale_the_decay_of_adamw_too():
  """As PyTorch's does, whose decay is the group's learning rate times the weight decay."""
  params = {"a": {"kernel": jnp.ones(3)}, "b": {"kernel": jnp.ones(3)}}
  update = update_of(make("adamw", multipliers=(("b", 0.25),)), params)
  np.testing.assert_allclose(update["a"]["kernel"], 1.1, rtol=1e-6)
  np.testing.assert_allclose(update["b"]["kernel"], 0.275, rtol=1e-6)


def test_a_group_with_another_initial_rate_follows_the_schedule_as_in_declip(golden):
  start, peak, end, warmup, total = golden["declip_cosine/args_base_peak_min_warmup_max"]
  given = {"schedule": "declip_cosine", "total_steps": int(total), "warmup": int(warmup), "cooldown": 0}
  given |= {"learning_rate": float(peak), "warmup_start": float(start), "end_learning_rate": float(end)}
  schedule = schedules.make_schedule(
    build.read_settings(schedules.ScheduleSettings, config.default().optimizer, "optimizer", **given)
  )
  update = update_of(make("sgd", **PLAIN, multipliers=(("group", 3.0),)), {"base": jnp.ones(()), "group": jnp.ones(())})
  lr = schedule(jnp.arange(int(total)))
  for name, expected in (("base", "lr_all_1based"), ("group", "lr_all_group_x3")):
    expected = golden[f"declip_cosine/{expected}"]
    np.testing.assert_allclose(lr * update[name], expected, rtol=2e-6, atol=2e-7 * expected.max(), err_msg=name)


def test_the_hybrid_is_sgd_on_the_image_side_and_adamw_on_the_rest():
  tree = small_tree()
  rng = np.random.default_rng(0)
  params, *gradients = (jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree) for _ in range(4))
  gradients = jax.tree.map(lambda *leaves: np.stack(leaves), *gradients)

  def end(optimizer, **settings):
    return run_optimizer(make(optimizer, nesterov=True, **settings), params, gradients, jnp.array([0.1, 0.2, 0.3]))[0]

  runs = jax.jit(
    lambda: [end("adamw_sgd", sgd_weight_decay=0.01), end("sgd", weight_decay=0.01), end("adamw")],
  )()
  hybrid, sgd, adamw = map(by_path, runs)
  for path, found in hybrid.items():
    image = path.startswith(("towers/image/", "heads/image_projection/"))
    np.testing.assert_array_equal(found, (sgd if image else adamw)[path], err_msg=path)
    assert not np.allclose(sgd[path], adamw[path])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_frozen_parameters_do_not_change_and_have_no_moments(name):
  tree, frozen = small_tree(), ("towers/image", "heads/logit_scale")
  settings = {"gradient_clip": 1.0, "layer_decay": 0.5, "multipliers": (("towers", 2.0),)}
  optimizer = make(name, frozen=frozen, **settings)

  def step(params):
    gradient = jax.grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(stop_gradient_below(p, frozen))))(params)
    return optimizer.update(gradient, optimizer.init(params), params)

  update, state = jax.jit(step)(tree)
  for path, leaf in by_path(update).items():
    is_frozen = path.startswith("towers/image/") or path == "heads/logit_scale"
    assert leaf.any() != is_frozen, path
  sizes = {path: x.size for path, x in by_path(tree).items() if not path.startswith("towers/image/")}
  moments = 2 * (sum(sizes.values()) - 1) if "adamw" in name else sum(sizes.values()) - 1
  if name == "adamw_sgd":
    moments -= sizes["heads/image_projection/kernel"] + sizes["heads/image_projection/bias"]
  assert sum(x.size for x in jax.tree.leaves(state) if x.dtype == jnp.float32) == moments


@pytest.mark.parametrize("name", [pytest.param("adamw", marks=pytest.mark.slow), "lars"])
def test_the_last_blocks_of_a_tower_are_trained_alone(name):
  tree = jax.tree.map(jnp.asarray, small_tree())
  frozen = ("towers/text/token_embedding", "towers/text/transformer/blocks[:-1]")
  gradient = jax.grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(stop_gradient_below(p, frozen))))(tree)
  optimizer = make(name, frozen=frozen, decay_mask="all")
  update, _ = optimizer.update(jax.tree.map(jnp.ones_like, gradient), optimizer.init(tree), tree)
  for found in (gradient, update):
    for path, leaf in by_path(found).items():
      if "text/transformer/blocks" in path:
        assert not leaf[:2].any(), path
        assert leaf[2].all(), path
      elif found is gradient:
        assert leaf.any() != path.startswith("towers/text/token_embedding"), path


@pytest.mark.parametrize(
  ("frozen", "message"),
  [
    ("towers/text[:-1]", r"towers/text/position_embedding is not in a stack"),
    ("towers/text/transformer/blocks[5:]", r"\('towers/text/transformer/blocks\[5:\]',\) names none of the 3 blocks"),
    (
      "towers/text/transformer/block[:1]",
      r"config\.optimizer\.frozen: no parameter at 'towers/text/transformer/block'",
    ),
  ],
)
def test_blocks_that_do_not_exist_are_rejected(frozen, message):
  with pytest.raises(ValueError, match=message):
    stop_gradient_below(small_tree(), (frozen,))


def test_slices_of_blocks_that_cover_a_stack_freeze_it():
  path = "towers/text/transformer/blocks"
  mask = trainable_mask(small_tree(), (f"{path}[:1]", f"{path}[1:]", "towers/image"))
  assert {path for path, is_trained in by_path(mask).items() if is_trained and "/transformer/" in path} == set()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"name": "adamax"}, r"config\.optimizer\.name='adamax': choose one of \['adamw', 'adamw_sgd', 'lars', 'sgd'\]"),
    (
      {"decay_mask": "none"},
      r"config\.optimizer\.decay_mask='none': choose one of \['all', 'declip', 'finetune', 'weights'\]",
    ),
    (
      {"multipliers": (("heads/scale", 2.0),)},
      r"config\.optimizer\.multipliers: no parameter at 'heads/scale'; choose from \['heads/dense_logit_scale', ",
    ),
    ({"frozen": ("towers/imag",)}, r"config\.optimizer\.frozen: no parameter at 'towers/imag'; choose from \['heads/"),
  ],
)
def test_invalid_optimiser_settings_are_rejected_before_the_first_step(settings, message):
  with pytest.raises(ValueError, match=message):
    make(**{"name": "adamw"} | settings).init(small_tree())

"""Low-rank adapters: a step of peft's, what they leave as it is, what they train, and what cannot have them."""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as reference
from tiny import tiny_config

from declip_jax import build
from declip_jax.models.lora import TARGETS, Lora, add_adapters, frozen_paths, merge
from declip_jax.models.model import make_model
from declip_jax.models.paths import stop_gradient_below, trainable
from declip_jax.training.optim import OptimizerSettings, make_optimizer, rate_multipliers
from declip_jax.training.state import abstract_state
from declip_jax.views import Views
from declip_jax.weights.read import from_state_dict

LORA = Lora(rank=3, alpha=6.0, targets=TARGETS, towers=("image", "text"), trained=())
PEFT = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"}
PEFT |= {"out": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


@pytest.fixture(scope="module")
def weights():
  """SigLIP of `siglip_transformers`, whose blocks have peft's adapters in `lora`."""
  tensors = reference.below(reference.load("siglip_transformers"), "sd/")
  return from_state_dict(tensors, {"image.heads": 2, "text.heads": 2, "image_size": 36})


def of_peft(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Adapters and scales of peft under our paths."""
  found = {name: arrays[name].reshape(()) for name in ("logit_scale", "logit_bias") if name in arrays}
  for tower, theirs in {"image": "vision", "text": "text"}.items():
    for target, name in PEFT.items():
      for ours, matrix in {"a": "lora_A", "b": "lora_B"}.items():
        layers = [f"{theirs}_model.encoder.layers.{layer}.{name}.{matrix}" for layer in range(2)]
        stacked = np.stack([arrays[layer].T for layer in layers])
        found[f"towers/{tower}/transformer/blocks/lora/{target}/{ours}"] = stacked
  return found


def with_adapters(params: Any, adapters: Mapping[str, np.ndarray]) -> Any:
  flat = flatten_dict(add_adapters(params, jax.random.key(0), LORA), sep="/")
  assert {path for path in flat if "/lora/" in path} == {path for path in adapters if "/lora/" in path}
  return jax.tree.map(jnp.asarray, unflatten_dict(flat | dict(adapters), sep="/"))


def test_a_step_is_that_of_peft(weights) -> None:
  """Loss, every gradient and every adapter after a step of AdamW; the rest has no gradient and no moments."""
  golden, given = reference.load("lora"), reference.load("siglip_transformers")
  fields = {**weights.model, "mean": (0.0,) * 3, "std": (1 / 255,) * 3}
  model = make_model(fields, views=Views(), heads=weights.heads, lora=LORA)
  params = with_adapters(weights.params, of_peft(reference.below(golden, "first/")))
  frozen = frozen_paths(params, LORA)
  batch = {"image": reference.pixels(given["images"]), "text": given["tokens"][:3, None]}
  batch = jax.tree.map(jnp.asarray, batch)
  settings = tiny_config("siglip").optimizer
  settings.update({"weight_decay": 0.1, "b1": 0.9, "b2": 0.98, "epsilon": 1e-6})
  optimizer = make_optimizer(build.read_settings(OptimizerSettings, settings, "optimizer", frozen=frozen))

  def loss_of(params: Any) -> Any:
    plain = model.merged(stop_gradient_below(params, frozen))
    features, _ = model.encode(plain, weights.collections, batch)
    outputs, _ = model.apply_heads(plain, weights.collections, features)
    return reference.objective({"sigmoid": 1.0})(outputs, batch, 0)[0]

  @jax.jit
  def step(params: Any) -> Any:
    loss, gradient = jax.value_and_grad(loss_of)(params)
    state = optimizer.init(params)
    updates, _ = optimizer.update(gradient, state, params)
    return loss, gradient, jax.tree.map(lambda param, update: param - 0.01 * update, params, updates), state

  loss, gradient, after, state = step(params)
  np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
  first, gradient, after = (flatten_dict(tree, sep="/") for tree in (params, gradient, after))
  gradients, moved = (of_peft(reference.below(golden, prefix)) for prefix in ("gradient/", "after/"))
  for path in first:
    short = path.removeprefix("heads/")
    if short in gradients:
      np.testing.assert_allclose(gradient[path], gradients[short], rtol=3e-4, atol=2e-5, err_msg=path)
      np.testing.assert_allclose(after[path], moved[short], rtol=1e-4, atol=1e-4, err_msg=path)
    else:
      assert not np.any(gradient[path]), path
      np.testing.assert_array_equal(after[path], first[path], err_msg=path)
  assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 1 + 2 * sum(x.size for x in gradients.values())


def test_merged_kernels_are_those_of_peft(weights) -> None:
  golden = reference.load("lora")
  adapters = {path: x for path, x in of_peft(reference.below(golden, "after/")).items() if path.startswith("towers/")}
  merged = jax.device_get(merge(with_adapters(weights.params, adapters), LORA))
  kernels = {name: merged["towers"][name]["transformer"]["blocks"] for name in ("image", "text")}
  value = golden["merged/vision_model.encoder.layers.1.self_attn.v_proj.weight"]
  np.testing.assert_allclose(kernels["image"]["qkv"]["kernel"][1][:, 64:], value.T, rtol=1e-5, atol=1e-6)
  hidden = golden["merged/text_model.encoder.layers.0.mlp.fc1.weight"]
  np.testing.assert_allclose(kernels["text"]["fc1"]["kernel"][0], hidden.T, rtol=1e-5, atol=1e-6)
  assert jax.tree.structure(merged) == jax.tree.structure(jax.device_get(weights.params))


def test_first_adapters_change_nothing_and_only_their_targets_have_them(weights) -> None:
  lora = Lora(rank=2, alpha=1.0, targets=("value", "fc1"), towers=("text",), trained=())
  params = add_adapters(weights.params, jax.random.key(3), lora)
  shapes = {path: x.shape for path, x in flatten_dict(params, sep="/").items() if "/lora/" in path}
  below = "towers/text/transformer/blocks/lora"
  assert shapes == {
    f"{below}/value/a": (2, 24, 2),
    f"{below}/value/b": (2, 2, 24),
    f"{below}/fc1/a": (2, 24, 2),
    f"{below}/fc1/b": (2, 2, 56),
  }
  a = np.asarray(params["towers"]["text"]["transformer"]["blocks"]["lora"]["value"]["a"])
  assert 0.8 * 24**-0.5 < abs(a).max() <= 24**-0.5
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(merge(params, lora)), jax.device_get(weights.params))
  blocks = params["towers"]["text"]["transformer"]["blocks"]
  blocks["lora"]["value"]["b"] = np.ones((2, 2, 24), np.float32)
  changed = merge(params, lora)["towers"]["text"]["transformer"]["blocks"]
  change = np.asarray(changed["qkv"]["kernel"]) - np.asarray(blocks["qkv"]["kernel"])
  expected = np.zeros((2, 24, 72))
  expected[..., 48:] = 0.5 * (a @ np.ones((2, 2, 24)))  # alpha / rank = 1 / 2
  np.testing.assert_allclose(change, expected, atol=1e-6)
  np.testing.assert_array_equal(changed["fc1"]["kernel"], blocks["fc1"]["kernel"])


def test_what_a_config_trains() -> None:
  c = tiny_config("siglip")
  c.lora.rank, c.lora.trained = 2, ("heads/text_projection", "towers/image/post_norm/scale")
  built = build.build(c, jax.devices()[:1])
  state = abstract_state(built.batch_shape(16), built.mesh, model=built.model, optimizer=built.optimizer)
  trained = {path for path in flatten_dict(state.params, sep="/") if path not in built.frozen}
  others = {path for path in trained if "/lora/" not in path}
  named = {"heads/text_projection/kernel", "towers/image/post_norm/scale"}
  assert others == named | {"heads/logit_scale", "heads/logit_bias"}
  assert len(trained) - len(others) == 2 * 4 * 2
  assert not built.model.towers.lock_image
  moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
  assert len(moments) == 1 + 2 * len(trained)
  # Adapters have the rates of their blocks, and are frozen with them.
  rates = rate_multipliers(state.params, multipliers=(("towers/image", 0.1),), layer_decay=0.5)
  adapters = rates["towers"]["image"]["transformer"]["blocks"]["lora"]["query"]
  np.testing.assert_allclose(adapters["a"], 0.1 * np.array([0.25, 0.5]).reshape(2, 1, 1))
  some = trainable(state.params, (*built.frozen, "towers/text/transformer/blocks[:-1]"))
  adapters = some["towers"]["text"]["transformer"]["blocks"]["lora"]["out"]
  np.testing.assert_array_equal(adapters["b"], np.array([False, True]).reshape(2, 1, 1))


@pytest.mark.parametrize(
  ("method", "change", "message"),
  [
    ("clip", {"lora.targets": ("query", "values")}, r"lora\.targets=.*choose one or more of .*did you mean value"),
    ("clip", {"lora.towers": ()}, r"config\.lora\.towers=\(\): choose one or more of \['image', 'text'\]"),
    ("clip", {"lora.trained": ("heads/logit",)}, r"config\.lora\.trained: no parameter at 'heads/logit'"),
    ("clip", {"optimizer.name": "lars"}, r"config\.lora\.rank=2: config\.optimizer\.name='lars'.* never change"),
    ("slip_byol", {}, r"config\.lora\.rank=2: a momentum tower, .*would be a copy"),
    ("simclr", {"lora.towers": ("text",)}, r"config\.lora\.towers=\('text',\): this model has only \['image'\]"),
  ],
)
def test_what_cannot_have_adapters(method: str, change: dict[str, Any], message: str) -> None:
  c = tiny_config(method)
  c.lora.rank = 2
  c.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    build.build(c, jax.devices()[:1])


def test_a_tower_without_blocks_cannot_have_adapters() -> None:
  with pytest.raises(ValueError, match="the image tower has no transformer blocks, so it can have no adapters"):
    add_adapters({"towers": {"image": {"stem": {}}}, "heads": {}}, jax.random.key(0), LORA)

"""A few train steps of a method on any mesh, without the training loop: tests/steps.py OUT PORT PROCESS METHOD...

As a command it is one of two processes with one device each that take these steps together; the first writes OUT.
"""

from collections.abc import Mapping
import dataclasses
import functools
from pathlib import Path
import sys
from typing import Any, NamedTuple
from unittest import mock

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
from tiny import tiny_config

from declip_jax import architectures, build, sharding
from declip_jax.build import make_step
from declip_jax.data.recipes import RECIPES
from declip_jax.objectives import TERMS
from declip_jax.sharding import batch_sharding, gather, replicated, shard_like, to_global
from declip_jax.training import trimming
from declip_jax.training.gradient import make_gradient
from declip_jax.training.state import State, abstract_state, init_state

STEPS, BATCH = 3, 16
LONGEST = 12  # tokens of a text, of a context of 16


class FirstGradient(NamedTuple):
  count: jax.Array
  gradient: Any


def keep_first_gradient() -> optax.GradientTransformation:
  """Does not change updates; its state is the gradient of the first step."""

  def update(gradient: Any, state: FirstGradient, params: Any = None) -> tuple[Any, FirstGradient]:
    del params
    kept = jax.tree.map(lambda new, old: jnp.where(state.count == 0, new, old), gradient, state.gradient)
    return gradient, FirstGradient(state.count + 1, kept)

  return optax.GradientTransformation(
    lambda params: FirstGradient(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)), update
  )


# DeCLIP's views and one with hidden patches: every term has what it needs.
_EVERYTHING = dataclasses.replace(
  RECIPES["declip"],
  image_views=("strong", "strong", "weak"),
  views=RECIPES["declip"].views.replace(masked_image=2),
)


def step_config(method: str) -> ConfigDict:
  """The tiny config of METHOD, METHOD_repo, or EVERYTHING: all terms at once.

  For "... resnet" it has a ResNet, and for "... siglip" towers like SigLIP's.

  A ResNet hides no patches, so everything is then all terms except masked image modelling.
  """
  resnet, siglip = method.endswith(" resnet"), method.endswith(" siglip")
  name = method.removesuffix(" resnet").removesuffix(" siglip")
  config = tiny_config(name.replace("everything", "defilip"))
  if name.startswith("everything"):
    for term, field in config.objective.items():
      views = {*TERMS[term].views} - {"pair"}
      if views <= {*_EVERYTHING.views} - ({"masked_image"} if resnet else set()):
        field.weight = field.weight or 0.1
    config.data.recipe = "everything"
  if resnet:
    config.optimizer.frozen = ()
    config.model.image = architectures.resnet(4, (1, 1, 1, 1))
    config.model.image.norm_groups = 2
    config.model.heads.image_bias = True
    config.data.image_size = 64
  if siglip:
    config.model.image.update(architectures.SIGLIP)
    config.model.text.update({"causal": False, "pooling": "last", "activation": "gelu_tanh", "epsilon": 1e-6})
    config.model.heads.update({"image_linear": False, "embed_dim": config.model.image.width})
    config.data.image_size = 20  # of which patches of 8 pixels see 16
  config.model.heads.bank_size = BATCH
  config.optimizer.warmup_start = 0.0
  if name.startswith("everything"):
    config.optimizer.logit_scale_range = (3.0, 6.0)  # the scales start below it
    config.optimizer.epsilon = 1e-3  # so that Adam does not turn rounding errors into large steps
  return config


def build_steps(config: ConfigDict, data: int = 1, fsdp: int = 1) -> build.Built:
  """The objects of a config, on a mesh of the first devices."""
  config.mesh.update({"data": data, "fsdp": fsdp})
  with mock.patch.dict(RECIPES, {"everything": _EVERYTHING}):
    return build.build(config, jax.devices()[: data * fsdp])


@functools.cache
def first_state(method: str) -> State:
  """The state before the first step as NumPy arrays, compiled once for all meshes.

  The neighbour bank counts as full, so that the first step has all terms.
  """
  built = build_steps(step_config(method))
  init = functools.partial(init_state, 0, model=built.model, optimizer=_chain(built.optimizer))
  zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in built.batch_shape(BATCH).items()}
  state = jax.tree.map(np.asarray, jax.jit(init)(zeros))
  if bank := state.collections["heads"].get("bank"):
    bank["text"] = bank["text"]._replace(filled=np.int32(BATCH))
  return state


def take_steps(method: str, data: int, fsdp: int, **settings: object) -> dict[str, np.ndarray]:
  """Takes `STEPS` steps of `step_config(method)` on a mesh, with `settings` as further fields of the config.

  The examples, noise with captions of any tokens, are the same in the same order whatever the mesh.

  Returns:
    By name: metrics of each step, parameters and collections after the last, and the gradient of the first.
  """
  config = step_config(method)
  config.update(settings)
  built = build_steps(config, data, fsdp)
  mesh, built = built.mesh, built._replace(optimizer=_chain(built.optimizer))
  abstract = abstract_state(built.batch_shape(BATCH), mesh, model=built.model, optimizer=built.optimizer)
  state = jax.tree.map(
    lambda x, like: jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index]),
    first_state(method),
    abstract,
  )
  step = make_step(config, built, build.to_steps(config, 256), abstract)
  result, rng = {}, np.random.default_rng(0)
  for index in range(STEPS):
    batch = trim(built, random_batch(built, rng))
    batch = {name: local_rows(x) for name, x in batch.items()}
    state, metrics = step(state, to_global(batch, batch_sharding(mesh)))
    result |= {f"{name}/{index}": value for name, value in metrics.items()}
  tree = {"params": state.params, "collections": state.collections, "gradient": state.opt_state[0].gradient}
  if jax.process_count() > 1:  # no process has all of it
    tree = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
  return _flatten(result, jax.tree.map(np.asarray, tree))


def take_gradient(method: str, data: int, fsdp: int, micro_batches: int = 1) -> dict[str, np.ndarray]:
  """The metrics and the gradient of the first step of `take_steps`, by the same names, without the rest of the step."""
  config = step_config(method)
  built = build_steps(config, data, fsdp)
  mesh, state = built.mesh, first_state(method)
  gradient = make_gradient(
    "cached",
    micro_batches,
    model=built.model,
    objective=built.objective,
    frozen=config.optimizer.frozen,
    gather=functools.partial(gather, mesh=mesh, dtype=jnp.float32),
  )
  params, collections = (jax.device_put(x, shard_like(x, mesh)) for x in (state.params, state.collections))
  batch = to_global(random_batch(built, np.random.default_rng(0)), batch_sharding(mesh))
  result, gradients = jax.jit(gradient, out_shardings=(None, shard_like(params, mesh)))(params, collections, batch, 0)
  return _flatten({f"{name}/0": value for name, value in result.metrics.items()}, {"gradient": gradients})


def _flatten(metrics: Mapping[str, Any], tree: dict[str, Any]) -> dict[str, np.ndarray]:
  flat = flatten_dict(tree, sep="/")
  bank = flat.pop("collections/heads/bank/text", None)
  if bank is not None:
    flat |= {f"bank/{name}": value for name, value in bank._asdict().items()}
  return {name: np.asarray(value) for name, value in {**metrics, **flat}.items()}


@functools.cache
def one_device(method: str) -> dict[str, np.ndarray]:
  """`take_steps` on one device, the reference for the others."""
  return take_steps(method, 1, 1)


def _chain(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  return optax.chain(keep_first_gradient(), optimizer)


def compare(method: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
  """Asserts that two results differ by at most 1e-5, except where the loss is constant.

  Gradients differ by at most 1e-5 of their largest entry; by 2e-5 in a ResNet, with its chain of sums over the batch.
  """
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    ours = found[name]
    if name.endswith("qkv/bias"):
      ours, value = (np.delete(np.stack(np.split(x, 3, axis=-1)), 1, axis=0) for x in (ours, value))
    if not has_zero_gradient(method, name) and not name.startswith("skipped"):
      largest = np.abs(value).max()
      of_largest = largest * (2 if method.endswith(" resnet") else 1)
      scale = 1e-5 * (of_largest if name.startswith("gradient/") else max(1, largest))
      np.testing.assert_allclose(ours, value, rtol=0, atol=scale, err_msg=f"{method}: {name}")


def has_zero_gradient(method: str, name: str) -> bool:
  """Whether the loss does not depend on a parameter, so that its exact gradient is zero.

  That is the case for a bias before a batch norm, and for that of SimSiam's projections, whose prediction starts with a
  linear layer and a batch norm. Adam turns the rounding noise of their gradients into steps of full size, and the
  running means of these heads follow them. (`compare` drops the bias of the keys, which cancels in the softmax.)
  """
  part = name.split("/")[-2:]
  head = any(
    f"/{head}/" in name for head in ("simclr", "projector", "predictor", "momentum_project", "momentum_predict")
  )
  last = "predictor/linear1" in name or "simclr/linear2" in name
  if method == "simclr" and name.endswith("image/post_norm/bias"):  # before the head
    return True
  if name.endswith("attention_pool/key/bias"):  # before a softmax
    return True
  in_front = head and part[0].startswith("linear") and part[1] == "bias" and not last
  follows = name.endswith("/mean") and any(f"/{head}/" in name for head in ("simclr", "projector", "predictor"))
  return in_front or follows or name.endswith("projector/norm2/bias")


def random_batch(built: build.Built, rng: np.random.Generator) -> dict[str, np.ndarray]:
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in built.batch_shape(BATCH).items()}
  batch["image"] = rng.integers(256, size=batch["image"].shape, dtype=np.uint8)
  if "text" in batch:
    batch["text"] = rng.integers(1, 1000, size=batch["text"].shape).astype(np.int32)
    ends = rng.integers(3, LONGEST, size=batch["text"].shape[:-1])
    np.put_along_axis(batch["text"], ends[..., None], built.tokenizer.eot, axis=-1)
  if "mlm_position" in batch:
    batch["mlm_position"] = rng.integers(1, 3, size=batch["mlm_position"].shape).astype(np.int32)
    batch["mlm_target"] = rng.integers(1, 1000, size=batch["mlm_target"].shape).astype(np.int32)
    batch["mlm_weight"] = rng.integers(2, size=batch["mlm_weight"].shape).astype(np.float32)
  if "label" in batch:
    batch["label"] = rng.integers(70, size=BATCH).astype(np.int32)
  if "mim_position" in batch:  # of a grid of 2 x 2
    batch["mim_position"] = rng.permuted(np.tile(np.arange(4, dtype=np.int32), (BATCH, 1)), axis=1)[:, :2]
  return batch


def trim(built: build.Built, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The global batch as training trims it."""
  if len(built.text_lengths) < 2:
    return batch
  needed = trimming.needed_length(batch, built.tokenizer.eot)
  return {**batch, "text": batch["text"][..., : trimming.trimmed_length(built.text_lengths, needed)]}


def local_rows(x: np.ndarray) -> np.ndarray:
  return np.split(x, jax.process_count())[jax.process_index()]


def main(out: str, port: str, process: str, *methods: str) -> None:
  jax.config.update("jax_default_matmul_precision", "highest")
  jax.distributed.initialize(f"localhost:{port}", 2, int(process))
  sharding.MIN_SIZE = 256
  results = {f"{method}:{name}": value for method in methods for name, value in take_steps(method, 2, 1).items()}
  if process == "0":
    np.savez(Path(out), **results)


if __name__ == "__main__":
  main(*sys.argv[1:])

"""A few steps of a method on any mesh, without a trainer around them: python tests/steps.py OUT PORT PROCESS METHOD...

As a command it is one of two processes of one device each that take these steps together; the first writes to OUT.
"""

from pathlib import Path
import sys
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny import tiny_config

from declip_jax import architectures, build, sharding
from declip_jax.build import make_step
from declip_jax.sharding import batch_sharding, replicated, to_global
from declip_jax.training.state import abstract_state, create_state

STEPS, BATCH = 3, 16


class SecondGradient(NamedTuple):
  count: jax.Array
  gradient: Any


def keep_second_gradient() -> optax.GradientTransformation:
  """Changes no update: its state is the gradient of the second step."""

  def update(gradient: Any, state: SecondGradient, params: Any = None) -> tuple[Any, SecondGradient]:
    del params
    kept = jax.tree.map(lambda new, old: jnp.where(state.count == 1, new, old), gradient, state.gradient)
    return gradient, SecondGradient(state.count + 1, kept)

  return optax.GradientTransformation(
    lambda params: SecondGradient(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)), update
  )


def take_steps(method: str, data: int, fsdp: int, **settings: object) -> dict[str, np.ndarray]:
  """Metrics of each step of METHOD or "METHOD resnet", parameters and collections behind the last, and the gradient of
  the second, by path.

  The neighbour bank is full after the first step, whose learning rate is 0: the second has the same parameters whatever
  the mesh, and all terms. `settings` are fields of the config.
  The examples, noise with captions of any tokens, are the same in the same order whatever the mesh.
  """
  config = tiny_config(method.removesuffix(" resnet"))
  if method.endswith(" resnet"):
    config.model.image = architectures.resnet(4, (1, 1, 1, 1))
    config.model.image.norm_groups = 2
    config.model.heads.image_bias = True
    config.data.image_size = 64
  config.model.heads.bank_size = BATCH
  config.optimizer.warmup_start = 0.0
  config.log_every = 1
  config.update(settings)
  config.mesh.update({"data": data, "fsdp": fsdp})
  built = build.build(config, jax.devices()[: data * fsdp])
  mesh = built.mesh
  built = built._replace(optimizer=optax.chain(keep_second_gradient(), built.optimizer))
  model = {"model": built.model, "optimizer": built.optimizer}
  shapes = built.batch_shape(BATCH)
  abstract = abstract_state(shapes, mesh, **model)
  state = create_state(0, shapes, abstract, **model)
  step = make_step(config, built, build.to_steps(config, 256), abstract)
  result, rng = {}, np.random.default_rng(0)
  for index in range(STEPS):
    batch = {name: local_rows(x) for name, x in random_batch(built, rng).items()}
    state, metrics = step(state, to_global(batch, batch_sharding(mesh)))
    result |= {f"{name}/{index}": value for name, value in metrics.items()}
  assert result["lr/0"] == 0
  whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))
  tree = {"params": state.params, "collections": state.collections, "gradient": state.opt_state[0].gradient}
  tree = jax.tree.map(np.asarray, whole(tree))
  collections = tree["collections"]
  flat = {path: value for path, value in flatten_dict(tree, sep="/").items() if not path.endswith("bank/text")}
  if bank := collections["heads"].get("bank"):
    flat |= {f"bank/{name}": value for name, value in bank["text"]._asdict().items()}
  return {name: np.asarray(value) for name, value in {**result, **flat}.items()}


def compare(method: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
  """Two results of `take_steps` are equal to 1e-5 in what the loss can see.

  A gradient is so to 1e-5 of its largest entry; to 2e-5 in a ResNet, whose sums over a batch stand behind one another.
  """
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    ours = found[name]
    if name.endswith("qkv/bias"):
      ours, value = (np.delete(np.stack(np.split(x, 3, axis=-1)), 1, axis=0) for x in (ours, value))
    if not blind(method, name) and not name.startswith("skipped"):
      largest = np.abs(value).max()
      of_gradient = largest * (2 if method.endswith(" resnet") else 1)
      scale = 1e-5 * (of_gradient if name.startswith("gradient/") else max(1, largest))
      np.testing.assert_allclose(ours, value, rtol=0, atol=scale, err_msg=f"{method}: {name}")


def blind(method: str, name: str) -> bool:
  """Whether the loss cannot see a parameter, so that its exact gradient is zero.

  So it is with a bias in front of a batch norm, and that of SimSiam's projections, whose prediction starts with a
  linear layer and a batch norm. Adam turns the rounding noise of their gradients into steps of full size, and the
  running means of these heads follow them. (The bias of the keys, which softmax does not see, is taken out by
  `compare`.)
  """
  part = name.split("/")[-2:]
  head = any(
    f"/{head}/" in name for head in ("simclr", "projector", "predictor", "momentum_project", "momentum_predict")
  )
  last = "predictor/linear1" in name or "simclr/linear2" in name
  if method == "simclr" and name.endswith("image/post_norm/bias"):  # in front of the head
    return True
  if name.endswith("attention_pool/key/bias"):  # in front of a softmax
    return True
  in_front = head and part[0].startswith("linear") and part[1] == "bias" and not last
  follows = name.endswith("/mean") and any(f"/{head}/" in name for head in ("simclr", "projector", "predictor"))
  return in_front or follows or name.endswith("projector/norm2/bias")


def random_batch(built: build.Built, rng: np.random.Generator) -> dict[str, np.ndarray]:
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in built.batch_shape(BATCH).items()}
  batch["image"] = rng.integers(256, size=batch["image"].shape, dtype=np.uint8)
  if "text" in batch:
    batch["text"] = rng.integers(1, 1000, size=batch["text"].shape).astype(np.int32)
    ends = rng.integers(3, batch["text"].shape[-1], size=batch["text"].shape[:-1])
    np.put_along_axis(batch["text"], ends[..., None], built.tokenizer.eot, axis=-1)
  if "mlm_position" in batch:
    batch["mlm_position"] = rng.integers(1, 3, size=batch["mlm_position"].shape).astype(np.int32)
    batch["mlm_target"] = rng.integers(1, 1000, size=batch["mlm_target"].shape).astype(np.int32)
    batch["mlm_weight"] = rng.integers(2, size=batch["mlm_weight"].shape).astype(np.float32)
  if "mim_position" in batch:  # of a grid of 2 x 2
    batch["mim_position"] = rng.permuted(np.tile(np.arange(4, dtype=np.int32), (BATCH, 1)), axis=1)[:, :2]
  return batch


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

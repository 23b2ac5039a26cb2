"""Tests of `declip_jax.planning.flops`: small functions and whole steps, against figures worked out by hand."""

import itertools
from typing import Any

import jax
from jax.experimental.roofline import roofline
import jax.numpy as jnp
import pytest
from tiny import tiny_config

from declip_jax import build
from declip_jax.build import make_step
from declip_jax.planning import flops
from declip_jax.planning.report import Report
from declip_jax.sharding import make_mesh
from declip_jax.training.state import abstract_state
from declip_jax.types import Batch


def counted(function, *shapes):
  return flops.num_flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def test_a_product_costs_two_for_each_multiplication():
  assert counted(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  assert counted(lambda x, y: jnp.einsum("bnhe,bmhe->bhnm", x, y), (2, 3, 4, 5), (2, 6, 4, 5)) == 2 * 2 * 3 * 4 * 5 * 6
  assert counted(lambda x: jnp.exp(x) + x.sum(), (3, 5)) == 0


def test_gradients_and_nested_functions_count():
  inner = jax.jit(lambda x, y: jnp.matmul(x, y))
  assert counted(jax.grad(lambda x, y: inner(x, y).sum(), argnums=(0, 1)), (3, 5), (5, 7)) == 2 * 2 * 3 * 5 * 7
  squared = jax.grad(lambda x, y: (inner(x, y) ** 2).sum(), argnums=(0, 1))
  assert counted(squared, (3, 5), (5, 7)) == 3 * 2 * 3 * 5 * 7
  assert counted(jax.grad(lambda x, y: (inner(x, y) ** 2).sum()), (3, 5), (5, 7)) == 2 * 2 * 3 * 5 * 7


def test_dead_code_does_not_count():
  assert counted(lambda x, y: (x @ y, x)[1], (3, 5), (5, 7)) == 0


def test_a_scan_counts_every_iteration_where_xla_counts_one():
  def power(x, y):
    return jax.lax.scan(lambda x, _: (x @ y, None), x, length=6)[0]

  assert counted(power, (3, 5), (5, 5)) == 6 * 2 * 3 * 5 * 5
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 5), (5, 5))]
  assert jax.jit(power).lower(*shapes).cost_analysis()["flops"] < 2 * 2 * 3 * 5 * 5


def test_a_rematerialised_backward_pass_counts_recomputation():
  def cost(wrap):
    def loss(x, y):
      return wrap(lambda x: jnp.sin(jnp.sin(x @ y) @ y))(x).sum()

    return counted(jax.value_and_grad(loss, argnums=(0, 1)), (3, 5), (5, 5))

  product = 2 * 3 * 5 * 5
  assert cost(lambda f: f) == (2 + 2 * 2) * product
  assert cost(jax.checkpoint) == (2 + 2 + 2 * 2) * product


def test_a_scan_of_rematerialised_blocks_does_not_recompute_their_last_product():
  def loss(x, y):
    block = jax.checkpoint(lambda x, _: (jnp.sin(x @ y) @ y, None), prevent_cse=False)
    return jax.lax.scan(block, x, length=4)[0].sum()

  assert counted(jax.value_and_grad(loss, argnums=(0, 1)), (3, 5), (5, 5)) == 4 * (2 + 1 + 2 * 2) * 2 * 3 * 5 * 5


def test_a_shard_map_counts_every_device():
  rows = jax.sharding.PartitionSpec("data")
  each = jax.shard_map(lambda x, y: x @ y, mesh=make_mesh(8, 1), in_specs=(rows, None), out_specs=rows)
  assert counted(each, (16, 5), (5, 7)) == counted(jnp.matmul, (16, 5), (5, 7))


def test_a_conditional_counts_its_cheapest_branch():
  def maybe(x, y):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: jnp.zeros((3, 7)))

  def switched(x, y):
    branches = [lambda n=n: (x[:n] @ y).sum() for n in (3, 2)]
    return jax.lax.switch(jnp.int32(x[0, 0]), branches)

  assert counted(maybe, (3, 5), (5, 7)) == 0
  assert counted(switched, (3, 5), (5, 7)) == 2 * 2 * 5 * 7


def test_products_in_a_while_loop_are_rejected():
  def until(x, y):
    return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ y, x)

  with pytest.raises(ValueError, match="while loop"):
    counted(until, (3, 5), (5, 5))
  assert counted(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x - 1, x), (3, 5)) == 0


def by_hand(image, kernel, stride, padding, dilation, groups):
  """FLOPs of a convolution `[b h w c] * [h w c o]`, multiplication by multiplication."""
  side = (image[1] + sum(padding) - dilation * (kernel[0] - 1) - 1) // stride + 1
  met = 0
  for y, x, i, j in itertools.product(range(side), range(side), range(kernel[0]), range(kernel[1])):
    row, column = (stride * out + dilation * tap - padding[0] for out, tap in ((y, i), (x, j)))
    met += 0 <= row < image[1] and 0 <= column < image[2]
  return 2 * met * image[0] * kernel[3] * image[3] // groups


@pytest.mark.parametrize(
  ("stride", "padding", "dilation", "groups"),
  [(1, (0, 0), 1, 1), (1, (1, 1), 1, 1), (2, (1, 1), 1, 1), (2, (0, 1), 1, 2), (1, (2, 2), 2, 3)],
)
def test_a_convolution_and_its_gradients_count_neither_padding_nor_holes(stride, padding, dilation, groups):
  image, kernel = (2, 8, 8, 6), (3, 3, 6 // groups, 12)

  def convolve(x, y):
    return jax.lax.conv_general_dilated(
      x,
      y,
      (stride, stride),
      (padding, padding),
      rhs_dilation=(dilation, dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  want = by_hand(image, kernel, stride, padding, dilation, groups)
  assert counted(convolve, image, kernel) == want
  # The gradient of each argument sums the same products.
  for side in (0, 1):
    assert counted(jax.grad(lambda x, y: convolve(x, y).sum(), argnums=side), image, kernel) == want


# Of 4 or 64 patches, all or half enter the transformer, after the class token; and all 16 or 8 positions of a text.
@pytest.mark.parametrize(
  ("size", "dropout", "tokens", "text_length"), [(16, 0.0, 5, 0), (16, 0.0, 5, 8), (64, 0.0, 65, 0), (64, 0.5, 33, 0)]
)
def test_a_clip_step_costs_as_much_as_its_layers(size: int, dropout: float, tokens: int, text_length: int):
  config = tiny_config("clip", image_size=size)
  config.model.patch_dropout = dropout

  def blocks(tokens, width):  # query, key, value and output; weights and values; the two layers of the perceptron
    return 2 * tokens * (4 * width**2 + 2 * tokens * width + 2 * 4 * width**2)

  patches, pairs = (size // 8) ** 2 * (8 * 8 * 3) * 32, config.batch_size * 16
  towers = blocks(tokens, 32) + 32 * 16 + blocks(text_length or 16, 16) + 16 * 16
  # Backward is twice forward, except that pixels have no gradient. All pairs are compared once, or once per direction.
  least, most = (2 * config.batch_size * (2 * patches + 3 * (towers + times * pairs)) for times in (1, 2))
  found = flops.step_flops(build.build(config), config.batch_size, text_length=text_length)
  assert least <= found < 1.001 * most < 1.005 * least


@pytest.mark.slow
def test_step_flops_exclude_recomputation(report: Report):
  config = tiny_config("clip")
  assert config.model.remat != "full"
  config.model.remat = "full"
  assert flops.step_flops(build.build(config), config.batch_size) == report.model_flops


@pytest.mark.slow
def test_step_flops_exclude_frozen_parameters(report: Report):
  config = tiny_config("clip")
  config.optimizer.frozen = ("towers/image",)
  frozen = flops.step_flops(build.build(config), config.batch_size)
  assert frozen < 0.8 * report.model_flops


@pytest.mark.slow
def test_a_whole_step_costs_the_model_plus_recomputation():
  config = tiny_config("clip")
  config.log_every = 0

  def model_and_step_flops(remat: str) -> tuple[float, float]:
    config.model.remat = remat
    built = build.build(config)
    shapes = built.batch_shape(config.batch_size)
    abstract = abstract_state(shapes, built.mesh, model=built.model, optimizer=built.optimizer)
    step = make_step(config, built, build.to_steps(config, 256), abstract)
    return flops.step_flops(built, config.batch_size), flops.num_flops(step.trace(abstract, shapes).jaxpr)

  model, step = model_and_step_flops("none")
  assert model <= step < 1.001 * model  # metrics have small products
  same, with_recomputation = model_and_step_flops("full")
  assert same == model
  assert with_recomputation > 1.1 * model


@pytest.mark.slow
def test_jax_roofline_counts_the_same_flops_except_in_loops(monkeypatch: pytest.MonkeyPatch):
  """`jax.experimental.roofline` counts the body of a scan over the layers once, and no branches."""
  monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
  config = tiny_config("clip")
  config.model.remat = "none"

  def ours_and_roofline(depth: int) -> tuple[float, float]:
    config.model.image.depth = config.model.text.depth = depth
    built = build.build(config)
    batch = built.batch_shape(config.batch_size)
    params, collections = jax.eval_shape(built.model.init, jax.random.key(0), batch)

    def loss(params: Any, collections: Any, batch: Batch) -> jax.Array:
      features, _ = built.model.encode(params, collections, batch)
      outputs, _ = built.model.apply_heads(params, collections, features)
      return built.objective(outputs, batch, jnp.zeros((), jnp.int32))[0]

    gradient = jax.grad(loss)
    _, found = roofline(gradient)(params, collections, batch)
    return flops.num_flops(jax.make_jaxpr(gradient)(params, collections, batch)), found.flops

  ours, theirs = ours_and_roofline(depth=1)
  assert ours == theirs
  assert ours_and_roofline(depth=2) == (pytest.approx(1.87 * ours, rel=0.01), theirs)


def test_without_remat_keeps_the_value_and_recomputes_nothing():
  def loss(x, y):
    block = jax.checkpoint(lambda x, _: (jnp.sin(jnp.sin(x @ y) @ y), None), prevent_cse=False)
    return jax.jit(lambda x: jax.lax.scan(block, x, length=4)[0])(x).sum()

  x, y = (jax.random.normal(jax.random.key(0), shape) for shape in ((3, 5), (5, 5)))
  for function in (lambda f: f, jax.grad):
    assert jnp.allclose(function(loss)(x, y), function(flops.without_remat(loss))(x, y), rtol=1e-4)
  cost = counted(jax.grad(flops.without_remat(loss), argnums=(0, 1)), (3, 5), (5, 5))
  assert cost == 4 * (2 + 2 * 2) * 2 * 3 * 5 * 5 < counted(jax.grad(loss, argnums=(0, 1)), (3, 5), (5, 5))

"""Every implementation of attention on this backend against plain loops, and the choice between them."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh
import numpy as np
import pytest
from tiny import tiny_config

from declip_jax import build
from declip_jax.evals.encoders import make_encode_functions
from declip_jax.models import attention, attention_kernel
from declip_jax.models.attention import attend
from declip_jax.planning import compile as compile_step
from declip_jax.sharding import make_mesh, traced_over


def loops(query: np.ndarray, key: np.ndarray, value: np.ndarray, causal: bool, lengths=None) -> np.ndarray:
  """The definition, in float64."""
  lengths = [key.shape[1]] * len(key) if lengths is None else lengths
  out = np.zeros(query.shape)
  for b, n, h in np.ndindex(*query.shape[:3]):
    seen = range(n + 1) if causal else range(lengths[b])
    scores = np.array([query[b, n, h] @ key[b, m, h] for m in seen]) / query.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max())
    out[b, n, h] = sum(weight * value[b, m, h] for weight, m in zip(weights / weights.sum(), seen, strict=True))
  return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_equals_plain_loops(dtype: jnp.dtype, tolerance: float, causal: bool) -> None:
  rng = np.random.default_rng(0)
  query, key, value = (jnp.asarray(rng.normal(size=(2, 9, 2, 8)), dtype) for _ in range(3))
  expected = loops(*(np.asarray(x, np.float64) for x in (query, key, value)), causal)
  found = jax.jit(attend, static_argnames="causal")(query, key, value, causal=causal)
  assert found.dtype == dtype
  np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)


def test_keys_past_a_sequences_length_have_no_effect() -> None:
  rng = np.random.default_rng(1)
  query, key, value = (jnp.asarray(rng.normal(size=(3, 7, 2, 8)), jnp.float32) for _ in range(3))
  lengths = np.array([1, 4, 7], np.int32)
  found = jax.jit(attend)(query, key, value, lengths=lengths)
  expected = loops(*(np.asarray(x, np.float64) for x in (query, key, value)), False, lengths)
  np.testing.assert_allclose(found, expected, atol=1e-5)


# Of the kernel: tokens, heads, width of a head, and masks. 64: two heads in a tile of 128 lanes; 80: heads across two
# tiles; 24: less than a tile.
KERNEL_CASES = {
  "images": (50, 4, 64, {}),
  "heads across tiles": (20, 8, 80, {}),
  "narrow": (9, 3, 8, {}),
  "causal": (20, 2, 64, {}),
  "lengths": (9, 2, 64, {"lengths": np.array([1, 4, 9, 2, 6], np.int32)}),
  "visible": (9, 2, 64, {"visible": np.arange(45).reshape(5, 9) % 3 != 1}),
  "lengths of visible": (
    9,
    2,
    8,
    {"lengths": np.array([3, 4, 9, 9, 5], np.int32), "visible": np.arange(45).reshape(5, 9) > 1},
  ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_the_kernel_equals_plain_attention_in_value_and_gradient(
  dtype: jnp.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(attention_kernel, "_BLOCK_BYTES", 2**16)  # several programs; the last of them is not full

  @partial(jax.jit, static_argnums=0)
  def run(implementation: str, inputs: dict[str, tuple[jax.Array, ...]]) -> dict[str, tuple[jax.Array, ...]]:
    results = {}
    for name, (*arrays, gradient) in inputs.items():
      masks = {mask: jnp.asarray(x) for mask, x in KERNEL_CASES[name][3].items()}
      function = partial(attend, **masks, causal=name == "causal", implementation=implementation)
      attended, backward = jax.vjp(function, *arrays)
      results[name] = (attended, *backward(gradient))
    return results

  inputs = {}
  for seed, (name, (tokens, heads, width, _)) in enumerate(KERNEL_CASES.items()):
    inputs[name] = tuple(jax.random.normal(jax.random.key(seed), (4, 5, tokens, heads, width), dtype))
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
  found, expected = run("pallas", inputs), run("xla", exact)
  for name in KERNEL_CASES:
    for ours, plain in zip(found[name], expected[name], strict=True):
      assert ours.dtype == dtype
      atol = tolerance * max(1.0, float(jnp.abs(plain).max()))
      np.testing.assert_allclose(ours.astype(jnp.float32), plain, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", KERNEL_CASES)
@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_the_kernel_is_lowered_for_a_tpu(name: str, precision: str) -> None:
  """Its instructions are checked without a TPU; libtpu would compile them."""
  tokens, heads, width, masks = KERNEL_CASES[name]
  tpu = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
  mesh = AbstractMesh((4, 2), ("data", "fsdp"), (AxisType.Auto,) * 2, abstract_device=tpu)

  @jax.jit
  def gradient(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    with use_abstract_mesh(mesh), jax.default_matmul_precision(precision):
      own = {mask: jnp.asarray(x).repeat(16, axis=0)[:16] for mask, x in masks.items()}
      attended, backward = jax.vjp(partial(attend, **own, causal=name == "causal"), *arrays)
      return backward(attended)

  shape = jax.ShapeDtypeStruct((16, tokens, heads, width), jnp.bfloat16)
  lowered = gradient.trace(shape, shape, shape).lower(lowering_platforms=("tpu",)).as_text()
  assert lowered.count("@tpu_custom_call") == 2


def test_the_kernel_runs_on_each_devices_rows() -> None:
  mesh = make_mesh(4, 2)
  rows = jax.random.normal(jax.random.key(0), (3, 16, 9, 2, 8))
  lengths = jnp.arange(16) % 9 + 1

  def loss(implementation: str, rows: jax.Array) -> jax.Array:
    attend_ = partial(attend, lengths=lengths, implementation=implementation)
    return (jax.checkpoint(attend_)(*rows) ** 2).sum()

  expected = jax.jit(jax.grad(partial(loss, "xla")))(rows)
  split = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
  gradient = jax.jit(traced_over(mesh, jax.grad(partial(loss, "pallas"))))
  found = gradient(jax.device_put(rows, split))
  assert "all-gather" not in gradient.lower(jax.device_put(rows, split)).compile().as_text()
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
  ("backend", "capability", "dtype", "tokens", "keys", "head_width", "expected"),
  [
    ("gpu", "9.0", jnp.bfloat16, 50, 50, 64, "cudnn"),
    ("gpu", "9.0", jnp.bfloat16, 1, 50, 64, "cudnn"),
    ("gpu", "9.0", jnp.float32, 50, 50, 64, "xla"),  # flash attention has no float32
    ("gpu", "9.0", jnp.bfloat16, 50, 50, 20, "xla"),
    ("gpu", "9.0", jnp.bfloat16, 50, 50, 256, "xla"),
    ("gpu", "7.5", jnp.bfloat16, 50, 50, 64, "xla"),
    ("gpu", "gfx90a", jnp.bfloat16, 50, 50, 64, "xla"),
    ("tpu", "", jnp.bfloat16, 197, 197, 64, "pallas"),
    ("tpu", "", jnp.float32, 197, 197, 64, "xla"),
    ("tpu", "", jnp.bfloat16, 1, 50, 64, "xla"),  # the pooling of a ResNet
    ("tpu", "", jnp.bfloat16, 577, 577, 64, "pallas"),
    ("tpu", "", jnp.bfloat16, 1025, 1025, 64, "xla"),
    ("tpu", "", jnp.bfloat16, 577, 577, 80, "xla"),  # 17 MiB on the chip, by libtpu
    ("cpu", "", jnp.bfloat16, 50, 50, 64, "xla"),
  ],
)
def test_choice(
  backend: str,
  capability: str,
  dtype: jnp.dtype,
  tokens: int,
  keys: int,
  head_width: int,
  expected: str,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  query, key = (jnp.zeros((2, count, 16, head_width), dtype) for count in (tokens, keys))
  assert attention._fastest(query, key) == expected
  monkeypatch.setattr(jax, "device_count", lambda: 4)  # of which some may have a part of the batch
  assert attention._fastest(query, key) == ("xla" if expected == "pallas" else expected)


def test_the_kernel_needs_the_keys_of_its_queries() -> None:
  query, key = jnp.zeros((2, 1, 2, 8)), jnp.zeros((2, 9, 2, 8))
  with pytest.raises(ValueError, match=r"queries \(2, 1, 2, 8\) and keys \(2, 9, 2, 8\)"):
    attend(query, key, key, implementation="pallas")


def test_steps_and_evaluations_know_their_mesh() -> None:
  """Otherwise kernels would not be split over devices."""
  c = tiny_config("clip")
  c.model.attention = "pallas"
  built = build.build(c)
  state = compile_step.state_shapes(c, built)
  step = build.make_step(c, built, build.to_steps(c, 256), state)
  batch = built.batch_shape(c.batch_size)
  assert "shard_map" in str(step.trace(state, batch).jaxpr)
  functions = make_encode_functions(built.model, built.mesh, tokens=False)
  variables = state.params, state.collections
  image, text = batch["image"], batch["text"]
  image = jax.ShapeDtypeStruct((image.shape[0], *image.shape[2:]), image.dtype)
  text = jax.ShapeDtypeStruct((text.shape[0], text.shape[2]), text.dtype)
  assert "shard_map" in str(functions.image.trace(*variables, image).jaxpr)
  assert "shard_map" in str(functions.text.trace(*variables, text).jaxpr)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's flash attention needs a GPU")
@pytest.mark.parametrize(
  ("queries", "keys", "causal", "lengths"),
  [
    (77, 77, True, None),
    (50, 50, False, None),
    (257, 257, False, None),
    (1, 50, False, None),
    (77, 77, False, (2, 40)),
    (77, 77, False, (1, 77)),
  ],
)
def test_flash_attention_equals_plain_attention(
  queries: int, keys: int, causal: bool, lengths: tuple[int, int] | None
) -> None:
  sizes = enumerate((queries, keys, keys))
  query, key, value = (jax.random.normal(jax.random.key(i), (2, n, 8, 64), jnp.bfloat16) for i, n in sizes)
  options = {"is_causal": causal}
  if lengths:
    options["key_value_seq_lengths"] = jnp.asarray(lengths, jnp.int32)

  def step(implementation: str) -> tuple:
    def loss(query, key, value):
      out = jax.nn.dot_product_attention(query, key, value, **options, implementation=implementation)
      return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)

  ((_, flash), flash_gradient), ((_, plain), plain_gradient) = step("cudnn"), step("xla")
  np.testing.assert_allclose(np.asarray(flash, np.float32), np.asarray(plain, np.float32), atol=2e-2)
  for ours, theirs in zip(flash_gradient, plain_gradient, strict=True):
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=5e-2)

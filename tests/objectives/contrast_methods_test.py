"""Every term that compares all pairs of a batch: the same value, metrics and gradient by each method on any mesh."""

import functools
import inspect
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest
import references as reference
from tiers import slow_except

from declip_jax.objectives import TERMS, blockwise
from declip_jax.objectives.blockwise import PLAIN, Method
from declip_jax.sharding import make_mesh
from declip_jax.types import Outputs

COUNT, DIM = 16, 6
FILIP = sys.modules[TERMS["filip"].loss.__module__]  # the package has a function of this name
METHODS = {
  "chunked on 8": lambda: Method("chunked", make_mesh(8, 1), 4),
  "chunked on 2 x 4": lambda: Method("chunked", make_mesh(2, 4), 8),
  "chunked on 1": lambda: Method("chunked", make_mesh(1, 1, jax.devices()[:1]), 2),
  "ring on 8": lambda: Method("ring", make_mesh(8, 1)),
  "ring on 4 x 2": lambda: Method("ring", make_mesh(4, 2), 1),
  "ring on 1": lambda: Method("ring", make_mesh(1, 1, jax.devices()[:1])),
  "plain on 8": lambda: Method("plain", make_mesh(8, 1)),
  "auto chunked": lambda: Method("auto", make_mesh(8, 1)),
  "auto ring": lambda: Method("auto", make_mesh(2, 4)),
}
FAST = ("ring on 4 x 2",)  # `blockwise_test.py` has all of them for the sums that terms consist of
# Terms with their options, and the axis of the batch of the fields that they read.
PAIRS = {"image": 1, "text": 1}
CASES = {
  "clip": ({"clip": {}}, PAIRS),
  "clip, constant candidates": ({"clip": {"full_gradient": False, "label_smoothing": 0.1}}, PAIRS),
  "clip + mvs": ({"clip": {}, "mvs": {"label_smoothing": 0.2}}, PAIRS),
  "mvs, constant candidates": ({"clip": {}, "mvs": {"full_gradient": False}}, PAIRS),
  "sigmoid": ({"sigmoid": {}}, PAIRS),
  "filip": ({"filip": {}}, {"image_tokens": 0, "text_tokens": 0}),
  "filip, selected": ({"filip": {"top_k": 2}}, {"image_tokens": 0, "text_tokens": 0}),
  "simclr": ({"simclr": {}}, {"simclr": 1}),
  "moco": ({"moco": {}}, {"momentum_prediction": 1}),
  "nns": ({"nns": {"label_smoothing": 0.1}}, {"image": 1}),
  "nns, one way": ({"nns": {"symmetric": False}}, {"image": 1}),
}


def test_the_terms_of_these_tests_compare_pairs() -> None:
  pairwise = {name for name, term in TERMS.items() if "method" in inspect.signature(term.loss).parameters}
  assert pairwise >= {name for options, _ in CASES.values() for name in options}


@functools.cache
def outputs() -> Outputs:
  rng = np.random.default_rng(0)

  def rows(*leading: int) -> np.ndarray:
    x = rng.normal(size=(*leading, DIM))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

  arrays = Outputs(
    image=rows(2, COUNT),
    text=rows(3, COUNT),
    scale=np.float32(9.0),
    bias=np.float32(-2.0),
    image_tokens=rows(COUNT, 5),
    text_tokens=rows(COUNT, 4),
    text_valid=np.arange(4) < rng.integers(1, 5, size=(COUNT, 1)),
    dense_scale=np.float32(7.0),
    simclr=rows(2, COUNT),
    momentum_prediction=rows(2, COUNT),
    momentum_target=rows(2, COUNT),
    neighbour=rows(2, COUNT),
    neighbour_similarity=np.ones((2, COUNT), np.float32),
    neighbour_age=np.ones((2, COUNT), np.float32),
    neighbour_ready=np.float32(1.0),
  )
  return jax.tree.map(jnp.asarray, arrays)


def compute(case: str, method: Method) -> dict[str, np.ndarray]:
  """Loss, metrics and gradients by name, with all rows split over the method's devices."""
  options, axes = CASES[case]

  def place(axis: int, x: np.ndarray) -> jax.Array:
    if method.mesh is None:
      return jnp.asarray(x)
    return jax.device_put(x, NamedSharding(method.mesh, PartitionSpec(*(None,) * axis, method.mesh.axis_names)))

  point = {name: place(axis, getattr(outputs(), name)) for name, axis in axes.items()}
  point |= {name: jnp.asarray(getattr(outputs(), name)) for name in ("scale", "dense_scale", "bias")}
  weights = {name: 0.5 + index for index, name in enumerate(options)}

  def loss(fields: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    return reference.objective(weights, options, method)(outputs().replace(**fields), {}, 0)

  (_, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(point)
  return {**metrics, **{f"gradient of {name}": value for name, value in gradient.items()}}


plain = functools.cache(lambda case: compute(case, PLAIN))


@pytest.mark.parametrize("method", slow_except(FAST, METHODS))
@pytest.mark.parametrize("case", CASES)
def test_all_methods_are_equal(case: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
  expected = plain(case)
  monkeypatch.setattr(FILIP, "BLOCK", 200)  # FILIP's own blocks, some products each
  if method.startswith("auto"):
    monkeypatch.setattr(blockwise, "PLAIN_BYTES", 1)
    monkeypatch.setattr(blockwise, "CHUNK_BYTES", 64)
    monkeypatch.setattr(blockwise, "GATHERED_BYTES", 1 if method == "auto ring" else 2**30)
  found = compute(case, METHODS[method]())
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, atol=3e-6, rtol=3e-6, err_msg=name)

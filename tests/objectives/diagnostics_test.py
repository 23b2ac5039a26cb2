"""Tests of `declip_jax.objectives.diagnostics` against loops written from the papers, and at both extremes."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from declip_jax.models.heads import HEADS, diagnostic_kinds
from declip_jax.objectives.diagnostics import MOST_ROWS, diagnose
from declip_jax.sharding import DATA, FSDP, make_mesh
from declip_jax.types import Outputs

BRANCHES = ("simclr", "simsiam_projection", "momentum_prediction", "momentum_target")
ROWS = (*BRANCHES, "image", "text")
measure = partial(diagnose, kinds=diagnostic_kinds(HEADS))
measure_jit = jax.jit(measure)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_outputs(seed=0, count=16, dim=6):
  """All entries with diagnostics: off-centre rows of uneven variance, some not of length one, in 2 or 3 views."""
  rng = np.random.default_rng(seed)

  def rows(*shape):
    return (rng.normal(size=(*shape, dim)) * np.linspace(0.3, 2, dim) + rng.normal(size=dim)).astype(np.float32)

  return Outputs(
    image=unit(rows(2, count)),
    text=unit(rows(3, count)),
    image_tokens=unit(rows(count, 4)),
    text_tokens=unit(rows(count, 5)),
    text_valid=np.arange(5) < rng.integers(1, 5, size=(count, 1)),
    mim_prediction=rows(count, 3),
    mim_target=rows(count, 3),
    **{branch: rows(2, count) for branch in BRANCHES},
  )


@pytest.fixture(scope="module")
def outputs():
  return make_outputs()


@pytest.fixture(scope="module")
def measured(outputs):
  return measure_jit(outputs)


def deviation_loops(rows):
  """Of rows `[n p]`: the mean over dimensions of the standard deviation, in units of 1 / sqrt(p)."""
  rows = [row / np.linalg.norm(row) for row in rows.astype(np.float64)]
  spreads = []
  for dim in range(len(rows[0])):
    values = [row[dim] for row in rows]
    mean = sum(values) / len(values)
    spreads.append((sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5)
  return sum(spreads) / len(spreads) * len(spreads) ** 0.5


def spectrum(rows):
  """Eigenvalues, with sum 1, of the covariance of unit rows `[n p]`."""
  values = np.linalg.eigvalsh(np.cov(unit(rows.astype(np.float64)), rowvar=False))
  return np.maximum(values, 0) / values.sum()


def uniformity_loops(rows):
  rows = rows.astype(np.float64)
  pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
  return np.log(np.mean([np.exp(-2 * np.sum((rows[i] - rows[j]) ** 2)) for i, j in pairs]))


def test_deviation_equals_loops(outputs, measured):
  for branch in ROWS:
    expected = np.mean([deviation_loops(view) for view in getattr(outputs, branch)])
    np.testing.assert_allclose(measured[f"diagnostics/{branch}/deviation"], expected, rtol=1e-5, err_msg=branch)
  tokens = {
    "image_tokens": [token for example in outputs.image_tokens for token in example],
    "text_tokens": [
      token
      for example, valid in zip(outputs.text_tokens, outputs.text_valid, strict=True)
      for token, is_text in zip(example, valid, strict=True)
      if is_text
    ],
  }
  for branch, rows in tokens.items():
    expected = deviation_loops(np.stack(rows))
    np.testing.assert_allclose(measured[f"diagnostics/{branch}/deviation"], expected, rtol=1e-5, err_msg=branch)


def test_rank_equals_the_eigenvalues_and_bounds_the_entropy_rank_from_below(outputs, measured):
  for branch in ROWS:
    spectra = [spectrum(view) for view in getattr(outputs, branch)]
    rank = measured[f"diagnostics/{branch}/rank"]
    np.testing.assert_allclose(rank, np.mean([1 / np.sum(s**2) for s in spectra]), rtol=1e-4, err_msg=branch)
    # Roy and Vetterli's, for the covariance and for the rows, whose singular values are the square roots.
    of_covariance = np.mean([np.exp(-np.sum(s * np.log(s))) for s in spectra])
    roots = [np.sqrt(s) / np.sqrt(s).sum() for s in spectra]
    of_rows = np.mean([np.exp(-np.sum(s * np.log(s))) for s in roots])
    assert 1 < rank < of_covariance < of_rows < 6, branch


def test_alignment_and_uniformity_equal_loops(outputs, measured):
  pairs = zip(outputs.image[0].astype(np.float64), outputs.text[0].astype(np.float64), strict=True)
  alignment = np.mean([np.linalg.norm(image - text) ** 2 for image, text in pairs])
  np.testing.assert_allclose(measured["diagnostics/image_text/alignment"], alignment, rtol=1e-5)
  for branch in ("image", "text"):
    expected = uniformity_loops(getattr(outputs, branch)[0])
    np.testing.assert_allclose(measured[f"diagnostics/{branch}/uniformity"], expected, rtol=1e-5, err_msg=branch)


def test_accuracy_equals_loops_where_a_sigmoid_compares(outputs, measured):
  near = outputs.replace(bias=np.float32(-10), text=unit(outputs.image[:1] + 0.9 * outputs.text[:1]))
  ways = {"image_to_text": (near.image[0], near.text[0]), "text_to_image": (near.text[0], near.image[0])}
  found = measure_jit(near)
  for way, (queries, candidates) in ways.items():
    hits = [max(range(16), key=lambda i: float(query @ candidates[i])) == own for own, query in enumerate(queries)]
    assert 0 < np.mean(hits) < 1
    np.testing.assert_allclose(found[f"diagnostics/image_text/{way}_accuracy"], np.mean(hits), rtol=1e-6)
    assert f"diagnostics/image_text/{way}_accuracy" not in measured


def test_explained_variance_equals_loops_and_is_0_for_the_mean_patch(outputs, measured):
  target = outputs.mim_target.reshape(-1, 6).astype(np.float64)
  mean = np.mean(target, axis=0)
  error, variance = 0.0, 0.0
  for predicted, hidden in zip(outputs.mim_prediction.reshape(-1, 6).astype(np.float64), target, strict=True):
    error += sum((predicted[dim] - hidden[dim]) ** 2 for dim in range(6))
    variance += sum((hidden[dim] - mean[dim]) ** 2 for dim in range(6))
  explained = measured["diagnostics/mim/explained_variance"]
  np.testing.assert_allclose(explained, 1 - error / variance, rtol=1e-5)
  constant = np.broadcast_to(mean.astype(np.float32), outputs.mim_target.shape)
  of_mean = measure_jit(outputs.replace(mim_prediction=constant))["diagnostics/mim/explained_variance"]
  of_target = measure_jit(outputs.replace(mim_prediction=outputs.mim_target))["diagnostics/mim/explained_variance"]
  np.testing.assert_allclose([of_mean, of_target], [0, 1], atol=1e-6)


def test_collapsed_rows_have_deviation_0_and_rank_1_and_are_finite(outputs):
  def check(collapsed):
    found = measure_jit(collapsed)
    for name, value in found.items():
      assert np.isfinite(value), name
      if name.endswith("/deviation"):
        assert value < 1e-5, name
      elif name.endswith("/rank"):
        np.testing.assert_allclose(value, 1, atol=1e-3, err_msg=name)
    return found

  def tokens(x):
    return np.broadcast_to(x[:1, :1], x.shape)

  rows = {name: np.broadcast_to(getattr(outputs, name)[:, :1], getattr(outputs, name).shape) for name in ROWS}
  mim = {name: tokens(getattr(outputs, name)) for name in ("mim_prediction", "mim_target")}
  equal = outputs.replace(
    image_tokens=tokens(outputs.image_tokens), text_tokens=tokens(outputs.text_tokens), **rows, **mim
  )
  found = check(equal)
  for branch in ("image", "text"):
    np.testing.assert_allclose(found[f"diagnostics/{branch}/uniformity"], 0, atol=1e-5)

  # Only rounding distinguishes the rows, in every direction, so that the rank of the rest would be large.
  noise = 1 + 1e-7 * np.random.default_rng(0).normal(size=rows["simclr"].shape)
  check(equal.replace(simclr=(rows["simclr"] * noise).astype(np.float32)))
  check(equal.replace(**{name: np.zeros_like(rows[name]) for name in BRANCHES}))  # dead units


def test_isotropic_rows_have_deviation_1_and_full_rank():
  dim, count = 16, 4096
  x = np.random.default_rng(0).normal(size=(2, count, dim)).astype(np.float32)
  found = measure_jit(Outputs(simclr=x, image=unit(x)))
  for branch in ("simclr", "image"):
    np.testing.assert_allclose(found[f"diagnostics/{branch}/deviation"], 1, atol=0.01)
    np.testing.assert_allclose(found[f"diagnostics/{branch}/rank"], dim, rtol=0.01)
  # A batch no larger than the dimension shows half of it.
  few = np.random.default_rng(1).normal(size=(2, 256, 256)).astype(np.float32)
  found = measure_jit(Outputs(simclr=few, image=unit(few)))
  np.testing.assert_allclose(found["diagnostics/simclr/rank"], 128, rtol=0.02)
  np.testing.assert_allclose(found["diagnostics/image/uniformity"], -4, atol=0.05)


def test_uniformity_of_a_large_batch_uses_every_second_row():
  assert MOST_ROWS == 4096
  rng = np.random.default_rng(0)
  rows = unit(rng.normal(size=(1, 4104, 3))).astype(np.float32)
  rows[:, 1::2] = rows[:, :1]
  kept = rows[0, ::2].astype(np.float64)
  sums = sum(np.exp(-2 * np.sum((kept[i + 1 :] - kept[i]) ** 2, axis=1)).sum() for i in range(len(kept)))
  expected = np.log(sums / (len(kept) * (len(kept) - 1) / 2))
  # With 513 rows on each device, the rows used have even positions on some devices and odd ones on others.
  sharded = jax.device_put(rows, NamedSharding(make_mesh(4, 2), PartitionSpec(None, (DATA, FSDP))))
  for text in (rows, sharded):
    np.testing.assert_allclose(measure_jit(Outputs(text=text))["diagnostics/text/uniformity"], expected, rtol=1e-5)
  # A batch that is just small enough uses all rows.
  whole = unit(rng.normal(size=(1, MOST_ROWS, 3))).astype(np.float32)
  changed = whole.copy()
  changed[:, 1::2] = whole[:, :1]
  of_whole, of_changed = (measure_jit(Outputs(text=x))["diagnostics/text/uniformity"] for x in (whole, changed))
  assert of_changed > of_whole + 0.1


def test_eight_devices_equal_one(outputs, measured):
  mesh = make_mesh(4, 2)

  def split(name):
    spec = (None, (DATA, FSDP)) if name in ROWS else ((DATA, FSDP),)
    return jax.device_put(getattr(outputs, name), NamedSharding(mesh, PartitionSpec(*spec)))

  sharded = outputs.replace(**{name: split(name) for name in outputs})
  assert all(len(leaf.sharding.device_set) == 8 and not leaf.is_fully_replicated for leaf in jax.tree.leaves(sharded))
  found = measure_jit(sharded)
  assert found.keys() == measured.keys()
  for name, value in found.items():
    np.testing.assert_allclose(value, measured[name], rtol=1e-5, err_msg=name)


def test_names_follow_the_fields(outputs, measured):
  assert measure(Outputs()) == {}
  assert set(measured) == {
    *(f"diagnostics/{branch}/{what}" for branch in ROWS for what in ("deviation", "rank")),
    "diagnostics/image/uniformity",
    "diagnostics/text/uniformity",
    "diagnostics/image_text/alignment",
    "diagnostics/image_tokens/deviation",
    "diagnostics/text_tokens/deviation",
    "diagnostics/mim/explained_variance",
  }
  tokens = jax.eval_shape(lambda x: measure(x, has_pooled=False), outputs)
  assert set(measured) - set(tokens) == {
    name for name in measured if name.split("/")[1] in ("image", "text", "image_text")
  }
  for branch in ROWS:
    found = jax.eval_shape(measure, Outputs(**{branch: getattr(outputs, branch)}))
    assert {name.split("/")[1] for name in found} == {branch}
  assert set(jax.eval_shape(measure, Outputs(text_tokens=outputs.text_tokens))) == {"diagnostics/text_tokens/deviation"}
  assert not jax.eval_shape(measure, Outputs(mim_target=outputs.mim_target))


def test_a_step_may_compute_diagnostics_occasionally_and_without_gradient(outputs):
  shapes = jax.eval_shape(measure, outputs)
  assert all(shape.shape == () and shape.dtype == jnp.float32 for shape in shapes.values())
  floats = {name: getattr(outputs, name) for name in outputs if name != "text_valid"}

  def step(floats, wanted):
    nothing = {name: jnp.full((), jnp.nan) for name in shapes}
    found = jax.lax.cond(wanted, measure, lambda _: nothing, outputs.replace(**floats))
    return sum(found.values()), found

  gradient_of = jax.jit(jax.grad(step, has_aux=True))
  gradient, found = gradient_of(floats, True)
  assert all(np.isfinite(value) for value in found.values())
  for name, value in gradient.items():
    np.testing.assert_array_equal(value, 0, err_msg=name)
  assert all(np.isnan(value) for value in gradient_of(floats, False)[1].values())

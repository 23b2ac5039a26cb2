"""Tests of `declip_jax.evals.linear_probe` against scikit-learn's optima and the path of CLIP's sweep, on 8 devices."""

import jax
import ml_dtypes
import numpy as np
import pytest
import references as reference

from declip_jax.evals import linear_probe, logistic_regression, rows
from declip_jax.evals.linear_probe import GRID
from declip_jax.evals.logistic_regression import Data, Linear
from declip_jax.evals.rows import Labelled, Layout, ProbeData
from declip_jax.sharding import make_mesh

TIGHT = 1e-6  # the largest entry of the gradient with which the fixtures' tolerances can be met in float32
GOLDEN = reference.below(reference.load("probes"), "probe/")


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(4, 2)


def split(name, arrays=GOLDEN):
  return Labelled(arrays[f"X_{name}"], arrays[f"y_{name}"])


def top1(scores, label):
  return float((scores.argmax(axis=1) == label).mean())


def probe_data(mesh, arrays=GOLDEN, classes=7, **others):
  splits = {name: split(name, arrays) for name in ("train", "test") if name not in others}
  return ProbeData(**{"score": top1, "classes": classes, "mesh": mesh, **splits, **others})


def mean_per_class(scores, label):
  right = scores.argmax(axis=1) == label
  return float(np.mean([right[label == index].mean() for index in np.unique(label)]))


def assert_weights(classifier, coefficients, intercept, rtol=1e-4):
  """Equal up to `rtol` of the largest coefficient, and a constant in the bias of all classes."""
  classes = classifier.answered
  kernel, bias = classifier.kernel.T[classes], classifier.bias[classes]
  largest = np.abs(coefficients).max()
  np.testing.assert_allclose(kernel, coefficients, rtol=0, atol=rtol * largest)
  np.testing.assert_allclose(bias - bias.mean(), intercept - intercept.mean(), rtol=0, atol=rtol * max(largest, 1))


@pytest.mark.parametrize(
  "kept", [pytest.param(kept, marks=[] if kept % 3 == 0 else pytest.mark.slow) for kept in range(13)]
)
def test_a_fit_has_the_optimum_of_scikit_learn(mesh, kept):
  index = GOLDEN["kept_index"][kept]
  found = linear_probe.fit(probe_data(mesh), GRID[index], tolerance=TIGHT)
  assert_weights(found.classifier, GOLDEN["kept/coef"][kept], GOLDEN["kept/intercept"][kept])
  objective = GRID[index] * len(GOLDEN["y_train"]) * found.chosen.objective
  np.testing.assert_allclose(objective, GOLDEN["grid/objective"][index], rtol=1e-6)
  assert found.converged
  assert found.chosen.iterations < found.chosen.passes < 60  # features without rescaling take up to 238
  if GOLDEN["grid/test_margin"][index] > 1e-4:
    assert top1(found.scores, found.label) == pytest.approx(GOLDEN["grid/test_top1"][index], abs=1e-9)


@pytest.mark.parametrize(
  ("name", "score"), [("top1", top1), pytest.param("mean_per_class", mean_per_class, marks=pytest.mark.slow)]
)
def test_the_sweep_takes_the_path_of_clip(mesh, name, score):
  golden = reference.below(GOLDEN, f"sweep_{name}/")
  found = linear_probe.sweep(probe_data(mesh, score=score, val=split("val")), tolerance=TIGHT)
  assert [np.abs(GRID - fit.strength).argmin() for fit in found.fits] == golden["evaluated_in_order"].tolist()
  assert found.chosen.strength == found.refit.strength == pytest.approx(golden["chosen_C"])
  if name == "top1":
    expected = GOLDEN["grid/val_top1"][golden["evaluated_in_order"]]
    np.testing.assert_allclose([fit.score for fit in found.fits], expected, atol=1e-9)
  assert_weights(found.classifier, golden["refit_coef"], golden["refit_intercept"])
  np.testing.assert_array_equal(found.scores.argmax(axis=1), golden["refit_test_pred"])
  assert found.converged
  scores = GOLDEN["X_test"] @ found.classifier.kernel + found.classifier.bias
  np.testing.assert_allclose(found.scores, scores, atol=1e-5)  # the classifier is that of features as given


def test_a_fit_of_separable_classes_does_not_end_where_its_gradient_is_small(mesh):
  train = split("train")
  train = train._replace(label=train.features[:, :7].argmax(axis=1))
  usual, tight = (
    linear_probe.fit(probe_data(mesh, train=train), 1e4, tolerance=tolerance).chosen
    for tolerance in (logistic_regression.TOLERANCE, 1e-7)
  )
  assert usual.objective < 0.01  # so that a gradient of 1e-5 says little
  np.testing.assert_allclose(usual.objective, tight.objective, rtol=1e-3)


def test_rare_classes_take_few_passes(mesh):
  """With the curvature of classes of equal size, these fits take 51 and 95 passes."""
  rng, share = np.random.default_rng(0), 0.5 ** np.arange(12)
  label = rng.choice(12, 4000, p=share / share.sum())
  features = rng.normal(size=(4000, 16)) + 0.7 * rng.normal(size=(12, 16))[label]
  train = Labelled(features.astype(np.float32), label)
  data = probe_data(mesh, classes=12, train=train, test=train)
  assert linear_probe.fit(data, 1e-4).chosen.passes < 20
  assert linear_probe.fit(data, 1.0).chosen.passes < 75


def test_equal_scores_choose_the_smallest_strength(mesh):
  found = linear_probe.sweep(probe_data(mesh, score=lambda scores, label: 0.5, val=split("val")), refit=False)
  assert found.chosen.strength == GRID[0]
  assert found.refit is None
  assert [np.abs(GRID - fit.strength).argmin() for fit in found.fits] == [*range(0, 97, 16), 8, 4, 2, 1]


@pytest.mark.parametrize("index", [0, 4, 6])
def test_two_classes_have_one_vector_as_in_scikit_learn(mesh, index):
  golden = reference.below(GOLDEN, "binary/")
  found = linear_probe.fit(probe_data(mesh, golden, classes=2), golden["C"][index], tolerance=TIGHT)
  kernel, bias = found.classifier.kernel, found.classifier.bias
  expected, softmax = golden["coef"][index], golden["coef_of_two_class_softmax_same_C"][index]
  np.testing.assert_allclose(kernel[:, 1] - kernel[:, 0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
  np.testing.assert_allclose(bias[1] - bias[0], golden["intercept"][index], atol=1e-4 * np.abs(expected).max())
  if index < 6:
    assert np.abs(softmax - expected).max() > 1e-3 * np.abs(expected).max()  # what two vectors would give
  assert top1(found.scores, found.label) == pytest.approx(golden["test_top1"][index], abs=1e-9)
  score = found.scores[:, 1] - found.scores[:, 0]
  pairs = score[found.label == 1][:, None] - score[found.label == 0][None]
  assert np.mean(pairs > 0) == pytest.approx(golden["test_roc_auc"][index], abs=1e-4)


def test_several_labels_have_one_binary_problem_per_class(mesh):
  golden = reference.below(GOLDEN, "multilabel/")
  train, test = (Labelled(golden[f"X_{name}"], 2 * golden[f"Y_{name}"] - 1) for name in ("train", "test"))
  found = linear_probe.fit(probe_data(mesh, classes=4, train=train, test=test), golden["C"].item(), tolerance=TIGHT)
  expected = golden["coef"]
  np.testing.assert_allclose(found.classifier.kernel.T, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
  np.testing.assert_allclose(found.classifier.bias, golden["intercept"], atol=1e-4)
  assert [fit.converged for fit in found.fits] == [True]


def test_a_label_that_does_not_count_leaves_its_row_out_of_one_problem(mesh):
  golden = reference.below(GOLDEN, "multilabel/")
  label = 2 * golden["Y_train"] - 1
  label[::3, 1] = 0
  train, test = Labelled(golden["X_train"], label), Labelled(golden["X_test"], 2 * golden["Y_test"] - 1)
  found = linear_probe.fit(probe_data(mesh, classes=4, train=train, test=test), golden["C"].item(), tolerance=TIGHT)
  np.testing.assert_allclose(found.classifier.kernel[:, 0], golden["coef"][0], rtol=0, atol=1e-4)
  used = label[:, 1] != 0
  x, sign = golden["X_train"][used].astype(np.float64), label[used, 1]
  kernel, bias = found.classifier.kernel[:, 1], found.classifier.bias[1]
  slope = -sign / (1 + np.exp(sign * (x @ kernel + bias)))  # of the loss; at the optimum its gradient is 0
  np.testing.assert_allclose(golden["C"] * x.T @ slope + kernel, 0, atol=1e-3)
  np.testing.assert_allclose(slope.sum(), 0, atol=1e-3)


def test_a_class_without_training_data_is_never_answered(mesh):
  golden = reference.below(GOLDEN, "missing/")
  absent, train = int(golden["class_without_training"]), split("train")
  kept = train.label != absent
  expected = golden["coef_of_present_classes"], golden["intercept_of_present_classes"]
  for rows_ in (
    Labelled(train.features[kept], train.label[kept]),
    Labelled(train.features, np.where(kept, train.label, -1)),  # rows without a label do not count
  ):
    found = linear_probe.fit(probe_data(mesh, train=rows_), golden["C"].item(), tolerance=TIGHT)
    assert_weights(found.classifier, *expected)
    assert (found.scores[:, absent] == -np.inf).all()
    np.testing.assert_array_equal(found.scores.argmax(axis=1), golden["test_pred"])


@pytest.mark.slow
@pytest.mark.parametrize("index", range(11))
def test_noisy_labels_have_the_optimum_of_scikit_learn(mesh, index):
  golden = reference.below(reference.load("probes"), "linear/")
  strength = golden["C"][index]
  # Along some axes there is hardly any curvature but the penalty's: coefficients need smaller gradients than elsewhere.
  found = linear_probe.fit(probe_data(mesh, golden, classes=5), strength, tolerance=TIGHT / 10)
  expected = reference.below(golden, "tight/")
  if strength > 1000:  # hardly any penalty: float32 meets its rounding errors before the optimum, and says so
    assert not found.converged
    assert found.chosen.gradient < 1e-4
    assert 100 * top1(found.scores, found.label) == pytest.approx(expected["test_acc_percent"][index], abs=1)
    return
  assert_weights(found.classifier, expected["coef"][index], expected["intercept"][index], rtol=2e-4)
  np.testing.assert_allclose(strength * 300 * found.chosen.objective, expected["objective"][index], rtol=1e-6)
  if not expected["test_points_with_logit_gap_below_1e-3"][index]:
    assert 100 * top1(found.scores, found.label) == pytest.approx(expected["test_acc_percent"][index])
  if strength == golden["best_C_on_val"]:
    both = Labelled(*map(np.concatenate, zip(split("train", golden), split("val", golden), strict=True)))
    refit = linear_probe.fit(probe_data(mesh, golden, classes=5, train=both), strength)
    assert 100 * top1(refit.scores, refit.label) == pytest.approx(golden["refit_train_plus_val/test_acc_percent"])


@pytest.mark.slow
def test_one_device_finds_the_same_classifier(mesh):
  eight = linear_probe.fit(probe_data(mesh), 0.1)
  one = linear_probe.fit(probe_data(make_mesh(1, 1, jax.devices()[:1])), 0.1)
  np.testing.assert_allclose(one.classifier.kernel, eight.classifier.kernel, atol=1e-4)
  np.testing.assert_array_equal(one.scores.argmax(axis=1), eight.scores.argmax(axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("large_pass", [0, 2**25])
def test_fits_continue_without_those_that_have_ended(mesh, monkeypatch, large_pass):
  monkeypatch.setattr(logistic_regression, "_LARGE_PASS", large_pass)
  layout, (features, label) = Layout.make(len(split("train").features), mesh), split("train")
  data = Data(layout.place(features), layout.place(label.astype(np.int32), fill=-1))
  axes = logistic_regression.principal_axes(data, mesh)
  strengths, answered = [1e-6, 1e-2, 1e-4, 1.0], np.isin(np.arange(7), label)
  together = logistic_regression.fit(data, axes, strengths, answered, mesh)
  first, last, _, longest = together.iterations.tolist()  # they end at different times, and not in their order
  assert first < last < longest
  assert (np.asarray(together.gradient) <= logistic_regression.TOLERANCE).all()
  for index, strength in enumerate(strengths):
    alone = logistic_regression.fit(data, axes, [strength], answered, mesh)
    np.testing.assert_allclose(together.objective[index], alone.objective[0], rtol=1e-6)
    np.testing.assert_allclose(together.linear.kernel[index], alone.linear.kernel[0], atol=2e-3)


@pytest.mark.parametrize("block", [8192, 16])
def test_a_pass_in_blocks_is_the_sum_over_all_rows(mesh, block, monkeypatch):
  monkeypatch.setattr(rows, "BLOCK", block)
  rng, (features, label) = np.random.default_rng(0), split("train")
  layout = Layout.make(len(features), mesh)
  data = Data(layout.place(features), layout.place(label.astype(np.int32), fill=-1))
  assert rows.num_blocks(layout.rows_per_device) == (1 if block == 8192 else 4)
  mean, kernel = features.mean(axis=0), rng.normal(size=(2, 24, 7)).astype(np.float32)
  linear, answered = Linear(kernel, rng.normal(size=(2, 7)).astype(np.float32)), np.arange(7) != 3
  compiled = jax.jit(lambda *x: logistic_regression.loss_and_gradient(*x, mesh))
  loss, gradient = compiled(data, mean, linear, answered)
  used = (label != 3) & (label >= 0)
  label = np.where(used, label, -1)
  loss, gradient = compiled(data._replace(target=layout.place(label.astype(np.int32), fill=-1)), mean, linear, answered)
  x, y = (features - mean)[used].astype(np.float64), label[used]
  for index in range(2):
    logits = np.where(answered, x @ kernel[index] + linear.bias[index], -np.inf)
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loss[index], -np.log(share[np.arange(len(y)), y]).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient.kernel[index], x.T @ (share - np.eye(7)[y]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (lambda x, y: (x.astype(ml_dtypes.bfloat16), y), "bfloat16"),
    (lambda x, y: (np.where(np.arange(len(x))[:, None] == 17, np.nan, x), y), "row 17"),
    (lambda x, y: (x, np.where(np.arange(len(y)) == 5, 7, y)), "row 5 is 7"),
    (lambda x, y: (x[1:], y), "419"),
    (lambda x, y: (x[:, 1:], y), "23"),
    (lambda x, y: (x, 0 * y), "two classes"),
    (lambda x, y: (x[:0], y[:0]), "two classes"),
  ],
)
def test_unusable_splits_are_rejected(mesh, change, named):
  with pytest.raises(ValueError, match=named):
    linear_probe.fit(probe_data(mesh, train=Labelled(*change(*split("train")))), 1.0)


def test_a_score_that_is_not_a_number_is_rejected(mesh):
  val = split("val")
  with pytest.raises(ValueError, match="NaN at C = 1e-06"):
    linear_probe.sweep(probe_data(mesh, score=lambda scores, label: np.nan, val=val))
  with pytest.raises(ValueError, match="val: no labelled rows"):
    linear_probe.sweep(probe_data(mesh, val=Labelled(val.features, 0 * val.label - 1)))
  with pytest.raises(ValueError, match="val: no rows"):
    linear_probe.sweep(probe_data(mesh))

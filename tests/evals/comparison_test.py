from pathlib import Path

import numpy as np
import pytest

from declip_jax.evals import comparison, intervals, results
from declip_jax.evals.comparison import Task, read_methods
from declip_jax.evals.results import Result

RNG = np.random.default_rng(0)
LABEL = RNG.integers(5, size=400)
TASK = Task("toys", "zero_shot", "")


def classified(accuracy: float, seed: int, label: np.ndarray = LABEL) -> dict[str, np.ndarray]:
  """Predictions of a classifier that is right with some probability."""
  rng = np.random.default_rng(seed)
  rank = np.where(rng.random(len(label)) < accuracy, 0, rng.integers(1, 5, size=len(label)))
  return {"row": np.arange(len(label)), "label": label.astype(np.int64), "predicted": (label + rank) % 5, "rank": rank}


def write(
  folder: Path,
  model: str,
  predictions: dict[str, np.ndarray],
  *,
  pretrained: str = "step-9",
  key: str = "",
  **ours: object,
) -> None:
  """Writes the result of a zero-shot evaluation."""
  correct = predictions["rank"] < 1
  metrics = {"top1": float(correct.mean()), "images": len(correct), "majority_share": 0.25}
  fields = {
    "key": "", "kind": "zero_shot", "variant": "", "headline": "top1", "metrics": metrics,
    "intervals": {"top1": intervals.clopper_pearson(int(correct.sum()), len(correct))},
    "details": {}, "about": {"key": key, "chance": 0.2, "prompts": "own"}, "options": {},
    "weights": {"origin": "a run", "step": 9}, "data": {}, **ours,
  }  # fmt: skip
  dataset = str(ours.get("dataset", key or "toys"))
  result = Result(dataset, model, pretrained, "zeroshot_classification", {"acc1": metrics["top1"]}, fields)
  results.write(folder, result, predictions)


def test_one_run_each_is_compared_on_the_same_images(tmp_path: Path) -> None:
  write(tmp_path, "a", classified(0.7, 1))
  write(tmp_path, "b", classified(0.6, 2))
  a, b = read_methods([tmp_path])
  assert (a.label, b.label) == ("a", "b")
  found = comparison.difference(a.of(TASK), b.of(TASK), "top1")
  correct = [classified(*of)["rank"] < 1 for of in ((0.7, 1), (0.6, 2))]
  assert found.value == pytest.approx(correct[0].mean() - correct[1].mean(), abs=1e-12)
  assert found.test == "paired"
  half = 1.96 * (correct[0].astype(float) - correct[1]).std() / np.sqrt(len(LABEL))
  np.testing.assert_allclose(found.interval, (found.value - half, found.value + half), atol=0.01)
  assert found.is_significant
  assert found.p == intervals.mcnemar(*correct) < 0.05


def test_p_values_of_a_bootstrap_can_be_as_small_as_many_differences_need() -> None:
  clear = np.random.default_rng(0).normal(0.3, 0.05, size=2000)  # six standard deviations from 0
  for sign in (1, -1):
    p = comparison._p_value(np.append(sign * clear, np.nan), 400)
    assert p == pytest.approx(2e-9, rel=0.5)
    assert intervals.holm(np.full(56, p)).max() < 0.05
  near = np.random.default_rng(0).normal(0.1, 0.05, size=2000)
  assert comparison._p_value(near, 400) == 2 * np.mean(near <= 0) == pytest.approx(0.0455, abs=0.01)
  assert comparison._p_value(np.full(2000, 0.3), 5) == 2 / 2**5  # too few examples to be sure
  assert comparison._p_value(np.zeros(2000), 400) == 1


def test_the_p_value_of_a_clear_difference_is_that_of_the_exact_test(tmp_path: Path) -> None:
  """Mean per class of classes of equal sizes is an accuracy, of which McNemar's test is exact."""
  label = np.repeat(np.arange(5), 80)
  for name, accuracy in (("a", 0.7), ("b", 0.5)):
    predictions = classified(accuracy, 1, label) if name == "a" else classified(accuracy, 2, label)
    correct = predictions["rank"] < 1
    write(tmp_path, name, predictions, metrics={"mean_per_class": float(correct.mean())}, intervals={})
  a, b = (method.of(TASK) for method in read_methods([tmp_path]))
  found = comparison.difference(a, b, "mean_per_class")
  exact = intervals.mcnemar(*(one[0].predictions["rank"] < 1 for one in (a, b)))
  assert exact < 1e-6
  assert np.log(found.p) == pytest.approx(np.log(exact), rel=0.2)


def test_only_common_images_count_and_other_labels_are_rejected(tmp_path: Path) -> None:
  fewer = {name: values[20:] for name, values in classified(0.6, 2).items()}
  write(tmp_path / "a", "a", classified(0.7, 1))
  write(tmp_path / "b", "b", fewer)
  write(tmp_path / "c", "c", classified(0.6, 3, np.roll(LABEL, 1)))
  a, b, c = (read_methods([tmp_path / name])[0].of(TASK) for name in "abc")
  correct = classified(0.7, 1)["rank"][20:] < 1, fewer["rank"] < 1
  found = comparison.difference(a, b, "top1")
  assert found.value == pytest.approx(correct[0].mean() - correct[1].mean(), abs=1e-12)
  assert found.interval.lower < found.value < found.interval.upper
  with pytest.raises(ValueError, match="c/toys.* label differs"):
    comparison.difference(a, c, "top1")


def test_seeds_are_compared_by_welch(tmp_path: Path) -> None:
  accuracy = {"x": [], "y": []}
  for name, mean in (("x", 0.8), ("y", 0.5)):
    for seed in range(3):
      predictions = classified(mean, seed + 10)
      write(tmp_path, f"{name}-{seed}", predictions)
      accuracy[name].append(float((predictions["rank"] < 1).mean()))
  x, y = read_methods([tmp_path])
  assert (x.label, y.label, len(x.runs)) == ("x", "y", 3)
  found = comparison.difference(x.of(TASK), y.of(TASK), "top1")
  expected = intervals.welch(np.array(accuracy["x"]), np.array(accuracy["y"]))
  assert (found.value, *found.interval, found.p) == pytest.approx((expected.difference, *expected.interval, expected.p))
  own = comparison.cell(x.of(TASK), "top1")
  assert own.runs == 3
  assert own.interval == pytest.approx(intervals.student(np.array(accuracy["x"])))
  assert comparison.difference(x.of(TASK), y.of(TASK)[:1], "top1").interval is None


def test_checkpoints_of_a_run_are_methods_of_their_own(tmp_path: Path) -> None:
  for step in (1, 2):
    write(tmp_path, "clip-0", classified(0.7, step), pretrained=f"step-{step}")
  assert [method.label for method in read_methods([tmp_path])] == ["clip-0 step-1", "clip-0 step-2"]


def test_a_single_run_keeps_its_whole_name(tmp_path: Path) -> None:
  write(tmp_path, "clip-0", classified(0.7, 1))
  assert [method.label for method in read_methods([tmp_path])] == ["clip-0"]
  with pytest.raises(FileNotFoundError, match="nothing"):
    read_methods([tmp_path / "nothing"])


def test_recalls_resample_images_with_all_their_texts() -> None:
  owner = np.repeat(np.arange(50), RNG.integers(1, 4, size=50))
  ranks = {"row": np.arange(50), "image_rank": RNG.integers(12, size=50), "image_of_text": owner}
  ranks["text_rank"] = RNG.integers(12, size=len(owner))
  once = np.ones((1, 50), int)
  for k in (1, 5, 10):
    answers = comparison._answers(ranks, f"text_to_image_r{k}")
    assert answers.metric(*answers.columns, once)[0] == (ranks["text_rank"] < k).mean()
    answers = comparison._answers(ranks, f"image_to_text_r{k}")
    assert answers.metric(*answers.columns, once)[0] == (ranks["image_rank"] < k).mean()
  answers = comparison._answers(ranks, "mean_recall")
  sides = [(ranks[side] < k).mean() for side in ("image_rank", "text_rank") for k in (1, 5, 10)]
  assert answers.metric(*answers.columns, once)[0] == pytest.approx(np.mean(sides))
  answers = comparison._answers(ranks, "mean_r1")
  assert answers.metric(*answers.columns, once)[0] == pytest.approx((sides[0] + sides[3]) / 2)


@pytest.mark.parametrize("metric", ["top1", "mean_per_class"])
def test_few_shots_of_two_runs_are_compared_on_the_same_images(metric: str, tmp_path: Path) -> None:
  right, values = {}, {}
  for seed, (model, accuracy) in enumerate((("a", 0.7), ("b", 0.5))):
    right[model] = np.random.default_rng(seed).random((400, 3)) < accuracy - 0.05 * LABEL[:, None]
    draws = right[model].mean(axis=0)
    if metric == "mean_per_class":
      draws = np.mean([right[model][k == LABEL].mean(axis=0) for k in range(5)], axis=0)
    values[model] = float(draws.mean())
    fields = {"kind": "few_shot", "headline": "shots_4", "metrics": {"shots_4": values[model], "images": 400}}
    fields |= {"intervals": {}, "details": {"metric": metric}, "options": {}, "data": {}}
    predictions = {"row": np.arange(400), "label": LABEL, "correct_shots_4": right[model]}
    results.write(tmp_path, Result("toys", model, "w", "few_shot", {}, fields), predictions)
  a, b = (method.of(Task("toys", "few_shot", "")) for method in read_methods([tmp_path]))
  found = comparison.difference(a, b, "shots_4")
  assert found.value == pytest.approx(values["a"] - values["b"], abs=1e-12)
  assert found.test == "paired"
  half = 1.96 * (right["a"].mean(axis=1) - right["b"].mean(axis=1)).std() / np.sqrt(400)
  np.testing.assert_allclose(found.interval, (found.value - half, found.value + half), atol=0.01)


def test_an_average_needs_all_its_sets(tmp_path: Path) -> None:
  for index, key in enumerate(("pets", "dtd")):
    write(tmp_path, "a", classified(0.7, index), key=key)
    if not index:
      write(tmp_path, "b", classified(0.7, index), key=key)
  items = [(Task(key, "zero_shot", ""), "top1") for key in ("pets", "dtd")]
  a, b = read_methods([tmp_path])
  assert comparison.average(b, items) is None
  assert comparison.average_difference(a, b, items) is None
  found = comparison.average(a, items)
  expected = [(classified(0.7, index)["rank"] < 1).mean() for index in range(2)]
  assert found.value == pytest.approx(np.mean(expected))
  error = np.sqrt(sum(p * (1 - p) / 400 for p in expected)) / 2
  np.testing.assert_allclose(found.images, found.value + error * np.array([-1.96, 1.96]), atol=0.004)
  assert found.seeds is None
  assert comparison.average(b, items[:1]).images == b.of(items[0][0])[0].interval("top1")


def test_an_average_over_seeds_has_two_kinds_of_interval(tmp_path: Path) -> None:
  for name, accuracy in (("a", 0.8), ("b", 0.6)):
    for seed in range(3):
      for place, key in enumerate(("pets", "dtd")):
        write(tmp_path, f"{name}-{seed}", classified(accuracy, 100 * place + seed), key=key)
  items = [(Task(key, "zero_shot", ""), "top1") for key in ("pets", "dtd")]
  a, b = read_methods([tmp_path])
  means = [
    np.array([np.mean([run[task].metrics["top1"] for task, _ in items]) for run in method.runs]) for method in (a, b)
  ]
  found = comparison.average(a, items)
  assert found.seeds == pytest.approx(intervals.student(means[0]))
  # Several answers to the same images: the spread of the mean of their correctness.
  correct = [np.mean([run[task].predictions["rank"] < 1 for run in a.runs], axis=0) for task, _ in items]
  error = np.sqrt(sum(own.var() / 400 for own in correct)) / 2
  np.testing.assert_allclose(found.images, found.value + error * np.array([-1.96, 1.96]), atol=0.003)
  difference = comparison.average_difference(a, b, items)
  assert difference.value == pytest.approx(means[0].mean() - means[1].mean())
  assert difference.seeds == pytest.approx(intervals.welch(*means).interval)
  assert difference.images.lower < difference.value < difference.images.upper
  assert difference.is_significant
  same = comparison.average_difference(a, a, items)
  assert same.images == (0, 0)
  assert not same.is_significant


def test_runs_that_were_trained_in_other_ways_are_no_seeds(tmp_path: Path) -> None:
  for share in (25, 50):
    training = {"method": "clip", "unique_pairs": share}
    write(tmp_path / "single", f"clip-{share}", classified(0.7, share), training=training)
    for seed in range(2):
      write(tmp_path / "grid", f"clip-{share}-{seed}", classified(0.7, seed), training={**training, "seed": seed})
      weights = {"path": f"runs/{share}/clip-{seed}", "hash": f"{share} {seed}"}
      folder = tmp_path / f"{share} {seed}"
      write(folder, f"clip-{seed}", classified(0.7, seed), training=training, weights=weights)
  assert [method.label for method in read_methods([tmp_path / "single"])] == ["clip-25", "clip-50"]
  grid = read_methods([tmp_path / "grid"])
  assert [(method.label, len(method.runs)) for method in grid] == [("clip-25", 2), ("clip-50", 2)]
  folders = [tmp_path / f"{share} {seed}" for share in (25, 50) for seed in range(2)]
  same = read_methods(folders)  # models of one name in several folders
  assert [(method.label, len(method.runs)) for method in same] == [
    ("25/clip-0, 25/clip-1", 2),
    ("50/clip-0, 50/clip-1", 2),
  ]


def weighted(folder: Path, model: str, path: str, seed: int, step: int | None, **ours: object) -> None:
  """Writes the result of weights at a path."""
  weights = ours.pop("weights", {"path": path, "hash": path, "step": step, "parameters": 9})
  pretrained = "openai" if step is None else f"step-{step}"
  write(folder, model, classified(0.7, seed), pretrained=pretrained, weights=weights, **ours)


def test_weights_that_are_no_run_are_no_seeds(tmp_path: Path) -> None:
  for seed, (model, path) in enumerate(
    (("ViT-B-32", "w/ViT-B-32.pt"), ("ViT-B-16", "w/ViT-B-16.pt"), ("model", "x/model.pt"), ("model", "y/model.pt"))
  ):
    weighted(tmp_path / str(seed), model, path, seed, None)
  found = read_methods([tmp_path / str(seed) for seed in range(4)])
  assert [method.label for method in found] == ["ViT-B-32", "ViT-B-16", "x/model", "y/model"]
  assert [len(method.runs) for method in found] == [1, 1, 1, 1]


def test_runs_of_one_name_are_no_seeds(tmp_path: Path) -> None:
  paths = ["exp1/clip", "exp2/clip", "exp1/slip-0", "exp1/slip-1", "exp2/slip-0", "exp2/slip-1"]
  for seed, path in enumerate(paths):
    weighted(tmp_path / path, path.split("/")[1], path, seed, 9)
  folders = [tmp_path / path for path in paths]
  found = read_methods(folders)
  labels = ["exp1/clip", "exp2/clip", "exp1/slip-0, exp1/slip-1", "exp2/slip-0, exp2/slip-1"]
  assert [method.label for method in found] == labels
  weighted(
    tmp_path / "again",
    "clip",
    "exp1/clip",
    7,
    9,
    weights={"path": "exp1/clip", "hash": "later", "step": 9, "parameters": 9},
  )
  again = read_methods([folders[0], tmp_path / "again"])
  assert [method.label for method in again] == ["exp1/clip (exp1/cli)", "exp1/clip (later)"]


def test_a_result_never_hides_another_one_of_the_same_weights(tmp_path: Path) -> None:
  weighted(tmp_path / "a", "clip", "runs/clip", 1, 9, key="pets")
  weighted(tmp_path / "b", "clip", "runs/clip", 1, 9, key="pets")
  assert len(read_methods([tmp_path / "a", tmp_path / "b"])) == 1
  weighted(tmp_path / "b", "clip", "runs/clip", 2, 9, key="pets")
  with pytest.raises(ValueError, match=r"a/pets.*b/pets.* different results of pets by the same weights"):
    read_methods([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize(
  "changes",
  [
    {"samples": 401},
    {"content": "y"},
    {"images": "y"},
    {"samples": None, "content": "y"},
    {"readable": 399, "content": "y", "images": "y"},
  ],
)
def test_results_of_other_data_are_rejected(changes: dict[str, object], tmp_path: Path) -> None:
  data = {"source": "folder:/v1", "samples": 400, "readable": 400, "content": "x", "images": "x"}
  for seed, name in enumerate(("a-0", "a-1", "b-0", "b-1")):
    test = {**data, "source": "folder:/v2", **changes} if name == "b-1" else data
    write(tmp_path / name, name, classified(0.7, seed), data={"test": test})
  names = ("a-0", "a-1", "b-0", "b-1")
  a, _, _, b = ([*read_methods([tmp_path / name])[0].of(TASK)] for name in names)
  seeds = [method.of(TASK) for method in read_methods([tmp_path / name for name in names])]
  if changes.get("readable"):  # an image that one model cannot read: those that both have are compared
    assert comparison.difference(a, b, "top1").test == "paired"
    return
  for sides in ((a, b), seeds):
    with pytest.raises(ValueError, match=r"a-0/.*folder:/v1.*b-1/.*folder:/v2.* (different data|other images)"):
      comparison.difference(*sides, "top1")


def test_results_of_probes_of_other_training_splits_are_rejected(tmp_path: Path) -> None:
  for name, samples in (("a", 100), ("b", 90)):
    write(tmp_path, name, classified(0.7, 1), data={"train": {"source": "folder:/t", "samples": samples}})
  a, b = (method.of(TASK) for method in read_methods([tmp_path]))
  with pytest.raises(ValueError, match="train folder:/t, 100 samples.*train folder:/t, 90 samples"):
    comparison.difference(a, b, "top1")


def test_retrieval_among_other_images_is_not_compared(tmp_path: Path) -> None:
  for name, size in (("a", 10), ("b", 10), ("c", 30)):
    owner = np.repeat(np.arange(size), 2 if name == "a" else 3)
    ranks = {"row": np.arange(size), "image_of_text": owner, "image_rank": np.arange(size) % 3, "text_rank": owner}
    fields = {"kind": "retrieval", "headline": "image_to_text_r1", "metrics": {"image_to_text_r1": 0.4}}
    fields |= {"intervals": {}, "details": {}, "options": {}, "data": {}}
    results.write(tmp_path / name, Result("toys", name, "w", "zeroshot_retrieval", {}, fields), ranks)
  a, b, c = (read_methods([tmp_path / name])[0].of(Task("toys", "retrieval", "")) for name in "abc")
  assert comparison.difference(a, a, "image_to_text_r1").test == "paired"
  for other in (b, c):
    with pytest.raises(ValueError, match="other images or texts"):
      comparison.difference(a, other, "image_to_text_r1")

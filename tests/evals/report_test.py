"""Sections of the report of evaluations, over small results."""

from collections.abc import Callable
from functools import partial
import inspect
import json
from pathlib import Path
import re

from evals.comparison_test import classified, write
import numpy as np
import pytest

from declip_jax.evals import comparison, intervals, results, robustness
from declip_jax.evals.comparison import Task, read_methods
from declip_jax.evals.report import growth, header, headline, published, scores, shifts
from declip_jax.evals.report.compared import Published, Report
from declip_jax.evals.report.document import _cost
from declip_jax.evals.report.files import to_json
from declip_jax.evals.scaling import data_efficiency
from declip_jax.reporting import charts
from declip_jax.reporting.documents import Block, Listing, Picture, Table

SIZES = (1000, 2000, 4000)
ACCURACY = {"clip": (0.2, 0.4, 0.6), "declip": (0.35, 0.55, 0.75)}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Two methods, trained on three numbers of pairs for six epochs, with two seeds each."""
  root = tmp_path_factory.mktemp("grid")
  for method, accuracies in ACCURACY.items():
    for size, accuracy in zip(SIZES, accuracies, strict=True):
      for seed in range(2):
        facts = {"method": method, "seed": seed, "unique_pairs": size, "pairs_seen": 6 * size, "flops": 6e9 * size}
        weights = {"origin": "a run", "step": 9, "parameters": 5}
        name = f"{method}-{size}-{seed}"
        write(root, name, classified(accuracy, seed + size), key="dtd", training=facts, weights=weights)
  return root


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
  """Arguments of charts, which are not drawn."""
  found: dict[str, tuple] = {}

  def note(name: str, function: Callable[..., None], *arguments: object, **named: object) -> None:
    inspect.signature(function).bind(*arguments, **named)
    found.setdefault(name, arguments)

  for name in (
    "plot_growth",
    "plot_laws",
    "plot_interpolation",
    "plot_sweep",
    "plot_differences",
    "plot_scores",
    "plot_robustness",
  ):
    monkeypatch.setattr(charts, name, partial(note, name, getattr(charts, name)))
  return found


def tables(blocks: list[Block]) -> list[Table]:
  return [block for block in blocks if isinstance(block, Table)]


def test_curves_and_data_efficiency_of_a_grid_of_runs(grid: Path, drawn: dict[str, tuple], tmp_path: Path) -> None:
  methods = read_methods([grid])
  assert [method.label for method in methods] == [f"{name}-{size}" for name in ACCURACY for size in SIZES]
  found = growth.efficiencies(Report(methods, methods[0]))
  assert [(own.measure, own.reference, own.size, own.method) for own in found] == [
    ("unique_pairs", "clip", size, "declip") for size in SIZES
  ]
  accuracy = {
    method.label: [run[Task("dtd", "zero_shot", "")].metrics["top1"] for run in method.runs] for method in methods
  }
  table = np.array([accuracy[f"declip-{size}"] for size in SIZES]).T
  for own in found:
    reference = np.array(accuracy[f"clip-{own.size:.0f}"])
    assert own.found == data_efficiency(np.array(SIZES, float), table, own.size, reference)
  assert found[0].found.pairs is None
  assert 2000 < found[2].found.pairs < 3000
  (words,) = (block for block in tables([*growth.growth(Report(methods), tmp_path)]) if "factor" in block.header)
  assert [row[4] for row in words.rows][0] == "fewer than 1k, its smallest run"
  assert [row[5] for row in words.rows][0] == "more than 1.00"
  panels = {panel.measure: panel.lines for panel in drawn["plot_growth"][0]}
  assert [*panels] == ["training FLOPs", "pairs seen in training", "different training pairs"]
  line = panels["different training pairs"]["declip"]
  assert [*line.x] == [*SIZES]
  np.testing.assert_allclose(line.y, table.mean(axis=0))
  assert all(low < y < high for (low, high), y in zip(line.ends, line.y, strict=True))
  assert drawn["plot_laws"][1] == "training FLOPs"
  assert json.loads(to_json(Report(methods)))["data_efficiency"][2]["found"]["pairs"] == found[2].found.pairs


def test_all_scores_of_own_data_are_drawn_with_their_mean(drawn: dict[str, tuple], tmp_path: Path) -> None:
  for method, better in (("clip", 0.0), ("declip", 0.1)):
    for size, score in ((10, 0.2), (20, 0.4)):
      facts = {"method": method, "seed": 0, "unique_pairs": size, "pairs_seen": 60}
      about = {"dataset": "own/mine", "training": facts, "weights": {"origin": "a run", "step": 9, "parameters": 5}}
      predictions, name = classified(0.5, size), f"{method}-{size}-0"
      metrics = {"top1": 0.9, "mean_per_class": score + better, "images": 3}
      write(tmp_path, name, predictions, metrics=metrics, **about)
      recalls = {"image_to_text_r10": score, "text_to_image_r10": score + 0.2, "images": 3}
      retrieval = {"kind": "retrieval", "variant": "equal_texts=True", "headline": "text_to_image_r10", "intervals": {}}
      write(tmp_path, name, predictions, metrics=recalls, **retrieval, **about)
  report = Report(read_methods([tmp_path]))
  (own,) = growth.own_scores(report).values()
  names = ["Zero-shot classification, mean accuracy per class", "Retrieval, recall at 10", "Mean of these 2"]
  assert [name for name, _ in own] == names
  blocks = [*growth.growth(report, tmp_path)]
  assert any(block.path.name == "scaling_own_mine.png" for block in blocks if isinstance(block, Picture))
  panels = {panel.score: panel.lines for panel in drawn["plot_growth"][0]}
  assert [*panels] == names
  for name, y in zip(names, ([0.3, 0.5], [0.3, 0.5], [0.3, 0.5]), strict=True):
    np.testing.assert_allclose(panels[name]["declip"].y, y)
  np.testing.assert_allclose(panels["Mean of these 2"]["clip"].y, [0.25, 0.45])
  reached = {own.score: own.found.pairs for own in growth.efficiencies(report) if own.size == 20}
  assert reached["Mean of these 2, own/mine"] == pytest.approx(10 * 2**0.75)


def test_a_score_that_is_not_reached(grid: Path) -> None:
  methods = read_methods([grid])
  report = Report(methods, next(method for method in methods if method.label == "declip-4000"))
  *_, last = growth.efficiencies(report)
  assert (last.reference, last.method, last.found.pairs) == ("declip", "clip", None)
  assert growth._reached(last).startswith("not reached (at most ")
  assert growth._factor(last)[0] == "less than 1.00"


def test_runs_without_facts_or_from_other_weights_are_on_no_curve(tmp_path: Path) -> None:
  write(tmp_path, "a", classified(0.5, 1))
  for number in range(2):
    training = {"method": "finetune", "unique_pairs": 10 + number, "pairs_seen": 10, "init_from": "runs/a"}
    write(tmp_path, f"b{number}", classified(0.5, 2), training=training)
  report = Report(read_methods([tmp_path]))
  assert growth.runs(report, report.items("zero_shot")) == []
  assert [*growth.growth(report, tmp_path)] == []


def test_lines_join_runs_that_differ_in_the_measure_alone() -> None:
  def run(**facts: object) -> growth.Run:
    return growth.Run("x", {"method": "clip", **facts}, 0.5)

  checkpoints = [run(unique_pairs=5, parameters=1, pairs_seen=seen) for seen in (5, 10)]
  larger = [run(unique_pairs=5, parameters=2, pairs_seen=seen) for seen in (5, 10)]
  assert growth.lines([*checkpoints, *larger], "pairs_seen") == {
    "clip, 1 parameters": checkpoints,
    "clip, 2 parameters": larger,
  }
  assert growth.lines(checkpoints, "unique_pairs") == {}  # the last checkpoint alone


def test_variants_of_a_method_are_lines_of_their_own_named_by_their_runs() -> None:
  def run(name: str, recipe: str, size: int) -> growth.Run:
    return growth.Run(name, {"method": "declip", "recipe": recipe, "unique_pairs": size, "seed": 0}, 0.5)

  plain = [run(f"declip-{share}pct-0", "a", share) for share in (5, 10)]
  paper = [run(f"declip_paper-{share}pct-0", "b", share) for share in (5, 10)]
  assert growth.lines([*plain, *paper], "unique_pairs") == {"declip": plain, "declip_paper": paper}
  assert growth.lines(paper, "unique_pairs") == {"declip": paper}


def test_many_methods_have_rows_and_few_of_them_details(tmp_path: Path, drawn: dict[str, tuple]) -> None:
  for size in range(9):
    facts = {"method": "clip", "unique_pairs": size + 1}
    write(tmp_path, f"clip-{size}x", classified(0.3 + size / 20, size), training=facts)
  methods = read_methods([tmp_path])
  report = Report(methods, methods[0])
  assert [method.label for method in report.detailed] == ["clip-8x"]
  table, *_ = tables([*scores.scores(report, "zero_shot", tmp_path)])
  assert table.header[:5] == ["data set", "metric", "method", "score", "minus clip-0x"]
  assert [row[2] for row in table.rows] == report.labels
  assert table.rows[0][4] == ""
  assert table.rows[8][4].startswith("+")
  few = Report(methods[:2], methods[0])
  table, *_ = tables([*scores.scores(few, "zero_shot", tmp_path)])
  assert table.header[2:5] == ["clip-0x", "clip-1x", "clip-1x minus clip-0x"]


def test_interpolated_weights_are_a_curve(tmp_path: Path, drawn: dict[str, tuple]) -> None:
  for share, (photo, sketch) in {0.0: (0.5, 0.4), 0.5: (0.7, 0.6), 1.0: (0.8, 0.3)}.items():
    for key, accuracy in (("own/photo", photo), ("own/sketch", sketch)):
      weights = {"origin": "a run", "step": 9, "share": share, "interpolated_with": {"path": "runs/clip"}}
      write(tmp_path, "tuned", classified(accuracy, 3), key=key, pretrained=f"s{share}", weights=weights)
  found = read_methods([tmp_path])
  report = Report([], None, {"own/photo": ["own/sketch"]}, interpolated=found)
  blocks = [*shifts.interpolation(report, tmp_path)]
  (table,) = tables(blocks)
  assert table.header == ("share", "own/photo", "own/sketch")
  assert [row[0] for row in table.rows] == ["0", "0.5", "1"]
  curve, against, names, _ = drawn["plot_interpolation"]
  assert [*curve["tuned and clip"]["own/sketch"].x] == [0, 0.5, 1]
  (line,) = against.values()
  values = {
    method.share: {key: cell.value for key, cell in shifts.by_key(method, "zero_shot").items()} for method in found
  }
  assert [*line.x] == [values[share]["own/photo"] for share in (0, 0.5, 1)]
  assert [*line.y] == [values[share]["own/sketch"] for share in (0, 0.5, 1)]
  assert names == ("score on own/photo", "mean score under shift")


IMAGENET = {
  "imagenet": 0.6,
  "imagenet_v2": 0.5,
  "imagenet_sketch": 0.4,
  "imagenet_r": 0.7,
  "objectnet": 0.45,
  "imagenet_a": 0.3,
  "imagenet_on_r": 0.8,
  "imagenet_on_a": 0.78,
  "imagenet_on_objectnet": 0.65,
}


def test_the_mean_under_shift_is_that_of_all_five_of_imagenet(tmp_path: Path, drawn: dict[str, tuple]) -> None:
  """Effective robustness compares with ImageNet's images of the same classes."""
  for key, accuracy in IMAGENET.items():
    write(tmp_path, "a", classified(accuracy, 1), key=key)
  report = Report(read_methods([tmp_path]))
  own = {key: cell.value for key, cell in shifts.by_key(report.methods[0], "zero_shot").items()}
  five = ["imagenet_v2", "imagenet_sketch", "imagenet_r", "objectnet", "imagenet_a"]
  table, *others = [
    block for block in tables([*shifts.shifts(report, tmp_path)]) if block.header[:2] == ["method", "imagenet"]
  ]
  assert not others
  assert [name for name in table.header if name in IMAGENET] == ["imagenet", *five]
  assert table.header[-1] == "mean under shift"
  assert table.rows[0][-1].split(" [")[0] == f"{100 * np.mean([own[key] for key in five]):.1f}"
  place = table.header.index("imagenet_r") + 1
  line = robustness.fit_line(*robustness.baseline("imagenet_r")[1:])
  above = 100 * line.effective_robustness(own["imagenet_on_r"], own["imagenet_r"])
  assert table.header[place] == "effective robustness"
  assert table.rows[0][place].split("\\*")[0].split(" [")[0] == f"{above:+.1f}"


def test_the_mean_of_some_shifts_says_so(tmp_path: Path, drawn: dict[str, tuple]) -> None:
  for key in ("imagenet", "imagenet_v2", "imagenet_r"):
    write(tmp_path, "a", classified(IMAGENET[key], 1), key=key)
  table, *_ = tables([*shifts.shifts(Report(read_methods([tmp_path])), tmp_path)])
  assert table.header[-1] == "mean of 2 of 5 shifts"
  after = {name: table.header[table.header.index(name) + 1] for name in ("imagenet_v2", "imagenet_r")}
  assert after == {"imagenet_v2": "effective robustness", "imagenet_r": table.header[-1]}  # without imagenet_on_r


def test_mixtures_are_drawn_against_the_mean_of_all_five(tmp_path: Path, drawn: dict[str, tuple]) -> None:
  for share in (0.0, 1.0):
    for key, accuracy in IMAGENET.items():
      weights = {"origin": "a run", "step": 9, "share": share, "interpolated_with": {"path": "runs/clip"}}
      found = classified(accuracy - share / 10, 3)
      write(tmp_path, "tuned", found, key=key, pretrained=f"s{share}", weights=weights)
  report = Report([], interpolated=read_methods([tmp_path]))
  assert [*shifts.interpolation(report, tmp_path)]
  _, against, names, _ = drawn["plot_interpolation"]
  (line,) = against.values()
  assert names == ("score on imagenet", "mean score under shift")
  for method, y in zip(report.interpolated, line.y, strict=True):
    own = {key: cell.value for key, cell in shifts.by_key(method, "zero_shot").items()}
    five = ("imagenet_v2", "imagenet_sketch", "imagenet_r", "objectnet", "imagenet_a")
    assert y == pytest.approx(np.mean([own[key] for key in five]))


def test_the_best_is_bold_only_if_it_differs_from_all_others(tmp_path: Path) -> None:
  for name, accuracy in (("a", 0.5), ("b", 0.801), ("c", 0.8)):
    write(tmp_path, name, classified(accuracy, 1))
  methods = read_methods([tmp_path])
  task = Task("toys", "zero_shot", "")
  for chosen, bold in ((methods, False), (methods[:2], True)):
    for baseline in (None, chosen[0]):
      texts = scores._cells(Report(chosen, baseline), task, "top1")
      assert [text.startswith("**") for text in texts] == [bold and index == 1 for index in range(len(chosen))]


def test_headline_of_a_suite_and_of_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  for key in ("imagenet", "pets", "dtd"):
    for name, accuracy in (("a", 0.3), ("b", 0.8)):
      for seed in range(3):
        about = {"key": key, "prompts": "openai"}
        write(tmp_path, f"{name}-{seed}", classified(accuracy, seed), key=key, about=about)
  report = Report((found := read_methods([tmp_path])), found[0])
  lines = headline.lines(report)
  assert [(line.quantity, line.method.label) for line in lines[:2]] == [
    ("ImageNet, zero-shot", "a"),
    ("ImageNet, zero-shot", "b"),
  ]
  assert lines[-1].quantity == "Zero-shot classification: mean of 3 data sets (top-1 accuracy)"
  assert lines[0].difference is None
  assert lines[1].difference.is_significant
  (table,) = tables([*headline.headline(report)])
  assert "interval, seeds" in table.header
  assert table.rows[1][5].endswith("\\*")
  suite = headline.catalogue.suite("declip11")
  assert [task.dataset for task, _ in headline._suite_items(report, suite, ("pets", "dtd"), ["zero_shot"])] == [
    "pets",
    "dtd",
  ]
  monkeypatch.setattr(type(suite), "prompt_set", lambda *_: "others")
  assert not headline._suite_items(report, suite, ("pets", "dtd"), ["zero_shot"])


def test_a_mean_says_which_data_sets_it_contains(tmp_path: Path) -> None:
  for name, keys in (("a", ("pets", "toys-1f", "lone")), ("b", ("pets", "toys-1f"))):
    for key in keys:
      write(tmp_path, name, classified(0.5, 1), key=key)
    write(tmp_path, name, classified(0.5, 1), key="pets", variant="bare")
  report = Report(read_methods([tmp_path]))
  assert {(line.quantity, line.data_sets) for line in headline.lines(report)} == {
    ("Zero-shot classification: mean of 2 data sets (top-1 accuracy)", ("pets", "toys-1f"))
  }
  (listing,) = (block for block in headline.headline(report) if isinstance(block, Listing))
  assert listing.items == ["Zero-shot classification: pets, toys-1f; without lone, pets (bare)."]
  (single,) = (Report([method], None) for method in report.methods[:1])
  (listing,) = (block for block in headline.headline(single) if isinstance(block, Listing))
  assert listing.items == ["Zero-shot classification: lone, pets, toys-1f; without pets (bare)."]


def test_a_mean_is_at_equal_numbers_of_neighbours_or_shots(tmp_path: Path) -> None:
  rng = np.random.default_rng(0)
  for key, size in (("pets", 20), ("dtd", 20), ("flowers", 12)):
    write(tmp_path, "a", classified(0.5, 1), key=key, kind="knn", details={"neighbours": size})
    shots = {f"shots_{count}": 0.5 for count in (8, size - 4)}
    fields = {"kind": "few_shot", "headline": [*shots][-1], "metrics": shots, "intervals": {}, "about": {"key": key}}
    fields |= {"details": {"metric": "top1"}, "options": {}, "data": {}}
    answers = {f"correct_{name}": rng.random((400, 3)) < 0.5 for name in shots}
    predictions = {"row": np.arange(400), "label": classified(0.5, 1)["label"], **answers}
    results.write(tmp_path, results.Result(key, "a", "step-9", "few_shot", {}, fields), predictions)
  report = Report(read_methods([tmp_path]))
  assert [(line.quantity, line.data_sets) for line in headline.lines(report)] == [
    ("Few shots: mean of 2 data sets (16 images per class)", ("dtd", "pets")),
    ("Nearest neighbours: mean of 2 data sets (top-1 accuracy)", ("dtd", "pets")),
  ]
  (listing,) = (block for block in headline.headline(report) if isinstance(block, Listing))
  assert listing.items == [
    "Few shots: dtd, pets; without flowers (8 images per class).",
    "Nearest neighbours: dtd, pets; without flowers (12 neighbours).",
  ]


@pytest.mark.parametrize(
  ("weights", "cells"),
  [
    ({"path": "runs/a", "origin": "declip_jax, step 9", "step": 9}, ("`runs/a`", "9")),
    ({"path": "runs/a", "origin": "x", "step": 9, "average": 0.99}, ("`runs/a` (moving average, decay 0.99)", "9")),
    ({"path": "w/a.pt", "origin": "OpenAI", "step": None}, ("`w/a.pt` (OpenAI)", "")),
    ({"origin": "OpenAI", "step": None}, ("OpenAI", "")),
  ],
)
def test_the_weights_are_named_by_their_path(weights: dict, cells: tuple[str, str], tmp_path: Path) -> None:
  write(tmp_path, "a", classified(0.5, 1), weights=weights)
  table, *_ = tables([*header.header(Report(read_methods([tmp_path])))])
  row = dict(zip(table.header, table.rows[0], strict=True))
  assert (row["weights"], row.get("step", "")) == cells


def test_published_scores_are_flagged_and_protocols_do_not_mix(tmp_path: Path) -> None:
  write(tmp_path, "a", classified(0.7, 1), key="dtd", training={"method": "clip", "config": "slip/x"})
  method = read_methods([tmp_path])[0]
  score = method.of(Task("dtd", "zero_shot", ""))[0].metrics["top1"]
  rows = [
    Published(name, "paper", "zero-shot", kind, key, prompts, score - above)
    for name, kind, key, prompts, above in (
      ("near", "zero_shot", "dtd", "own", 0.009),
      ("slip/x", "zero_shot", "dtd", "own", 0.011),
      ("other prompts", "zero_shot", "dtd", "openai", 0.2),
      ("other set", "zero_shot", "pets", "own", 0.2),
      ("other protocol", "linear_probe", "dtd", "", 0.2),
    )
  ]
  (table,) = tables([*published.published(Report([method], published=rows))])
  assert table.header[-3:] == ["published", "a", "a, other prompts"]
  assert [row[0] for row in table.rows] == ["near", "**slip/x**", "other prompts"]
  assert [row[-2].partition(" ")[2] for row in table.rows] == ["(+0.9)", "(+1.1 ‡)", ""]
  assert [row[-1] for row in table.rows] == ["", "", f"{100 * score:.1f} (`own`)"]


def seven_prompts(folder: Path, *, eighty: bool = False) -> Report:
  """The results of slip26 on ImageNet, and those with 80 prompts, by one method, and the published ones."""
  for prompts, variant, accuracy in (("openai", "", 0.6), ("openai7", "openai7", 0.3))[not eighty :]:
    about = {"key": "imagenet", "prompts": prompts, "metric": "top1"}
    write(folder, "a", classified(accuracy, 1), key="imagenet", dataset="imagenet1k", variant=variant, about=about)
  own = {"imagenet_top1_percent": {"zero_shot": 30.0}}
  rows = [row for name in ("slip/x", "clip/x") for row in published.of_config(name, own)]
  return Report(read_methods([folder]), published=[*rows, *published.of_papers()])


def test_scores_with_seven_prompts_are_beside_the_published_ones_with_seven(tmp_path: Path) -> None:
  report = seven_prompts(tmp_path)
  value = (classified(0.3, 1)["rank"] < 1).mean()
  first, *others = published.compared(report)
  assert (first.model, first.protocol) == ("slip/x", "zero-shot, SLIP's seven prompts")
  assert (first.ours, first.others) == ({"a": value}, {})
  assert others
  assert all(own.others == {"a": {"openai7": value}} for own in others)
  assert [line.quantity for line in headline.lines(report)] == ["ImageNet, zero-shot, SLIP's seven prompts"]


def test_each_prompt_set_has_a_column_beside_published_scores(tmp_path: Path) -> None:
  report = seven_prompts(tmp_path, eighty=True)
  seven, eighty = ((classified(accuracy, 1)["rank"] < 1).mean() for accuracy in (0.3, 0.6))
  found = {(row.model, row.protocol): row for row in published.compared(report)}
  own = found["slip/x", "zero-shot, SLIP's seven prompts"]
  assert (own.ours, own.others) == ({"a": seven}, {"a": {"openai": eighty}})
  own = found["clip/x", "zero-shot, OpenAI's prompts"]
  assert (own.ours, own.others) == ({"a": eighty}, {"a": {"openai7": seven}})
  (table,) = tables([*published.published(report)])
  row = dict(zip(table.header, table.rows[0], strict=True))
  assert row["a"].startswith(f"{100 * seven:.1f} (")
  assert row["a, other prompts"] == f"{100 * eighty:.1f} (`openai`)"
  assert [(line.quantity, line.score.value) for line in headline.lines(report)] == [
    ("ImageNet, zero-shot", eighty),
    ("ImageNet, zero-shot, SLIP's seven prompts", seven),
  ]


def test_few_shots_are_compared_with_each_prompt_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  drawn = []
  monkeypatch.setattr(charts, "plot_few_shot", lambda *arguments: drawn.append(arguments))
  details = {"method": "logistic", "metric": "top1", "std": {}}
  few = {"kind": "few_shot", "headline": "shots_2", "metrics": {"shots_1": 0.2, "shots_2": 0.5}, "intervals": {}}
  few |= {"variant": "few", "details": details}
  write(tmp_path, "a", classified(0.5, 1), key="imagenet", dataset="imagenet1k", **few)
  for eighty, prompts in ((False, ["SLIP's seven prompts"]), (True, ["OpenAI's prompts", "SLIP's seven prompts"])):
    report = seven_prompts(tmp_path, eighty=eighty)
    (table,) = tables([*scores._few_shot(report, tmp_path)])
    lines = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert [line.get("prompts", prompts[0]) for line in lines] == prompts
    values = [100 * (classified(accuracy, 1)["rank"] < 1).mean() for accuracy in (0.6, 0.3)[-len(prompts) :]]
    assert [line["zero-shot"].partition(" ")[0] for line in lines] == [f"{value:.1f}" for value in values]
    assert drawn[-1][1] == {"a": pytest.approx(values[0] / 100)}
  assert lines[0]["images per class"] == "not reached"


def test_a_mean_has_one_result_of_each_data_set(tmp_path: Path) -> None:
  seven_prompts(tmp_path)
  write(tmp_path, "a", classified(0.5, 1), key="pets")
  write(tmp_path, "a", classified(0.5, 1), key="pets", variant="bare", about={"key": "pets", "prompts": "bare"})
  write(tmp_path, "a", classified(0.5, 1), key="dtd", variant="top5", about={"key": "dtd", "prompts": "openai"})
  report = Report(read_methods([tmp_path]))
  assert [str(task) for task, _ in report.items("zero_shot")] == ["imagenet1k (openai7)", "pets"]


def test_published_tables_name_data_sets_and_evaluators() -> None:
  found = published.of_papers()
  assert len(found) > 400
  assert {row.kind for row in found} == {"zero_shot", "sgd_probe", "linear_probe"}
  for key in {row.key for row in found}:
    assert headline.catalogue.data_set(key)
  means = {
    (row.model, row.kind): np.mean([own.value for own in found if (own.model, own.kind) == (row.model, row.kind)])
    for row in found
  }
  assert means["DeCLIP, ViT-B/32", "linear_probe"] == pytest.approx(0.830, abs=5e-4)
  own = [*published.of_config("slip/x", {"imagenet_top1_percent": {"zero_shot": 42.8, "linear_probe": 72.1}})]
  assert [(row.kind, row.prompts, row.value) for row in own] == [
    ("zero_shot", "openai7", pytest.approx(0.428)),
    ("sgd_probe", "", pytest.approx(0.721)),
  ]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
  write(tmp_path, "a", classified(0.7, 1), key="pets")
  write(tmp_path, "a", classified(0.7, 1), key="dtd", metrics={"top1": 0.5, "unreadable": 3})
  write(tmp_path, "b", classified(0.7, 1), key="pets", training={"method": "clip", "data": {"pairs": 1000}})
  blocks = [*header.header(Report(read_methods([tmp_path])))]
  *_, missing = (block.items for block in blocks if isinstance(block, Listing))
  assert "b has no result of zero-shot classification on dtd." in missing
  assert "3 images of dtd could not be read, and do not count." in missing
  assert any("declip11 (2 of 11)" in line for line in missing)
  assert any(isinstance(block, Listing) and "b: `pairs` (1,000)" in block.items for block in blocks)


def test_examples_are_copied_and_costs_counted(tmp_path: Path) -> None:
  for number, key in enumerate(("dtd", "pets")):
    write(tmp_path / "in", "a", classified(0.7, 1), key=key)
    path = next((tmp_path / "in").glob(f"{key}*.json"))
    line = {"file": path.name, "seconds": 2.0, "encoded": 400 * number, "cached": 400 * (1 - number), "machine": "m"}
    with (tmp_path / "in" / results.LOG).open("a") as log:
      log.write(json.dumps(line) + "\n")
  (tmp_path / "in" / "pictures").mkdir()
  results.picture_path(path).write_bytes(b"picture")
  report = Report(read_methods([tmp_path / "in"]))
  found = [block for block in scores.scores(report, "zero_shot", tmp_path / "out") if isinstance(block, Picture)]
  assert [block.path.read_bytes() for block in found] == [b"picture"]
  (table,) = tables([*_cost(report)])
  assert [*map(list, table.rows)] == [
    ["a", "dtd", "1", "2.0", "0", "400", "", "m"],
    ["", "pets", "1", "2.0", "400", "0", "200", "m"],
  ]


def test_compositionality_has_a_number_of_examples_and_an_interval_of_differences(tmp_path: Path) -> None:
  right = {"a": np.arange(60) % 3 > 0, "b": np.arange(60) % 4 > 1}
  for model, correct in right.items():
    metrics = {"accuracy": float(correct.mean()), "examples": 60}
    fields = {"kind": "composition", "headline": "accuracy", "metrics": metrics, "intervals": {}, "details": {}}
    fields |= {"options": {}, "data": {}}
    result = results.Result("sugar", model, "w", "image_caption_selection", {}, fields)
    results.write(tmp_path, result, {"row": np.arange(60), "correct": correct})
  a, b = methods = read_methods([tmp_path])
  (table,) = tables([*scores.scores(Report(methods, b), "composition", tmp_path)])
  assert table.header[-1] == "images"
  assert [row[-1] for row in table.rows] == ["60"]
  found = comparison.difference(*(method.of(Task("sugar", "composition", "")) for method in (a, b)), "accuracy")
  assert found.test == "paired"
  assert found.p == intervals.mcnemar(right["a"], right["b"])


def test_jaccard_indices_are_compared_on_the_same_instances(tmp_path: Path) -> None:
  rng = np.random.default_rng(0)
  candidates = np.array([5, 6, 10, 12] * 20)
  values = {"a": rng.choice([0, 1 / 3, 1], 80), "b": rng.choice([0, 1 / 3, 1], 80)}
  large = candidates >= 10
  for model, own in values.items():
    metrics = {"jaccard": float(own[large].mean()), "jaccard_all": float(own.mean()), "examples": 40}
    fields = {"kind": "composition", "headline": "jaccard", "metrics": metrics, "intervals": {}, "details": {}}
    result = results.Result("wino", model, "w", "image_caption_selection", {}, {**fields, "options": {}, "data": {}})
    results.write(tmp_path, result, {"row": np.arange(80), "jaccard": own, "candidates": candidates})
  sides = [method.of(Task("wino", "composition", "")) for method in read_methods([tmp_path])]
  for metric, used in (("jaccard", large), ("jaccard_all", large | True)):
    found = comparison.difference(*sides, metric)
    differences = (values["a"] - values["b"])[used]
    assert found.test == "paired"
    assert found.value == pytest.approx(differences.mean())
    half = 1.96 * differences.std() / len(differences) ** 0.5
    np.testing.assert_allclose(found.interval, [found.value - half, found.value + half], atol=0.03)


def test_overlaps_of_folders_of_one_name_are_all_shown_and_a_bad_one_is_named(tmp_path: Path) -> None:
  folders = [tmp_path / name / "overlap" for name in "xy"]
  about = {"train": "b", "images": 10, "threshold": 0.8, "overlap": 1, "contamination": 0.1}
  for folder in folders:
    folder.mkdir(parents=True)
    (folder / "overlap.json").write_text(json.dumps({"test": folder.parent.name, **about}))
    (folder / "overlap.png").write_text(folder.parent.name)
  blocks = shifts.overlaps(Report((), overlaps=folders), tmp_path / "out")
  assert [block.path.read_text() for block in blocks if isinstance(block, Picture)] == ["x", "y"]
  for content in ("{", "{}", "[]", json.dumps({"test": "a", **about, "effect": {}})):
    (folders[1] / "overlap.json").write_text(content)
    with pytest.raises(ValueError, match="y/overlap/overlap.json"):
      [*shifts.overlaps(Report((), overlaps=folders), tmp_path / "out")]


def test_the_number_of_neighbours_is_the_one_that_was_used(tmp_path: Path) -> None:
  for key, neighbours in (("pets", 20), ("dtd", 20), ("flowers", 12)):
    write(tmp_path, "a", classified(0.5, 1), key=key, kind="knn", details={"neighbours": neighbours})
  text, listing = header.protocol(Report(read_methods([tmp_path])), "knn")
  assert "20" not in text
  assert listing.items == ["Number of neighbours: 12 (flowers).", "Number of neighbours: 20 (dtd, pets)."]


def shifted(folder: Path, model: str, photo: float, sketch: float, *, seed: int = 0, prompts: str = "") -> None:
  """Writes results of a linear probe, or zero-shot with some prompts, on images without and under a shift."""
  for place, (key, accuracy) in enumerate((("own/photo", photo), ("own/sketch", sketch))):
    fields = {"variant": prompts, "about": {"key": key, "prompts": prompts}} if prompts else {"kind": "linear_probe"}
    write(folder, model, classified(accuracy, 2 * seed + place), key=key, **fields)


def of_shift(folder: Path, *methods: tuple[str, float, float], flat: bool = False, models: int = 12) -> Report:
  """Methods, and models with standard training whose accuracy under shift is 20 points lower, or the same for all."""
  for name, photo, sketch in methods:
    shifted(folder / "methods", name, photo, sketch, seed=99)
  for number in range(models):
    photo = 0.4 + 0.5 * number / models
    shifted(folder / "standard", f"s{number}x", photo, 0.3 + number % 2 / 10 if flat else photo - 0.2, seed=number)
  keys = {"own/photo": ["own/sketch"]}
  return Report(read_methods([folder / "methods"]), None, keys, read_methods([folder / "standard"]))


def test_effective_robustness_has_an_interval_and_a_star_if_that_excludes_0(tmp_path: Path) -> None:
  report = of_shift(tmp_path, ("above", 0.6, 0.6), ("on", 0.6, 0.4))
  above, on = shifts.lines(report, report.methods, "own/photo", ["own/sketch"], "linear_probe")
  for row, expected in ((above, True), (on, False)):
    score, effective = row.shifted["own/sketch"]
    assert effective.interval.lower < effective.value < effective.interval.upper
    assert np.diff(effective.interval) > np.diff(score.interval)  # that of the accuracy, and more
    assert effective.is_significant == expected
  _, table, *rest = shifts._shift(report, "own/photo", ["own/sketch"], "linear_probe", tmp_path)
  column = list(table.header).index("effective robustness")
  assert [cell[column].count("\\*") for cell in table.rows] == [1, 0]
  assert not [block for block in rest if isinstance(block, Listing)]
  found = json.loads(to_json(report))["shifts"][0]["under_shift"]["own/sketch"]["effective_robustness"]
  assert found["interval"] == [*above.shifted["own/sketch"][1].interval]


@pytest.mark.parametrize(
  ("of", "reasons"),
  [
    ({"flat": True}, r"own/sketch: its slope may be 0 \(-?0\.\d\d \[-0\.\d\d, 0\.\d\d\]\)\."),
    ({"models": 9}, r"own/sketch: the line is fitted to only 9 models\."),
    ({"models": 6, "flat": True}, r"own/sketch: the line is fitted to only 6 models, and its slope may be 0 \(.*\)\."),
  ],
  ids=["flat", "few", "both"],
)
def test_a_line_that_is_of_no_use_is_named_and_gives_no_star(of: dict, reasons: str, tmp_path: Path) -> None:
  report = of_shift(tmp_path, ("above", 0.6, 0.9), **of)
  _, table, _, listing, *_ = shifts._shift(report, "own/photo", ["own/sketch"], "linear_probe", tmp_path)
  assert "\\*" not in "".join(table.rows[0])
  (remark,) = listing.items
  assert re.fullmatch(reasons, remark)


def test_the_mean_under_shift_has_an_interval(tmp_path: Path) -> None:
  accuracy = {"own/photo": 0.7, "own/sketch": 0.5, "own/cartoon": 0.6}
  for place, (key, value) in enumerate(accuracy.items()):
    write(tmp_path, "a", classified(value, place), key=key)
    for seed in range(3):
      write(tmp_path, f"b-{seed}", classified(value, 3 * seed + place), key=key)
  report = Report(read_methods([tmp_path]), None, {"own/photo": ["own/sketch", "own/cartoon"]})
  single, seeds = shifts.lines(report, report.methods, "own/photo", report.shifts["own/photo"], "zero_shot")
  values = [score.value for score, _ in single.shifted.values()]
  half = 1.96 * np.sqrt(sum(value * (1 - value) / 400 for value in values)) / 2
  assert single.mean.value == pytest.approx(np.mean(values))
  np.testing.assert_allclose(single.mean.interval, [single.mean.value - half, single.mean.value + half], atol=3e-3)
  means = [
    np.mean([run[Task(key, "zero_shot", "")].metrics["top1"] for key in ("own/sketch", "own/cartoon")])
    for run in report.methods[1].runs
  ]
  assert seeds.mean.interval == pytest.approx(intervals.student(np.array(means)))


def test_a_shift_is_measured_with_the_same_prompts(tmp_path: Path) -> None:
  shifted(tmp_path, "a", 0.7, 0.5, prompts="bare")
  write(tmp_path, "a", classified(0.7, 1), key="own/photo")
  write(tmp_path, "a", classified(0.7, 1), key="own/cartoon")
  keys = ["own/sketch", "own/cartoon"]
  report = Report(read_methods([tmp_path]), None, {"own/photo": keys})
  own, bare = shifts.lines(report, report.methods, "own/photo", keys, "zero_shot")
  assert ([*own.shifted], [*bare.shifted]) == (["own/cartoon"], ["own/sketch"])
  assert (own.name, bare.name) == ("a", "a, names of classes as prompts")

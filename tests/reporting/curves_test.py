"""The curves of a run: which panels there are, what they show, and the values of random answers."""

import dataclasses
import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest

from declip_jax.reporting.chance import chance_losses
from declip_jax.reporting.charts import Points, plot_training
from declip_jax.reporting.curves import Described, plot_curves

RUN = Described("DeCLIP on $5, 64 pairs", {**chance_losses(64), "mlm": math.log(1000)}, ("retrieval",))


@pytest.fixture
def figures(monkeypatch):
  """The figures saved during a test."""
  saved, savefig = [], Figure.savefig

  def record(self, *args, **kwargs):
    saved.append(self)
    return savefig(self, *args, **kwargs)

  monkeypatch.setattr(Figure, "savefig", record)
  return saved


def rows_of_a_run(count):
  """A run with two contrastive losses and one of masked tokens; the bank is full by step 2."""
  noise = np.random.default_rng(0).normal(size=count).round(6).tolist()
  rows = [
    {"step": n, "loss": 5 + x, "loss/clip": 6 + x, "loss/nns": 0.0 if n < 2 else 6.5, "loss/mlm": 9 + x, "lr": 1e-3}
    for n, x in enumerate(noise)
  ]
  scores = {"eval/zero_shot/top1": 0.5, "eval/zero_shot/majority_share": 0.25, "eval/zero_shot/seconds": 9.0}
  found = {"eval/retrieval/text_to_image_r1": 0.5, "eval/retrieval/text_to_image_r10": 0.75}
  found |= {"eval/retrieval/images": 40.0, "eval/retrieval/texts": 40.0}
  return [*rows, {"step": count, **scores, **found, "diagnostics/image/deviation": 0.9}]


def panels(figure):
  return {axes.get_title("left").partition(",")[0]: axes for axes in figure.findobj(Axes)}


def drawn(figures, rows, tmp_path, run=RUN):
  plot_curves(rows, run, tmp_path / "curves.png")
  return panels(figures[-1])


def labels(axes):
  return [text.get_text().split("  ")[0] for text in axes.get_legend().get_texts()]


def dashed(axes):
  """The heights of the dashed lines."""
  return [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 2]


def test_both_directions_have_a_chance_of_their_own_where_images_have_several_texts(tmp_path, figures):
  found = {"image_to_text_r5": 0.5, "text_to_image_r5": 0.5, "images": 30, "texts": 180}
  rows = [{"step": 10, "loss": 1.0, **{f"eval/retrieval/{name}": value for name, value in found.items()}}]
  axes = drawn(figures, rows, tmp_path)["retrieval"]
  chances = ["image to text r5 at chance", "text to image r5 at chance"]
  assert labels(axes) == ["image to text r5", "text to image r5", *chances]
  assert sorted(dashed(axes)) == pytest.approx(sorted([1 - math.comb(174, 5) / math.comb(180, 5), 5 / 30]))


def test_a_bank_that_is_never_full_has_no_curve(tmp_path, figures):
  rows = [{"step": n, "loss": 5.0, "loss/clip": 6.0 - n / 10, "loss/nns": 0.0} for n in range(4)]
  assert labels(drawn(figures, rows, tmp_path)["loss"]) == ["total", "clip", "at chance"]


@pytest.mark.parametrize("count", [10, 2000])
def test_curves_that_are_comparable_share_a_panel(tmp_path, figures, count):
  shown = drawn(figures, rows_of_a_run(count), tmp_path)
  assert {*shown} >= {"loss", "loss of masked tokens", "zero shot", "retrieval", "deviation of features"}
  assert labels(shown["loss"]) == ["total", "clip", "nns", "at chance", "bank full by step 2"]
  assert labels(shown["loss of masked tokens"]) == ["mlm", "at chance"]
  assert labels(shown["zero shot"]) == ["top1", "largest class"]
  assert labels(shown["retrieval"]) == ["text to image r1", "text to image r10", "r1 at chance", "r10 at chance"]
  assert "temperature" not in shown  # this run has none
  assert figures[-1].get_suptitle() == RUN.title
  with Image.open(tmp_path / "curves.png") as picture:
    assert picture.width == 1000
    assert picture.height <= 1000
  assert (tmp_path / "curves.png").stat().st_size < 2**20


def test_dashed_lines_are_the_values_of_random_answers(tmp_path, figures):
  shown = drawn(figures, rows_of_a_run(10), tmp_path)
  assert dashed(shown["loss"]) == [math.log(64)]
  assert dashed(shown["loss of masked tokens"]) == [math.log(1000)]
  assert dashed(shown["zero shot"]) == [0.25]
  assert dashed(shown["retrieval"]) == [1 / 40, 10 / 40]
  shown = drawn(figures, rows_of_a_run(10), tmp_path, Described("unknown"))
  assert not dashed(shown["loss"])
  assert not dashed(shown["retrieval"])


def test_neighbours_are_shown_once_the_bank_is_full(tmp_path, figures):
  rows = rows_of_a_run(10)
  shown = drawn(figures, rows, tmp_path)["loss"]
  [curve] = [line for line in shown.lines if line.get_label().startswith("nns")]
  assert curve.get_xdata().tolist() == [*range(2, 10)]
  [mark] = [line for line in shown.lines if line.get_label().startswith("bank")]
  assert mark.get_xdata()[0] == 2
  for row in rows[:2]:
    row["loss/nns"] = 6.5  # the released code does not wait for the bank
  assert "bank full by step 2" not in labels(drawn(figures, rows, tmp_path)["loss"])


def test_the_ends_of_stages_are_marked_once_they_are_reached(tmp_path, figures):
  run = dataclasses.replace(RUN, stages={"low": 3, "$x$ of the middle": 7, "later": 12})
  shown = drawn(figures, rows_of_a_run(10), tmp_path, run)
  shown.pop("", None)  # empty places
  for axes in shown.values():
    assert [line.get_xdata() for line in axes.lines if line.get_linewidth() == 0.6] == [[3, 3], [7, 7]]
    assert [text.get_text().strip() for text in axes.texts] == ["low", "$x$ of ..."]


def test_a_total_that_equals_its_only_term_is_drawn_once(tmp_path, figures):
  rows = [{"step": n, "loss": 3.0 + n, "loss/clip": 3.0 + n} for n in range(3)]
  assert labels(drawn(figures, rows, tmp_path)["loss"]) == ["clip", "at chance"]


def test_no_legend_covers_data(tmp_path, figures):
  suite = {f"eval/suite/data set {n}": n / 40 for n in range(30)}
  shown = drawn(figures, [*rows_of_a_run(10), {"step": 10, **suite}], tmp_path)
  legends = {name: axes.get_legend().get_window_extent() for name, axes in shown.items() if axes.get_legend()}
  assert len(labels(shown["suite"])) == 30
  for name, legend in legends.items():
    assert legend.x0 >= shown[name].get_window_extent().x1
    others = [axes.get_window_extent() for axes in shown.values()]
    others += [other for other in legends.values() if other is not legend]
    assert not any(legend.overlaps(other) for other in others)


def test_smoothed_curve_equals_a_naive_average(tmp_path, figures):
  rows = rows_of_a_run(500)
  light, smooth = drawn(figures, rows, tmp_path)["loss"].lines[:2]
  values = [row["loss"] for row in rows if "loss" in row]
  np.testing.assert_array_equal(light.get_ydata(), values)
  for index in (0, 3, 250, 499):
    near = [(i, 0.5 + 0.5 * math.cos(math.pi * (i - index) / 10)) for i in range(500) if abs(i - index) < 10]
    expected = sum(weight * values[i] for i, weight in near) / sum(weight for _, weight in near)
    assert smooth.get_ydata()[index] == pytest.approx(expected)


def test_missing_points_are_left_out(tmp_path, figures):
  values = [3.0, None, math.nan, math.inf, 2.0]
  shown = drawn(figures, [{"step": n, "loss": value} for n, value in enumerate(values)], tmp_path)
  [line] = shown["loss"].lines
  assert line.get_xydata().tolist() == [[0, 3], [4, 2]]


def test_no_metrics_at_all(tmp_path, figures):
  plot_curves([], RUN, tmp_path / "deep" / "er" / "curves.png")
  assert "no metrics yet" in [text.get_text() for text in figures[0].texts]


def test_training_of_methods_has_a_bar_for_the_range_over_seeds(tmp_path, figures):
  several = Points([10, 20], [0.2, 0.5], [(0.1, 0.3), (0.4, 0.6)])
  methods = {"costs $5 to $6": several, **{f"method {n}": Points([20], [0.1 + n / 50], [None]) for n in range(11)}}
  plot_training(methods, "seeds", tmp_path / "training.png", "top-1", {"largest class": 0.16})
  [axes] = figures[0].axes
  looks = {(line.get_color(), line.get_marker()) for line in axes.lines if line.get_marker() not in ("None", "_", "|")}
  assert len({color for color, _ in looks}) == 12
  assert labels(axes)[:3] == ["largest class", "costs $5 to $6", "method 10"]
  assert "50.0 % ± 10.0" in axes.get_legend().get_texts()[1].get_text()
  bars = [segment[:, 1].tolist() for bar in axes.collections for segment in bar.get_segments()]
  assert np.isclose(bars, [0.4, 0.6]).all(axis=1).any()

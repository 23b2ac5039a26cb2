"""Tests of `declip_jax.evals.evaluation`: what is run, skipped, written and logged, for a model that knows greys."""

from dataclasses import replace
import errno
import json
from pathlib import Path
from typing import Any

from greys import Greys, grey_encoders
import jax
import numpy as np
import pytest
from record_files import read_events, scalars

from declip_jax import command_line
from declip_jax.data.sources import BadSample
from declip_jax.evals import EVALUATORS, Evaluator, feature_cache
from declip_jax.evals import evaluation as evaluation_lib
from declip_jax.evals.evaluation import Evaluation, ModelFacts, _Images, _reader
from declip_jax.evals.feature_cache import FeatureCache
from declip_jax.evals.features import EvaluationData
from declip_jax.evals.jobs import DataSource, Job
from declip_jax.evals.results import Scores
from declip_jax.reporting.progress import Bar

FACTS = ModelFacts("grey", "step-8", {"path": "runs/grey", "origin": "us", "step": 8, "hash": "h"}, {}, "float32")
calls: list[str] = []


def brightness(data: EvaluationData, pictures: Path | None, *, scale: float = 1.0) -> Scores:
  """The mean of the pooled features of the test split."""
  calls.append(data.test.name)
  if pictures is not None:
    pictures.write_text("picture")
  value = scale * float(data.test.features.pooled.mean()) / 100
  return Scores(
    {"mean": value, "images": len(data.test.rows)}, {"mean": (0.0, 1.0)}, {"grey": data.test.features.pooled}
  )


@pytest.fixture(autouse=True)
def evaluators(monkeypatch: pytest.MonkeyPatch) -> None:
  calls.clear()
  entry = Evaluator(brightness, needs_text=False, task="their_task", names={"mean": "acc1"})
  monkeypatch.setitem(EVALUATORS, "brightness", entry)


def greys(name: str, *values: int) -> DataSource:
  source = Greys([(value, 0) for value in values])
  source.name = name
  return DataSource(source)


def job(name: str, *values: int, **fields: Any) -> Job:
  return Job(name, f"set/{name}", "brightness", {"test": greys(name, *values)}, **fields)


def evaluation(folder: Path, cache: bool = False) -> Evaluation:
  found = FeatureCache(folder / "cache", "h", {}, (1, 2)) if cache else None
  return Evaluation(FACTS, grey_encoders(2), folder / "results", found)


def files(folder: Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name != "results.jsonl"
  }


def test_a_result_says_what_was_evaluated_and_how(tmp_path: Path) -> None:
  found = evaluation(tmp_path).run([job("a", 10, 30, options={"scale": 2.0}, about={"key": "k"}, variant="v")])
  assert {name: result.ours["metrics"] for name, result in found.items()} == {"a": {"mean": 0.4, "images": 2}}
  (path,) = (tmp_path / "results").glob("*.json")
  assert path.name == "set_a_step-8_grey_en_their_task_v.json"
  fields = json.loads(path.read_text())
  assert (fields["dataset"], fields["metrics"]) == ("set/a", {"acc1": 0.4})
  ours = fields["declip_jax"]
  assert (ours["headline"], ours["intervals"], ours["options"]) == ("mean", {"mean": [0.0, 1.0]}, {"scale": 2.0})
  test = ours["data"]["test"]
  assert test == {"source": "a", "stamp": "1", "samples": 2, "skipped": {}, "readable": 2, "content": test["content"]}
  assert (ours["weights"]["step"], ours["about"]) == (8, {"key": "k"})
  assert (tmp_path / "results" / "pictures" / f"{path.stem}.png").read_text() == "picture"
  (line,) = (tmp_path / "results" / "results.jsonl").read_text().splitlines()
  assert json.loads(line) | {"step": 8, "eval/a/mean": 0.4, "file": path.name} == json.loads(line)


@pytest.mark.parametrize(
  ("headline", "details", "about", "chance"),
  [
    ("top1", {}, {}, {"chance": 0.5}),
    ("shots_4", {"metric": "mean_per_class"}, {}, {"chance": 0.5}),
    ("mean_recall", {}, {}, {}),
    ("top1", {}, {"chance": None}, {"chance": None}),
    ("top1", {}, {"chance": 0.01}, {"chance": 0.01}),
  ],
)
def test_the_chance_follows_from_the_classes_unless_the_data_set_is_in_the_catalogue(
  headline: str, details: dict, about: dict, chance: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  scores = Scores({headline: 0.3, "images": 1}, details=details)
  monkeypatch.setitem(EVALUATORS, "fixed", Evaluator(lambda data, pictures: scores))
  found = evaluation(tmp_path).run([replace(job("a", 10, about=about), kind="fixed")])
  assert found["a"].ours["about"] == chance  # of two classes, even and odd


def test_the_tensorboard_of_a_run_shows_one_curve_of_a_data_set_and_all_metrics_of_others(tmp_path: Path) -> None:
  jobs = [job("a", 10, 30), job("b/knn", 20, curve="slip26/b/knn")]
  run = replace(evaluation(tmp_path), run_folder=tmp_path / "run")
  for _ in range(2):  # results that are there are not added again
    run.run(jobs)
  shown = {(8, "eval/a/mean", 0.2), (8, "eval/a/images", 2.0), (8, "eval/slip26/b/knn", 0.2)}
  found = scalars(read_events(tmp_path / "run" / "tensorboard" / "results"))
  assert (len(found), set(found)) == (3, shown)


def test_features_can_be_rounded_which_is_another_result(tmp_path: Path) -> None:
  dark = job("a", 10, 30)
  plain = evaluation(tmp_path, cache=True)
  half = replace(plain, encoders=replace(plain.encoders, features_dtype="float16"))
  dtypes = [found.run([dark])["a"].ours["features_dtype"] for found in (plain, half, half)]
  assert (dtypes, len(calls)) == (["float32", "float16", "float16"], 2)
  assert "0.0 MiB" in half.plan([job("b", 1)])[2]


def test_an_evaluation_that_was_interrupted_ends_with_the_same_files(tmp_path: Path) -> None:
  jobs = [job("a", 10), job("b", 20, 40, 60), job("c", 30)]
  evaluation(tmp_path / "whole").run(jobs)
  broken = replace(evaluation(tmp_path / "parts"), encoders=grey_encoders(2))
  encode, left = broken.encoders.image, [2]

  def fail_later(images: np.ndarray) -> Any:
    left[0] -= 1
    if left[0] < 0:
      raise KeyboardInterrupt
    return encode(images)

  with pytest.raises(KeyboardInterrupt):
    replace(broken, encoders=replace(broken.encoders, image=fail_later)).run(jobs)
  assert len([*(tmp_path / "parts" / "results").glob("*.json")]) == 1
  calls.clear()
  evaluation(tmp_path / "parts").run(jobs)
  assert calls == ["b", "c"]
  assert files(tmp_path / "whole") == files(tmp_path / "parts")


@pytest.mark.parametrize(
  ("change", "runs"),
  [
    ({}, 0),
    ({"options": {"scale": 3.0}}, 1),
    ({"data": {"classnames": ("odd", "even")}}, 1),
    ({"splits": {"test": greys("a", 11)}}, 0),  # the stamp says whether the data differ
    ({"splits": {"test": DataSource(greys("a", 10).source, np.array([1, 0]))}}, 1),
    ({"splits": {"test": greys("a", 10, 11)}}, 1),
  ],
)
def test_a_result_is_computed_again_if_what_it_depends_on_changes(
  change: dict[str, Any], runs: int, tmp_path: Path
) -> None:
  before = job("a", 10)
  evaluation(tmp_path).run([before])
  calls.clear()
  evaluation(tmp_path).run([replace(before, **change)])
  assert len(calls) == runs


def test_other_weights_are_another_result(tmp_path: Path) -> None:
  evaluation(tmp_path).run([job("a", 10)])
  facts = replace(FACTS, weights={**FACTS.weights, "hash": "other"})
  replace(evaluation(tmp_path), model=facts).run([job("a", 10)])
  assert calls == ["a", "a"]


def test_a_result_of_other_weights_or_data_is_not_replaced_in_silence(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  own = evaluation(tmp_path)
  own.run([job("a", 10)])
  before = files(tmp_path / "results")
  moved = replace(own, model=replace(FACTS, weights={**FACTS.weights, "hash": "other", "path": "exp/grey"}))
  for function in (moved.run, moved.plan):
    with pytest.raises(
      ValueError, match=r"set_a_step-8.*json is the result of runs/grey.* of exp/grey would replace it"
    ):
      function([job("a", 10)])
  assert files(tmp_path / "results") == before
  replace(moved, model=replace(moved.model, weights={**FACTS.weights, "path": "exp/grey"})).run([job("a", 10)])
  assert (calls, capsys.readouterr().err.count("replaces")) == (["a"], 0)  # the same weights, which were moved
  own.run([replace(job("a", 10), splits={"test": greys("b", 10, 20)})])
  assert "a: replaces the result of other data, test a (1), " in capsys.readouterr().err
  replace(moved, run_folder=tmp_path).run([job("a", 10)])  # the results of a run that was moved
  assert "a: replaces the result of earlier weights at runs/grey, " in capsys.readouterr().err


def test_a_plan_counts_what_is_left_and_writes_nothing(tmp_path: Path) -> None:
  prompts = {"data": {"prompts": (("a cat", "one cat", "cats"), ("a dog", "one dog", "dogs"))}}
  jobs = [job("a", 10, 20), job("b", 20, 30, 40, about={"prompts": "own"}, **prompts)]
  evaluation(tmp_path, cache=True).run(jobs[:1])
  before = files(tmp_path)
  lines = evaluation(tmp_path, cache=True).plan(jobs)
  assert lines[0] == "a: test a (2), done"
  assert lines[1] == "b: test b (3), prompts own: 'a cat' and 2 more"
  assert lines[2] == "1 of 2 results to compute, 3 images to encode"
  assert lines[3].startswith("their features take 0.0 MiB")
  assert files(tmp_path) == before


def test_jobs_that_share_a_source_encode_it_once(tmp_path: Path) -> None:
  shared, events = greys("a", 10, 20), []
  splits = {"x": shared, "y": shared, "z": DataSource(shared.source)}  # z could have other classes
  jobs = [Job(name, name, "brightness", {"test": split}) for name, split in splits.items()]
  replace(evaluation(tmp_path), encoders=grey_encoders(2, events)).run(jobs)
  assert events == ["encode"]


def test_two_results_cannot_have_one_file(tmp_path: Path) -> None:
  jobs = [job("a", 10), replace(job("b", 20), dataset="set/a")]
  with pytest.raises(ValueError, match="a and b have results of the same name, set_a_step-8"):
    evaluation(tmp_path).run(jobs)
  evaluation(tmp_path).run([jobs[0], replace(jobs[1], variant="other")])


@pytest.mark.parametrize(
  ("error", "message"),
  [(ValueError("no class has an image"), "a: no class has an image"), (KeyError("group"), "a: KeyError: 'group'")],
)
def test_a_job_that_fails_is_named_after_the_others_have_run(
  error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def fail(data: EvaluationData, pictures: Path | None) -> Scores:
    raise error

  monkeypatch.setitem(EVALUATORS, "fail", Evaluator(fail))
  jobs = [replace(job("a", 10), kind="fail", options={}), job("b", 20)]
  with pytest.raises(ValueError, match=message):
    evaluation(tmp_path).run(jobs)
  assert calls == ["b"]
  assert len([*(tmp_path / "results").glob("*.json")]) == 1


def test_the_bar_never_passes_its_total() -> None:
  """A token model reads images again for each comparison with texts; tqdm fails beyond its total."""
  counts: list[int] = []

  class Recorded(Bar):
    def update(self, count: int = 1) -> None:
      counts.append(count)

  bar = Recorded("", 7)
  source = greys("a", 1, 2, 3, 4, 5).source
  images = _Images()
  read = _reader(bar, 7, images)
  for _ in range(2):
    assert len([*read(source, grey_encoders(2), range(5))]) == 3
  assert counts == [2, 2, 1, 2, 0, 0]
  assert images.encoded == 10


def test_a_result_says_how_its_run_was_trained_and_the_log_what_it_cost(tmp_path: Path) -> None:
  own = evaluation(tmp_path, cache=True)
  own = replace(own, model=replace(FACTS, training=lambda: {"method": "clip", "pairs_seen": 8}))
  shared = greys("a", 10, 20, 30)
  jobs = [Job(name, name, "brightness", {"test": shared}) for name in ("x", "y")]
  found = own.run(jobs[:1])
  assert found["x"].ours["training"] == {"method": "clip", "pairs_seen": 8}
  replace(own, model=replace(FACTS, training=calls.clear)).run(jobs[:1])  # is not asked for: nothing to compute
  assert len(calls) == 1
  evaluation(tmp_path, cache=True).run(jobs)
  lines = [json.loads(line) for line in (tmp_path / "results" / "results.jsonl").read_text().splitlines()]
  assert [(line["encoded"], line["cached"]) for line in lines] == [(3, 0), (0, 3)]


def test_a_label_that_is_not_among_the_classes_ends_the_evaluation(tmp_path: Path) -> None:
  class Unnamed(Greys):
    def __getitem__(self, index: int) -> dict[str, Any]:
      if index == 2:
        raise BadSample("no label", "c: class 5, expected -1 to 3")
      return super().__getitem__(index)

  source = Unnamed([(value, 0) for value in (10, 20, 30)])
  with pytest.raises(ValueError, match="a: .*c: class 5, expected -1 to 3; are these the class names of this data set"):
    evaluation(tmp_path).run([Job("a", "set/a", "brightness", {"test": DataSource(source)})])
  assert not list((tmp_path / "results").glob("*.json"))


@pytest.mark.parametrize("cache", [True, False])
def test_images_that_cannot_be_read_now_end_the_evaluation_and_are_read_at_the_next_start(
  cache: bool, tmp_path: Path
) -> None:
  broken = [True]

  class Flaky(Greys):
    def __getitem__(self, index: int) -> dict[str, Any]:
      if broken[0] and index == 2:
        raise OSError(errno.EIO, "fails")
      return super().__getitem__(index)

  source = Flaky([(value, 0) for value in (10, 20, 30)])
  flaky = Job("a", "set/a", "brightness", {"test": DataSource(source)})
  with pytest.raises(OSError, match=r"a: .*fails.*; start this again") as caught:
    evaluation(tmp_path, cache=cache).run([flaky, job("b", 10)])
  assert command_line.report(caught.value) == command_line.IO_EXIT_CODE
  assert [path.name[:5] for path in (tmp_path / "results").glob("*.json")] == ["set_b"]  # the other one was evaluated
  broken[0] = False
  assert evaluation(tmp_path, cache=cache).run([flaky])["a"].ours["metrics"]["mean"] == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["damaged image", "too slow"])
def test_images_that_are_damaged_or_too_slow_do_not_end_the_evaluation(kind: str, tmp_path: Path) -> None:
  class Bad(Greys):
    def __getitem__(self, index: int) -> dict[str, Any]:
      if index == 1:
        raise BadSample(kind, "a:1: cannot be used")
      return super().__getitem__(index)

  bad = Job("a", "set/a", "brightness", {"test": DataSource(Bad([(10, 0), (20, 0), (30, 0)]))})
  result = evaluation(tmp_path, cache=True).run([bad])["a"].ours
  assert (result["metrics"]["images"], result["data"]["test"]["readable"]) == (3, 2)


def test_all_hosts_take_the_results_that_the_first_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  evaluation(tmp_path / "first").run([job("a", 10)])
  (content,) = (path.read_bytes() for path in (tmp_path / "first" / "results").glob("*.json"))
  monkeypatch.setattr(evaluation_lib, "from_first", lambda mine: mine or content)  # this host sees no file
  assert evaluation(tmp_path / "other").run([job("a", 10)])["a"].ours["metrics"]["mean"] == 0.1
  assert calls == ["a"]
  monkeypatch.setattr(evaluation_lib, "from_first", lambda _: b"")  # nor does the first one
  evaluation(tmp_path / "first").run([job("a", 10)])
  assert calls == ["a", "a"]


def test_images_of_finished_blocks_count_neither_in_a_plan_nor_on_the_bar(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(feature_cache, "BLOCK", 2)
  jobs, plain, left = [job("a", 10, 20, 30, 40, 50)], evaluation(tmp_path, cache=True), [2]

  def fail_later(images: np.ndarray) -> Any:
    left[0] -= 1
    if left[0] < 0:
      raise KeyboardInterrupt
    return plain.encoders.image(images)

  with pytest.raises(KeyboardInterrupt):
    replace(plain, encoders=replace(plain.encoders, image=fail_later)).run(jobs)
  again = evaluation(tmp_path, cache=True)
  assert again.plan(jobs)[1] == "1 of 1 result to compute, 3 images to encode"
  assert again._images_to_encode(jobs) == 3
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  monkeypatch.setattr(evaluation_lib, "from_first", lambda mine: mine)
  monkeypatch.setattr(evaluation_lib, "sum_over_hosts", lambda counts: 4 * counts)
  monkeypatch.setattr(Evaluation, "_images_per_second", lambda *_: 3.0)  # of this host
  lines = again.plan(jobs)
  assert lines[1].endswith(", 8 images to encode")  # each of these hosts has two
  assert "at 12 images/s" in lines[3]

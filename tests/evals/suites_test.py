"""Tests of `declip_jax.evals.suites`: the jobs of data files and suites, with their classes, prompts and metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
import io
from pathlib import Path
import re
import tarfile
from typing import Any

from greys import grey_encoders
import numpy as np
from PIL import Image
import pytest

from declip_jax.data.storage import layouts
from declip_jax.evals import EVALUATORS, catalogue, data_files, defaults, suites, variant_of
from declip_jax.evals.catalogue import Suite
from declip_jax.evals.jobs import DataSource, run_jobs
from declip_jax.evals.results import Result, Scores


def make_folder(folder: Path, names: tuple[str, ...]) -> str:
  for name in names:
    (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / name / "a.png")
  return f"folder:{folder}"


@pytest.fixture
def data(tmp_path: Path) -> Mapping[str, data_files.Splits]:
  """Three of CIFAR-10's classes are not enough; a set of two classes, and pairs of images and captions."""
  test = make_folder(tmp_path / "mine" / "test", ("cats", "dogs"))
  train = make_folder(tmp_path / "mine" / "train", ("cats", "dogs"))
  cifar = make_folder(tmp_path / "cifar", tuple(reversed(catalogue.data_set("cifar10").classes)))
  Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  (tmp_path / "pairs.tsv").write_text("filepath\ttitle\na.png\ta cat\n")
  lines = f"cifar10 = {cifar}\nown/mine = {test} | {train}\nown/pairs = table:{tmp_path}/pairs.tsv\n"
  return data_files.parse_data(lines, "sets.txt")


def test_tasks_fit_the_data_sets_and_need_their_splits(data: Mapping[str, data_files.Splits]) -> None:
  jobs, remarks = suites.make_jobs(data, tasks=["zero_shot", "retrieval", "knn"])
  assert [job.name for job in jobs] == [
    "cifar10/zero_shot",
    "own/mine/zero_shot",
    "own/mine/knn",
    "own/pairs/retrieval",
  ]
  assert remarks == ["cifar10: knn needs a split to train on: add | TRAIN to its line in the data file"]
  assert [*jobs[2].splits] == ["test", "train"]
  assert [*jobs[1].splits] == ["test"]
  assert jobs[1].splits["test"].source is jobs[2].splits["test"].source  # opened and encoded once
  assert [job.kind for job in suites.make_jobs(data)[0]] == ["zero_shot", "zero_shot", "retrieval"]


def test_classes_are_those_of_the_data_set_by_name(data: Mapping[str, data_files.Splits]) -> None:
  cifar, mine = suites.make_jobs(data, tasks=["zero_shot"])[0]
  entry = catalogue.data_set("cifar10")
  assert cifar.data["classnames"] == entry.classes
  names = cifar.splits["test"].source.classnames  # in alphabetical order
  assert [entry.classes[index] for index in cifar.splits["test"].classes] == [*names]
  assert cifar.dataset == "vtab/cifar10"
  assert len(cifar.data["prompts"][0]) == 18
  assert mine.data["prompts"] == (("a photo of a cats.",), ("a photo of a dogs.",))
  np.testing.assert_array_equal(mine.splits["test"].classes, [0, 1])


def test_own_data_with_classes_and_captions_are_also_for_retrieval() -> None:
  jobs, _ = suites.make_jobs({"own/x": data_files.Splits("scenes:test/4/16")})
  assert [(job.name, job.data["metric"]) for job in jobs] == [
    ("own/x/zero_shot", "top1"),
    ("own/x/retrieval", "mean_recall@1"),
  ]
  assert "classnames" not in jobs[1].data
  assert jobs[0].splits["test"] is jobs[1].splits["test"]  # encoded once


def test_prompts_may_lie_next_to_the_data(tmp_path: Path) -> None:
  spec = make_folder(tmp_path / "mine" / "test", ("cats", "dogs"))
  path = tmp_path / "mine" / layouts.TEMPLATES
  path.write_text("{c}\na photo of {c}\n")
  (job,) = suites.make_jobs({"own/mine": data_files.Splits(spec)}, tasks=["zero_shot"])[0]
  assert (job.data["prompts"][1], job.about["prompts"]) == (("dogs", "a photo of dogs"), "own")
  path.write_text("a photo\n")
  with pytest.raises(ValueError, match=rf"{layouts.TEMPLATES}: prompt template 'a photo' needs one {{}}"):
    suites.make_jobs({"own/mine": data_files.Splits(spec)}, tasks=["zero_shot"])


def test_a_suite_has_its_own_metric_and_prompts(data: Mapping[str, data_files.Splits]) -> None:
  suite = Suite("s", "", ("cifar10", "pets"), metrics={"cifar10": "mean_per_class"}, prompts={"*": "bare"})
  (job,), remarks = suites.make_jobs(data, [suite], ["zero_shot"])
  assert (job.data["metric"], job.variant, job.about["prompts"]) == ("mean_per_class", "bare-mean_per_class", "bare")
  assert job.data["prompts"][0] == (catalogue.data_set("cifar10").classes[0],)
  assert remarks == ["s: 1 of its 2 data sets are missing from the data file (see --print_data): pets"]
  (other,), _ = suites.make_jobs(data, [suite], ["zero_shot"], "openai")
  assert (other.variant, len(other.data["prompts"][0])) == ("mean_per_class", 18)  # has a file of its own


def test_prompts_may_come_from_a_file(data: Mapping[str, data_files.Splits], tmp_path: Path) -> None:
  (tmp_path / "mine.txt").write_text("my {}\nyour {}\n")
  jobs, _ = suites.make_jobs(data, tasks=["zero_shot"], prompts=str(tmp_path / "mine.txt"))
  assert jobs[1].data["prompts"] == (("my cats", "your cats"), ("my dogs", "your dogs"))
  assert {job.variant for job in jobs} == {"mine"}


@pytest.mark.parametrize(
  ("line", "tasks", "message"),
  [
    ("own/x = scenes:test/4/16", ["zeroshot"], r"--tasks=zeroshot: choose some of .*did you mean zero_shot"),
    ("own/x = scenes:nowhere", ["zero_shot"], "sets.txt:1: own/x: test: .*nowhere"),
    ("cifar10 = scenes:heldout/4/16", ["zero_shot"], "do not map one to one onto the 10 of cifar10"),
    ("own/x = scenes:heldout/4/16", ["composition"], "nothing to evaluate"),
  ],
)
def test_what_cannot_be_evaluated_is_named(line: str, tasks: list[str], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    suites.make_jobs(data_files.parse_data(line, "sets.txt"), tasks=tasks)


def test_a_source_that_cannot_be_opened_is_named_with_its_line_and_keeps_its_kind_of_error(tmp_path: Path) -> None:
  (tmp_path / "file").touch()
  for spec, kind in ((f"folder:{tmp_path}/none", FileNotFoundError), (f"folder:{tmp_path}/file", NotADirectoryError)):
    lines = f"cifar10 = scenes:heldout/4/16\nown/x = scenes:test/4/16 | {spec}\n"
    data = data_files.parse_data(lines, "sets.txt")
    with pytest.raises(kind, match=f"^sets.txt:2: own/x: train: {spec}"):
      suites.make_jobs({"own/x": data["own/x"]}, tasks=["knn"])


def test_each_protocol_of_several_suites_has_a_job_and_a_file_of_its_own(
  data: Mapping[str, data_files.Splits],
) -> None:
  first = Suite("first", "", ("cifar10",), prompts={"*": "openai"})
  second = Suite("second", "", ("cifar10",), metrics={"cifar10": "mean_per_class"}, prompts={"*": "bare"})
  third = Suite("third", "", ("cifar10",), prompts={"*": "bare"})
  names = ["cifar10/zero_shot", "cifar10/zero_shot/bare-mean_per_class", "cifar10/zero_shot/bare"]
  jobs, _ = suites.make_jobs(data, [first, second, third, first], ["zero_shot"])
  assert [job.name for job in jobs] == names
  assert [job.data["metric"] for job in jobs] == ["top1", "mean_per_class", "top1"]
  assert [len(job.data["prompts"][0]) for job in jobs] == [18, 1, 1]
  # The name of a file does not depend on the other suites of the command.
  for suite, job in zip((first, second, third), jobs, strict=True):
    (alone,), _ = suites.make_jobs(data, [suite], ["zero_shot"])
    assert (alone.name, alone.variant, alone.data) == (job.name, job.variant, job.data)


def test_probes_have_a_job_for_each_metric(data: Mapping[str, data_files.Splits]) -> None:
  first, second = (Suite(name, "", ("cifar10",), prompts={"*": name}) for name in ("openai", "bare"))
  third = Suite("third", "", ("cifar10",), metrics={"cifar10": "mean_per_class"})
  trained = {"cifar10": replace(data["cifar10"], train=data["cifar10"].test)}
  jobs, _ = suites.make_jobs(trained, [first, second, third], ["knn"])
  assert [(job.name, job.data["metric"]) for job in jobs] == [
    ("cifar10/knn", "top1"),
    ("cifar10/knn/mean_per_class", "mean_per_class"),
  ]


def result(
  key: str, value: float, kind: str = "knn", metric: str = "top1", options: dict | None = None, **about: str
) -> Result:
  ours = {"kind": kind, "headline": metric, "metrics": {metric: value}, "options": options or {}}
  return Result(key, "m", "p", kind, {}, {**ours, "about": {"key": key, "metric": metric, **about}})


def test_a_mean_needs_all_data_sets_of_its_suite() -> None:
  suite = Suite("s", "", ("cifar10", "cifar100"), means={"mean": ("cifar10", "cifar100")})
  found = {"a": result("cifar10", 0.5), "b": result("cifar100", 0.25), "c": result("pets", 1.0)}
  assert suites.means(found, [suite]) == {"s/knn/mean": 0.375}
  del found["b"]
  assert suites.means(found, [suite]) == {}


def test_a_mean_of_several_tasks_has_the_results_of_all_that_need_no_training() -> None:
  keys = ("mscoco", "winogavil", "cifar10")
  suite = Suite("s", "", keys, prompts={"*": "openai"}, means={"mean": keys, "retrieval": keys[:2], "c": keys[2:]})
  found = {
    "a": result("mscoco", 0.5, "retrieval", "mean_recall@1"),
    "b": result("winogavil", 0.25, "composition", "jaccard"),
    "c": result("cifar10", 0.75, "zero_shot", prompts="openai"),
    "d": result("cifar10", 1.0, "knn"),
  }
  expected = {"s/zero_shot/c": 0.75, "s/knn/c": 1.0, "s/mean": 0.5, "s/retrieval": 0.375}
  assert suites.means(found, [suite]) == expected
  del found["b"]
  assert suites.means(found, [suite]) == {"s/zero_shot/c": 0.75, "s/knn/c": 1.0}


def test_the_means_of_datacomp_are_those_of_its_38_tasks() -> None:
  suite, kinds = catalogue.suite("datacomp38"), {"classification": "zero_shot", "multilabel": "zero_shot"}
  found = {}
  for number, key in enumerate(suite.means["mean"]):
    kind = kinds.get(task := catalogue.data_set(key).task, task)
    prompts = {"prompts": suite.prompt_set(key)} if kind == "zero_shot" else {}
    found[key] = result(key, number / 100, kind, suite.metric(key) or "", **prompts)
  means = suites.means(found, [suite])
  assert means["datacomp38/mean"] == pytest.approx(np.mean(np.arange(38)) / 100)
  places = [suite.means["mean"].index(key) for key in ("flickr30k", "mscoco", "winogavil")]
  assert means["datacomp38/retrieval"] == pytest.approx(np.mean(places) / 100)
  assert {*means} == {f"datacomp38/{name}" for name in ("mean", "retrieval")} | {
    f"datacomp38/zero_shot/{name}" for name in ("ImageNet", "shifts", "VTAB")
  }


def test_a_mean_has_only_results_by_the_protocol_of_its_suite() -> None:
  clip27, slip26 = (
    Suite(name, "", ("imagenet",), prompts={"imagenet": of}, means={"mean": ("imagenet",)})
    for name, of in (("clip27", "openai"), ("slip26", "openai7"))
  )
  found = {
    "eighty": result("imagenet", 0.75, "zero_shot", prompts="openai"),
    "seven": result("imagenet", 0.5, "zero_shot", prompts="openai7"),
    "mine": result("imagenet", 1.0, "zero_shot", prompts="openai7.txt"),
    "other metric": result("imagenet", 0.25, "zero_shot", "mean_per_class", prompts="openai"),
    "ridge": result("imagenet", 0.125, "few_shot", options={"method": "ridge"}),
    "logistic": result("imagenet", 0.0625, "few_shot"),
  }
  shared = {"few_shot/mean": 0.0625, "few_shot/method=ridge/mean": 0.125}
  for suite, mean in ((clip27, 0.75), (slip26, 0.5)):
    expected = {"zero_shot/mean": mean, **shared}
    assert suites.means(found, [suite]) == {f"{suite.name}/{name}": value for name, value in expected.items()}
  vtab = Suite("vtab", "", ("pets",), metrics={"pets": "top1"}, means={"mean": ("pets",)})
  found = {"own": result("pets", 0.2, metric="mean_per_class"), "vtab": result("pets", 0.8)}
  assert suites.means(found, [vtab]) == {"vtab/knn/mean": 0.8}


@pytest.mark.parametrize(
  ("kind", "of", "unit"),
  [
    ("few_shot", lambda size: {"headline": f"shots_{size}"}, "shots"),
    ("knn", lambda size: {"headline": "top1", "details": {"neighbours": size}}, "neighbours"),
  ],
)
def test_a_mean_is_at_equal_numbers_of_training_images(
  kind: str, of: Callable[[int], dict[str, Any]], unit: str
) -> None:
  keys = ("flowers", "cifar10", "dtd")
  suite = Suite("s", "", keys, means={"mean": keys, "two": keys[:2]})

  def of_size(key: str, value: float, size: int) -> Result:
    ours = {"kind": kind, "metrics": {f"shots_{size}": value, "top1": value}, "options": {}, "details": {}, **of(size)}
    return Result(key, "m", "p", kind, {}, {**ours, "about": {"key": key, "metric": suite.metric(key)}})

  found = {"a": of_size("flowers", 0.5, 8), "b": of_size("cifar10", 0.9, 16), "c": of_size("dtd", 0.7, 16)}
  assert suites.means(found, [suite]) == {f"s/{kind}/mean_of_2_sets_with_16_{unit}": pytest.approx(0.8)}
  found["a"] = of_size("flowers", 0.5, 16)
  assert suites.means(found, [suite]) == {f"s/{kind}/mean": pytest.approx(0.7), f"s/{kind}/two": pytest.approx(0.7)}


def test_options_are_read_checked_and_in_the_name_of_the_file(data: Mapping[str, data_files.Splits]) -> None:
  given = ["few_shot.shots=1,2", "few_shot.method=ridge", "knn.headline=20"]
  few, knn = suites.make_jobs(data, tasks=["few_shot", "knn"], options=given)[0]
  assert few.options == {"shots": (1, 2), "method": "ridge"}
  assert (few.variant, few.name) == ("method=ridge,shots=1,2", "own/mine/few_shot/method=ridge,shots=1,2")
  assert (knn.options, knn.variant) == ({}, "")  # the default
  assert variant_of("few_shot", {"shots": [1, 2, 4, 8, 16], "seeds": [0]}) == "seeds=0"  # as JSON has them
  (job,) = suites.make_jobs(data, tasks=["retrieval"], options=["retrieval.prefix=a photo of "])[0]
  assert job.options == {"prefix": "a photo of "}
  assert job.variant.startswith("options-")


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ("shots=5", "expected TASK.OPTION=VALUE"),
    (
      "few_shots.shots=5",
      r"the option is for 'few_shots', but the tasks are few_shot, zero_shot; did you mean few_shot",
    ),
    ("few_shot.shot=5", r"no option 'shot'; .*shots.*did you mean shots"),
    ("few_shot.shots=many", r"few_shot.shots=many: expected a whole number, as the default 1,2,4,8,16"),
    ("few_shot.shots=0", r"few_shot.shots=\(0,\)"),
    ("few_shot.method=lasso", r"few_shot.method='lasso'.*ridge"),
    ("few_shot.strength=-1", r"few_shot.strength=-1.0"),
    ("zero_shot.templates=a {}", r"those of --prompts"),
  ],
)
def test_options_that_do_not_fit_are_named(option: str, message: str, data: Mapping[str, data_files.Splits]) -> None:
  with pytest.raises(ValueError, match=message):
    suites.make_jobs(data, tasks=["few_shot", "zero_shot"], options=[option])


def test_the_documentation_lists_the_options_of_all_tasks() -> None:
  text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
  found = re.findall(r"^\| ([\w, ]+) \| `(\w+)` \| (?:`(.*?)`)? ?\|", text, re.MULTILINE)
  documented = {(task, option): default for tasks, option, default in found for task in tasks.split(", ")}
  expected = {
    (task, option): ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    for task in EVALUATORS
    for option, default in defaults(task).items()
    if option != "templates"  # the prompts of data sets are those of --prompts
  }
  assert documented == expected


def test_a_task_that_fits_no_data_set_is_named(data: Mapping[str, data_files.Splits]) -> None:
  pairs = {"own/pairs": data["own/pairs"]}
  _, remarks = suites.make_jobs(pairs, tasks=["retrieval", "knn"])
  assert remarks == ["knn fits none of the data sets: it needs classification data"]
  with pytest.raises(ValueError, match="nothing to evaluate: zero_shot fits none of the data sets: it needs classific"):
    suites.make_jobs(pairs, tasks=["zero_shot"])


def write_shard(path: Path, samples: Sequence[tuple[str, bytes]]) -> None:
  """A shard of one grey image each, with another file."""
  Image.new("RGB", (8, 8)).save(image := io.BytesIO(), "PNG")
  with tarfile.open(path, "w") as file:
    for number, (suffix, other) in enumerate(samples):
      for ending, content in (("png", image.getvalue()), (suffix, other)):
        member = tarfile.TarInfo(f"{number}.{ending}")
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))


def test_a_result_on_clip_benchmarks_voc_says_that_difficult_objects_are_not_marked(tmp_path: Path) -> None:
  def labels(number: int) -> bytes:
    np.save(file := io.BytesIO(), np.arange(20) == number)
    return file.getvalue()

  (tmp_path / "test").mkdir()
  write_shard(tmp_path / "test" / "0.tar", [("npy", labels(number)) for number in range(20)])
  names = "\n".join(catalogue.data_set("voc2007").classes)
  for name, text in (("test/nshards.txt", "1"), ("dataset_type.txt", "multilabel"), ("classnames.txt", names)):
    (tmp_path / name).write_text(text)
  jobs, _ = suites.make_jobs(data_files.parse_data(f"voc2007 = clip_benchmark:{tmp_path}\n", ""), tasks=["zero_shot"])
  encoders = replace(grey_encoders(20), text=lambda tokens: np.repeat(tokens, 2, axis=1).astype(np.float32))
  ((_, found),) = run_jobs(jobs, encoders, lambda job: None)
  assert isinstance(found, Scores)
  assert "the labels mark no object as difficult" in found.details["remark"]


def test_images_with_labels_but_without_names_of_classes_are_rejected(tmp_path: Path) -> None:
  write_shard(tmp_path / "a.tar", [("cls", b"1")])
  with pytest.raises(ValueError, match=r"own/a: webdataset:.*a.tar: its images have labels, but .* classnames.txt"):
    suites.make_jobs({"own/a": data_files.Splits(f"webdataset:{tmp_path}/a.tar")})


def test_the_border_of_objectnet_is_cut_and_that_of_the_data_to_train_on_is_not(tmp_path: Path) -> None:
  objectnet, imagenet = catalogue.data_set("objectnet"), catalogue.data_set("imagenet")
  test = make_folder(tmp_path / "objectnet", (*objectnet.folders, *objectnet.others))
  train = make_folder(tmp_path / "imagenet", imagenet.folders)

  def splits(specs: str) -> Mapping[str, DataSource]:
    return suites.make_jobs(data_files.parse_data(f"objectnet = {specs}\n", ""), tasks=["knn"])[0][0].splits

  found = splits(f"{test} | {train}")
  assert {name: split.source.name for name, split in found.items()} == {"test": f"border:2:{test}", "train": train}
  assert found["test"].source[0]["image"].shape == (4, 4, 3)
  assert splits(f"border:0:{test} | {train}")["test"].source.name == f"border:0:{test}"
  assert catalogue.data_set("imagenet_on_objectnet").border == 0  # has the classes of ObjectNet, not its images

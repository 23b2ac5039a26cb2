"""Tests of the evaluations of a config: bad ones are rejected before anything runs."""

from collections.abc import Callable
import contextlib
import copy
import dataclasses
import functools
import inspect
from pathlib import Path
import re
from types import SimpleNamespace

from absl import flags
from clips import make_clip
from flax.traverse_util import flatten_dict, unflatten_dict
from greys import Greys
import jax
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest
import references as reference

from declip_jax import build, config, evaluate
from declip_jax.build import check_best_metric, check_evals, make_evaluators, make_jobs
from declip_jax.clip import Clip
from declip_jax.data.images import EvalView
from declip_jax.data.pipeline import Reading
from declip_jax.evals import EVALUATORS, Evaluator, catalogue, features
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.evaluation import Evaluation
from declip_jax.evals.features import DecodedImages, EvaluationData
from declip_jax.evals.jobs import DataSource, Job, run_jobs
from declip_jax.evals.results import Scores


def fake_encoders() -> Encoders:
  return Encoders(
    lambda images: (images, None), lambda tokens: tokens, lambda texts: texts, EvalView(4), 4, np.arange(4)
  )


@pytest.mark.parametrize(
  ("weights", "legal"),
  [
    ({"clip": 1.0}, True),
    ({"filip": 1.0}, True),
    ({"sigmoid": 1.0, "simclr": 1.0}, True),
    ({"nns": 0.2}, True),
    ({"simclr": 1.0}, False),
    ({"simclr": 1.0, "clip": 0.0}, False),
    ({"simsiam": 1.0, "mlm": 1.0}, False),  # there is a joint space, but nothing is compared in it
  ],
)
def test_evaluations_of_a_run_without_image_text_comparison_are_rejected(weights, legal):
  objective = reference.objective(weights)
  check_evals(ConfigDict(), objective)
  evals = ConfigDict({"heldout": config.zero_shot("scenes:heldout")})
  if legal:
    check_evals(evals, objective)
    return
  with pytest.raises(
    ValueError, match=r"config.evals has \['heldout'\].*config.objective.*{'sim.*give one of \['clip'"
  ):
    check_evals(evals, objective)


def test_entries_of_configs_have_the_defaults_of_their_evaluators() -> None:
  assert set(EVALUATORS) - set(config.EVALUATIONS) <= {"toy"}  # with --extended
  for make in config.EVALUATIONS.values():
    entry = make("scenes:heldout").to_dict()
    assert (entry.pop("every"), entry.pop("train", ""), entry.pop("val", ""), entry.pop("suite")) == (1, "", "", "")
    arguments = inspect.signature(EVALUATORS[entry.pop("kind")].function).parameters.values()
    options = {argument.name: argument.default for argument in arguments if argument.kind is argument.KEYWORD_ONLY}
    assert entry == {"data": "scenes:heldout", **options}


def test_a_run_without_texts_may_have_evaluations_that_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(EVALUATORS, "knn", Evaluator(lambda data, pictures: Scores({}), needs_text=False))
  evals = ConfigDict({"heldout": config.zero_shot("scenes:heldout"), "near": {"kind": "knn", "data": "scenes:heldout"}})
  objective = reference.objective({"simclr": 1.0})
  with pytest.raises(ValueError, match=r"config.evals has \['heldout'\]"):
    check_evals(evals, objective)
  del evals.heldout
  check_evals(evals, objective)
  evals.near.kind = "kmm"  # that it does not exist comes before what it needs
  with pytest.raises(ValueError, match=r"config.evals.near.kind='kmm'"):
    check_evals(evals, objective)


def test_joint_embeddings_need_a_joint_space() -> None:
  evals = ConfigDict({"near": config.knn("scenes:heldout", train="scenes:train", features="joint")})
  check_evals(evals, reference.objective({"clip": 1.0}))
  with pytest.raises(
    ValueError, match=r"config.evals.near.features='joint': .* trains no joint space.*choose 'pooled'"
  ):
    check_evals(evals, reference.objective({"simclr": 1.0}))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"kind": "kmm"}, r"config.evals.mine.kind='kmm'.*'retrieval'.*'zero_shot'"),
    ({"kind": "zeroshot"}, r"config.evals.mine.kind='zeroshot'.*did you mean zero_shot"),
    ({}, r"config.evals.mine has no field kind: choose one of \[.*'retrieval', .*'zero_shot'\]"),
    ({"kind": "knn"}, r"config.evals.mine.train='': 'knn' needs a source to train on"),
    ({"kind": "linear_probe", "train": "scenes:test/4/16", "features": "text"}, r"config.evals.mine.features='text'"),
    ({"kind": "retrieval", "data": ""}, r"config.evals.mine.data=''"),
    ({"kind": "retrieval", "train": "scenes:test/4/16"}, r"config.evals.mine.train='scenes:test/4/16': 'retrieval'"),
    ({"kind": "retrieval", "every": 0}, r"config.evals.mine.every=0"),
    (
      {"kind": "retrieval", "templates": ()},
      r"config.evals.mine .*\['templates'\].*'retrieval'.*\['equal_texts', 'folds', 'prefix'\]",
    ),
    ({"kind": "retrieval", "equal_text": True}, r"\['equal_text'\].*did you mean equal_texts"),
    ({"kind": "retrieval", "equal_texts": "no"}, r"config.evals.mine.equal_texts='no': expected True or False"),
    (
      {"kind": "zero_shot", "templates": ("a photo",)},
      r"config.evals.mine.templates: prompt template 'a photo' needs one {}",
    ),
    ({"kind": "zero_shot", "templates": ("a {} in {place}",)}, r"template 'a {} in {place}'"),
    ({"kind": "zero_shot", "templates": ("a {c}.",)}, r"template 'a {c}.'"),
    ({"kind": "zero_shot", "templates": "a {}."}, r"templates='a {}.': expected a tuple of prompt templates"),
    ({"kind": "zero_shot", "templates": ()}, r"templates=\(\): expected a tuple of prompt templates"),
  ],
)
def test_evaluations_that_do_not_exist_are_rejected(fields, message, tmp_path):
  evals = ConfigDict({"mine": {"data": "scenes:test/4/16", **fields}})
  with pytest.raises(ValueError, match=message):
    make_evaluators(evals, tmp_path)


def test_sources_that_do_not_fit_an_evaluation_are_rejected(tmp_path: Path) -> None:
  for label in ("cats", "dogs"):
    (tmp_path / "classes" / label).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "classes" / label / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / f"{label}.png")
    (tmp_path / f"{label}.txt").write_text("a caption")
  (tmp_path / "pairs.tsv").write_text("filepath\ttitle\ncats.png\ta cat\ndogs.png\ta dog\n")
  evals = ConfigDict({"mine": config.zero_shot(f"table:{tmp_path}/pairs.tsv")})
  with pytest.raises(ValueError, match=r"pairs.tsv has no class names, which config.evals.mine needs"):
    make_evaluators(evals, tmp_path)
  evals = ConfigDict({"mine": config.retrieval(f"folder:{tmp_path}/classes")})
  with pytest.raises(ValueError, match=r"classes has classes but no captions, which config.evals.mine needs"):
    make_evaluators(evals, tmp_path)
  make_evaluators(ConfigDict({"mine": config.zero_shot(f"folder:{tmp_path}/classes")}), tmp_path)
  make_evaluators(ConfigDict({"mine": config.retrieval(f"table:{tmp_path}/pairs.tsv")}), tmp_path)


def test_an_evaluation_may_run_at_every_third_evaluation_of_a_run(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  monkeypatch.setitem(EVALUATORS, "one", Evaluator(lambda data, pictures: Scores({"x": 1.0}), needs_text=False))
  entry = {"kind": "one", "data": "scenes:test/4/16"}
  run = make_evaluators(ConfigDict({"often": entry, "seldom": {**entry, "every": 3}}), tmp_path)
  found = [[*run(fake_encoders(), number)] for number in (1, 2, 3, 0)]
  both = ["eval/often/x", "eval/seldom/x"]
  assert found == [both[:1], both[:1], both, both]


def test_an_entry_may_stand_for_the_data_sets_of_a_data_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  def count(data: EvaluationData, pictures: Path | None, *, factor: float = 1.0) -> Scores:
    assert pictures is None
    return Scores({"x": factor * len(data.test.rows) / (2 if data.prompts is None else 1), "images": 1})

  one = Evaluator(count, of=("classification",))
  monkeypatch.setitem(EVALUATORS, "one", one)
  monkeypatch.setitem(EVALUATORS, "two", one._replace(needs_text=False, needs_train=True))
  file = tmp_path / "sets.txt"
  file.write_text("own/few = scenes:test/4/16 | scenes:train/6/16\nown/more = scenes:test/5/16 | scenes:train/7/16\n")
  common = {"data": str(file), "suite": "all"}
  evals = ConfigDict({"mine": {"kind": "one", **common}, "probe": {"kind": "two", **common, "factor": 2.0, "every": 2}})
  run = make_evaluators(evals, tmp_path)
  often = {"eval/mine/own/few": 4.0, "eval/mine/own/more": 5.0}
  encoders = dataclasses.replace(fake_encoders(), tokenizer=lambda texts: np.zeros((len(texts), 1), np.int32))
  assert run(encoders, 1) == often
  assert run(encoders, 2) == {**often, "eval/probe/own/few": 4.0, "eval/probe/own/more": 5.0}
  jobs = make_jobs(evals)
  assert [job.splits["test"] for job in jobs[:2]] == [job.splits["test"] for job in jobs[2:]]  # encoded once for both
  assert [*jobs[2].splits] == ["test", "train"]


def test_an_evaluation_that_fails_is_reported_once_and_the_training_goes_on(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  errors = {4: ValueError("no image"), 6: TypeError("a bug")}

  def count(data: EvaluationData, pictures: Path | None) -> Scores:
    if error := errors.get(len(data.test.rows)):
      raise error
    return Scores({"x": float(len(data.test.rows))})

  monkeypatch.setitem(EVALUATORS, "one", Evaluator(count, of=("classification",), needs_text=False))
  lines = (f"own/{name} = scenes:test/{size}/16\n" for name, size in (("a", 4), ("b", 5), ("c", 6)))
  (tmp_path / "sets.txt").write_text("".join(lines))
  entries = {
    "mine": {"kind": "one", "data": str(tmp_path / "sets.txt"), "suite": "all"},
    "alone": {"kind": "one", "data": "scenes:test/4/16"},
  }
  run = make_evaluators(ConfigDict(entries), tmp_path)
  for number in (1, 2):
    assert run(fake_encoders(), number) == {"eval/mine/own/b": 5.0}
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert told == [
      "warning: training continues without the metrics of config.evals.alone: no image; config.evals.mine/own/a: no "
      "image; config.evals.mine/own/c: TypeError: a bug"
    ] * (number == 1)
  errors[4] = MemoryError("out of memory")
  with pytest.raises(MemoryError):
    run(fake_encoders(), 3)


def test_an_error_of_another_host_is_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(EVALUATORS, "one", Evaluator(lambda data, pictures: Scores({"x": 1.0}), needs_text=False))
  monkeypatch.setattr("declip_jax.evals.jobs.first_error", lambda mine: mine or "host 1: no image")
  entries = ConfigDict({"mine": {"kind": "one", "data": "scenes:test/4/16"}})
  ((_, found),) = run_jobs(make_jobs(entries), fake_encoders(), lambda job: None)
  assert isinstance(found, ValueError)
  assert str(found) == "host 1: no image"


@pytest.mark.parametrize(("late", "kind"), [("host 1: 3 fails", OSError), ("", ValueError)])
def test_a_sample_that_another_host_cannot_use_ends_reading_on_all(
  late: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
  errors = iter([late, "host 1: no label"] if not late else [late])
  monkeypatch.setattr(features, "any_host", lambda mine: True)
  monkeypatch.setattr(features, "first_error", lambda mine: mine or next(errors))
  source = make_jobs(ConfigDict({"mine": config.zero_shot("scenes:test/4/16")}))[0].splits["test"].source
  with pytest.raises(kind, match="host 1: "):
    next(iter(features.surely(features.read_batches)(source, fake_encoders(), range(4))))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"suite": "slip27"}, r"config.evals.mine: no suite 'slip27'.*slip26"),
    ({"suite": "slip26"}, r"config.evals.mine: nothing to evaluate: slip26: all 26 data sets are missing"),
    ({"kind": "composition"}, r"config.evals.mine: nothing to evaluate: composition fits none of the data"),
    ({"kind": "knn"}, r"config.evals.mine: nothing to evaluate: own/few: knn needs a split to train on"),
    ({"kind": "knn", "train": "scenes:test/4/16"}, r"mine.train='scenes:test/4/16': the splits of suite='all'"),
    ({"templates": ("a {}",)}, r"config.evals.mine.templates=\('a {}',\): suite='all' has prompts of its own"),
  ],
)
def test_a_suite_that_does_not_fit_a_data_file_is_rejected(
  fields: dict[str, object], message: str, tmp_path: Path
) -> None:
  (tmp_path / "sets.txt").write_text("own/few = scenes:test/4/16\n")
  entry = {"kind": "zero_shot", "data": str(tmp_path / "sets.txt"), "suite": "all", **fields}
  with pytest.raises(ValueError, match=message):
    make_evaluators(ConfigDict({"mine": entry}), tmp_path)


def test_the_mean_of_a_suite_needs_all_its_data_sets() -> None:
  evals = ConfigDict({"mine": {"suite": "declip11"}, "all": {"suite": "all"}, "heldout": {}})
  found = {f"eval/mine/{key}": index / 10 for index, key in enumerate(catalogue.suite("declip11").keys)}
  assert build._means(evals, found) == {"eval/mine/mean": pytest.approx(0.5)}
  del found["eval/mine/pets"]
  assert build._means(evals, found) == {}


def test_the_mean_of_a_suite_in_training_is_at_equal_numbers_of_shots(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  def few(data: EvaluationData, pictures: Path | None) -> Scores:
    value = len(data.test.rows) / 10
    return Scores({"shots_8" if value == 0.4 else "shots_16": value, "images": 1})

  monkeypatch.setitem(EVALUATORS, "few_shot", Evaluator(few, needs_text=False, of=("classification",)))
  keys = ("own/few", "own/more", "own/most")
  toys = catalogue.Suite("toys", "", keys, means={"mean": keys})
  monkeypatch.setattr(catalogue, "suite", lambda name: toys)
  file = tmp_path / "sets.txt"
  file.write_text("".join(f"{key} = scenes:test/{4 + place}/16\n" for place, key in enumerate(keys)))
  evals = ConfigDict({"mine": {"kind": "few_shot", "data": str(file), "suite": "toys"}})
  found = make_evaluators(evals, tmp_path)(fake_encoders(), 1)
  means = {name: value for name, value in found.items() if "mean" in name}
  assert means == {"eval/mine/mean_of_2_sets_with_16_shots": pytest.approx(0.55)}


def test_an_evaluation_encodes_each_text_and_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  limits, encoded = [], {"images": 0, "texts": 0}

  class Recorded(DecodedImages):
    def __init__(self, limit: int):
      limits.append(limit)
      super().__init__(limit)

  def image(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    encoded["images"] += 1
    pixels = images[:, 0, 0].astype(np.float32)
    return pixels, pixels + 1

  def text(tokens: np.ndarray) -> np.ndarray:
    encoded["texts"] += 1
    return tokens.astype(np.float32)

  def tokenizer(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), len(set(text)), 1] for text in texts])

  monkeypatch.setattr(build, "DecodedImages", Recorded)
  same = config.zero_shot("scenes:heldout/40/16")
  evals = ConfigDict({"first": same, "second": same, "near": config.nearest_mean("scenes:heldout/40/16")})
  evals.near.train = "scenes:heldout/40/16"
  run = make_evaluators(evals, tmp_path, cache_gib=0.5)
  for number in (1, 2):
    run(Encoders(image, text, tokenizer, EvalView(16), 64, np.arange(64)), number)
    assert encoded == {"images": number, "texts": number}  # 40 images and 30 prompts are a batch each
  assert limits == [2**29]


@pytest.mark.parametrize("entry", [3, "scenes:test"])
def test_an_entry_that_is_not_an_evaluation_is_rejected(entry: object, tmp_path: Path) -> None:
  with pytest.raises(ValueError, match=rf"config.evals.mine={entry!r}: expected an evaluation"):
    make_evaluators(ConfigDict({"mine": entry}), tmp_path)
  with pytest.raises(ValueError, match=r"config.evals.a/b: the name"):
    make_evaluators(ConfigDict({"a/b": config.zero_shot("scenes:test/4/16")}), tmp_path)


@pytest.mark.parametrize(
  ("metric", "message"),
  [
    ("eval/mine/top1", ""),
    ("eval/mine/acc1", r"best_metric='eval/mine/acc1': config.evals.mine has the metrics top1, top5"),
    ("eval/mine/top", r"did you mean top"),
    ("eval/yours/top1", r"NAME one of \['mine'\]"),
    ("mine/top1", r"expected eval/NAME/METRIC"),
    ("eval/mine", r"expected eval/NAME/METRIC"),
  ],
)
def test_a_best_metric_that_no_evaluation_has_is_rejected(metric: str, message: str) -> None:
  c = config.default()
  c.evals.mine, c.checkpoint.best_metric = config.zero_shot("scenes:test/4/16"), metric
  with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
    check_best_metric(c)
  c.evals.mine.suite = "slip26"
  c.checkpoint.best_metric = "eval/mine/pets"
  check_best_metric(c)


def test_step_and_settings_are_those_of_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  calls = []

  def load(*args: object, **kwargs: object) -> None:
    calls.append((args, kwargs))
    raise FileNotFoundError("no weights")

  monkeypatch.setattr(evaluate, "load", load)
  with pytest.raises(FileNotFoundError, match="no weights"):
    evaluate.evaluate(tmp_path, "best", weights="x.pt", settings={"image.heads": 2})
  assert calls == [(("x.pt", {"image.heads": 2}), {"step": "best"})]


def test_images_are_read_with_the_limits_of_the_run_unless_one_is_given(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  c, given = config.default(), []
  c.data.max_pixels, c.data.max_seconds = 99, 5.0
  (tmp_path / "config.json").write_text(c.to_json_best_effort())

  class Loaded:
    step = 1

    def encoders(self, *_: object, reading: Reading, **kwargs: object) -> None:
      given.append((reading.max_pixels, reading.seconds))
      raise FileNotFoundError("no encoders")

  monkeypatch.setattr(evaluate, "load", lambda *_, **kwargs: Loaded())
  monkeypatch.setattr(evaluate, "_model_facts", lambda *_: None)
  evals = config.default().evals
  evals.mine = config.zero_shot("scenes:test/4/16")
  for workdir in (tmp_path, tmp_path / "none"):
    for limits in ({}, {"max_pixels": 7}, {"max_seconds": 0.0}):
      with pytest.raises(FileNotFoundError, match="no encoders"):
        evaluate.evaluate(workdir, evals=evals, weights="x.pt", **limits)
  assert given == [(99, 5.0), (7, 5.0), (99, 0.0), (2**26, 60.0), (7, 60.0), (2**26, 0.0)]


def identities(clip: Clip, folder: Path) -> dict[str, str]:
  """Keys of a result, of features of images and of embeddings of texts."""
  facts, encoders = evaluate._model_facts(clip, "x.pt"), fake_encoders()
  source = Greys([(1, 0)])
  job = Job("a", "a", "zero_shot", {"test": DataSource(source)})
  images, texts = clip.feature_cache(folder), clip.text_cache(folder)
  return {
    "result": Evaluation(facts, encoders, folder)._key(job),
    "image": images.entry(source, encoders).name,
    "text": texts.entry.name,
  }


def test_results_and_features_depend_on_every_field_of_the_model(tmp_path: Path) -> None:
  clip = make_clip(0)
  before = identities(clip, tmp_path)
  assert identities(clip, tmp_path) == before
  fields = flatten_dict(clip.fields, sep=".")
  assert {"image.activation", "text.activation", "text.context_length", "text.tokenizer"} <= set(fields)
  for field in fields:
    other = copy.copy(clip)
    other.fields = unflatten_dict({**fields, field: "another"}, sep=".")
    changed = {name for name, key in identities(other, tmp_path).items() if key != before[name]}
    top = field.partition(".")[0]
    assert "result" in changed, field
    if top == "heads":
      assert changed == {"result", "image", "text"}, field
    elif top in ("image", "text"):
      assert changed == {"result", top}, field
  other = copy.copy(clip)
  other.tokens = True
  assert identities(other, tmp_path)["result"] != before["result"]


def test_results_of_an_average_and_of_the_weights_have_names_of_their_own() -> None:
  clip = copy.copy(make_clip(0))
  clip.step, clip.average = 8, 0.0
  raw = evaluate._model_facts(clip, "runs/a")
  clip.average = 0.99
  average = evaluate._model_facts(clip, "runs/a")
  assert (raw.pretrained, average.pretrained) == ("step-8", "step-8-average")
  assert average.weights == {**raw.weights, "average": 0.99}
  assert evaluate._about(clip, None) == {"step": 8, "average": 0.99}


def test_results_of_models_on_the_hub_have_their_names_and_revisions() -> None:
  clip = make_clip(0)
  assert evaluate._model_facts(clip, "hf-hub:org/B-16.v2@1.0").name == "B-16.v2@1.0"
  assert evaluate._model_facts(clip, "weights/B-16.v2.pt").name == "B-16"


def test_results_and_features_depend_on_backend_and_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  clip, found = make_clip(0), []
  for precision in ("default", "highest"):
    with jax.default_matmul_precision(precision):
      found.append(identities(clip, tmp_path))
  monkeypatch.setattr(jax, "default_backend", lambda: "another")
  found.append(identities(clip, tmp_path))
  for name in found[0]:
    assert len({keys[name] for keys in found}) == 3, name


def make_classes(folder: Path, names: tuple[str, ...]) -> str:
  for name in names:
    (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / name / "a.png")
  return f"folder:{folder}"


def test_classes_to_train_on_are_those_of_the_test_split_by_name(tmp_path: Path) -> None:
  test = make_classes(tmp_path / "test", ("cat", "dog", "fox"))
  train = make_classes(tmp_path / "train", ("dog", "fox", "CAT"))
  entry = {"kind": "nearest_mean", "data": test}
  (job,) = make_jobs(ConfigDict({"mine": {**entry, "train": train, "val": test}}))
  names = job.splits["train"].source.classnames
  assert [("cat", "dog", "fox")[index] for index in job.splits["train"].classes] == [name.lower() for name in names]
  assert job.splits["test"] is job.splits["val"]
  assert job.splits["test"].classes is None
  fewer = make_classes(tmp_path / "fewer", ("dog", "fox"))
  with pytest.raises(ValueError, match=r"config.evals.mine.train: .*only in .*'cat'"):
    make_jobs(ConfigDict({"mine": {**entry, "train": fewer}}))


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Job] | None]:
  """The jobs of some flags of the command."""

  def jobs(*arguments: str) -> list[Job] | None:
    values = flags.FlagValues()
    with monkeypatch.context() as patch:
      patch.setattr(flags, "FLAGS", values)
      for name in ("string", "bool", "integer", "float", "list", "multi_string", "enum"):
        patch.setattr(flags, f"DEFINE_{name}", functools.partial(getattr(flags, f"DEFINE_{name}"), flag_values=values))
      patch.setattr(evaluate, "launch", lambda *_, **kwargs: values(["evaluate", *arguments]))
      evaluate.main()
      return evaluate._jobs_from_flags()

  return jobs


def test_two_sources_or_prompts_of_flags_do_not_share_a_file(given: Callable[..., list[Job] | None]) -> None:
  one, two = "scenes:test/4/16", "scenes:heldout/4/16"
  commands = [
    [f"--zero_shot={one}"],
    [f"--zero_shot={two}"],
    [f"--zero_shot={one}", "--template=a {}."],
    [f"--retrieval={one}"],
    [f"--retrieval={one}", "--equal_texts"],
  ]
  evaluation = Evaluation(evaluate._model_facts(make_clip(0), "x.pt"), fake_encoders(), Path())
  stems = [evaluation._result_of(job, {}).stem for command in commands for job in given(*command)]
  assert len(set(stems)) == len(commands)
  assert all("scenes" in stem for stem in stems)
  assert given() is None


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--data=x", "--zero_shot=scenes:test/4/16"), "--data and --zero_shot are two evaluations"),
    (("--suite=slip26", "--retrieval=scenes:test/4/16"), "--suite and --retrieval"),
    (("--tasks=knn",), "--tasks has an effect only with --data"),
    (("--prompts=bare",), "--prompts has an effect only with --data"),
    (("--option=knn.headline=1", "--zero_shot=scenes:test/4/16"), "--option has an effect only with --data"),
    (("--template=a {}", "--data=x"), "--template has an effect only with --zero_shot"),
    (("--equal_texts", "--data=x"), "--equal_texts has an effect only with --retrieval"),
  ],
)
def test_flags_without_effect_are_rejected(
  arguments: tuple[str, ...], message: str, given: Callable[..., list[Job] | None]
) -> None:
  with pytest.raises(ValueError, match=message):
    given(*arguments)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--zero_shot=scene:x"], "^--zero_shot: scene:x: 'scene' is not a kind of source; .*did you mean scenes"),
    (["--zero_shot=nofolder"], "^--zero_shot: nofolder: no file matches nofolder; in "),
    (["--zero_shot=folder:{data}/cats"], r"has no class names, which --zero_shot needs"),
    (["--zero_shot=scenes:test/4/16", "--template=a photo"], "^--template: prompt template 'a photo'"),
    (["--retrieval=scenes:test/x"], "^--retrieval: .*test/x"),
    (["--retrieval={data}"], "no captions, which --retrieval needs"),
    (["--zero_shot=scenes:test/4/16", "--retrieval=nothing:x"], "^--retrieval: nothing:x: "),
  ],
)
def test_bad_values_of_flags_are_named_by_the_flag(
  arguments: list[str], message: str, given: Callable[..., list[Job] | None], tmp_path: Path
) -> None:
  (tmp_path / "cats").mkdir()
  Image.new("RGB", (8, 8)).save(tmp_path / "cats" / "a.png")
  with pytest.raises((ValueError, FileNotFoundError), match=message) as found:
    given(*(text.format(data=tmp_path) for text in arguments))
  assert "config." not in str(found.value)


def test_a_bad_source_of_a_config_is_named_by_its_entry() -> None:
  with pytest.raises(ValueError, match=r"^config.evals.mine: bad source 'nothing:x'"):
    make_jobs(ConfigDict({"mine": config.zero_shot("nothing:x")}))


def test_a_batch_size_that_does_not_fit_the_devices_is_named_by_its_flag() -> None:
  clip, place = make_clip(0), evaluate.Place("runs/x", Path("out"), None)
  encoding = evaluate.Encoding(3, None, None, None, 0, "float32")
  jobs = make_jobs(ConfigDict({"zero_shot": config.zero_shot("scenes:test/4/16")}))
  with pytest.raises(ValueError, match=r"^--batch_size=3: expected a positive multiple of the number of devices, 8"):
    evaluate._prepare(clip, None, evaluate._model_facts(clip, "x.pt"), jobs, place, encoding)


def test_an_error_of_the_model_names_the_settings_of_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
  def message(settings: list[str], error: str) -> str:
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(settings=settings))
    with pytest.raises(ValueError, match=re.escape(error)) as found, evaluate._named_settings():
      raise ValueError(error)
    return str(found.value)

  wrong = "x.pt: config.model.dtype='int'"
  assert message(["dtype=int", "eps=1"], wrong) == f"with --settings=dtype=int --settings=eps=1: {wrong}"
  assert message([], wrong) == wrong
  assert message(["dtype"], "--settings: 'dtype'") == "--settings: 'dtype'"


def test_a_run_without_evaluations_is_told_from_a_folder_without_a_config() -> None:
  clip, c = make_clip(0), config.default()
  c.evals = ConfigDict()
  place = evaluate.Place("runs/x", Path("out"), None)
  for own, message in ((c, "runs/x has no evaluations in its config"), (None, "runs/x has no config.json")):
    with pytest.raises(ValueError, match=message):
      evaluate._prepare(clip, own, evaluate._model_facts(clip, "x.pt"), [], place, None)

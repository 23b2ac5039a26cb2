"""Tests of the catalogue: its numbers are those of the papers and of the released code."""

from dataclasses import replace
import itertools
import json
from pathlib import Path

import pytest

from declip_jax.data.sources import SOURCES
from declip_jax.evals import catalogue
from declip_jax.evals.catalogue import data_set, suite
from declip_jax.evals.robustness import WITHOUT_SHIFT

# Classes, templates of CLIP, metric, and images of the test split (CLIP, table 9; DeCLIP, appendix "Downstream data";
# number of templates in openai/CLIP d05afc4, data/prompts.md and notebook).
TABLE = {
  "food101": (101, 1, "top1", 25250),
  "cifar10": (10, 18, "top1", 10000),
  "cifar100": (100, 18, "top1", 10000),
  "birdsnap": (500, 1, "top1", 2149),
  "cub200": (200, 1, "top1", 5794),
  "sun397": (397, 2, "top1", 19850),
  "cars": (196, 8, "top1", 8041),
  "aircraft": (100, 2, "mean_per_class", 3333),
  "voc2007": (20, 1, "mean_average_precision_11", 4952),
  "dtd": (47, 8, "top1", 1880),
  "pets": (37, 1, "mean_per_class", 3669),
  "caltech101": (102, 34, "mean_per_class", 6085),
  "flowers": (102, 1, "mean_per_class", 6149),
  "mnist": (10, 1, "top1", 10000),
  "fer2013": (7, 6, "top1", 3574),
  "stl10": (10, 2, "top1", 8000),
  "eurosat": (10, 3, "top1", 5000),
  "resisc45": (45, 18, "top1", 25200),
  "gtsrb": (43, 3, "top1", 12630),
  "kitti_distance": (4, 1, "top1", 711),
  "country211": (211, 5, "top1", 21100),
  "patch_camelyon": (2, 1, "top1", 32768),
  "ucf101": (101, 48, "top1", 1794),
  "kinetics700": (700, 28, "mean_top1_top5", 31669),
  "clevr_counts": (8, 1, "top1", 500),
  "hateful_memes": (2, 1, "roc_auc", 500),
  "rendered_sst2": (2, 1, "top1", 1821),
  "imagenet": (1000, 80, "top1", 50000),
}
SIZES = {"clip27": 27, "slip26": 26, "declip11": 11, "kornblith12": 12, "vtab": 19, "vtab1k": 19, "vtab+": 36}
SIZES |= {"shifts": 9, "retrieval": 2, "composition": 8, "datacomp38": 40, "elevater20": 20}


@pytest.mark.parametrize("key", TABLE)
def test_published_numbers(key: str):
  data = data_set(key)
  numbers = len(data.classes), len(data.templates["openai"]), data.metric, data.sizes["test"]
  assert numbers == TABLE[key]
  assert key == "cub200" or key in suite("clip27").keys


def test_every_entry_is_consistent():
  for data in map(data_set, catalogue.keys()):
    assert data.task in catalogue.TASKS, data.key
    assert data.metric in (None, *catalogue.METRICS), data.key
    assert data.chance is None or 0 < data.chance <= 0.5, data.key
    assert len(set(data.classes)) == len(data.classes) or data.parent or data.key == "imagenet", data.key
    assert len(data.folders) in (0, len(data.classes)), data.key
    assert data.validation in ("official", "carved"), data.key
    assert set(data.aliases.values()) <= set(data.classes), data.key
    assert all(sorted(order) == [*range(len(data.classes))] for order in data.orders.values()), data.key
    assert all(len(names) == len(data.classes) for names in data.names.values()), data.key
    assert not data.images or data_set(data.images).sources, data.key
    assert len(data.parent_ids) == (len(data.classes) if data.parent else 0), data.key
    assert set(data.sources) <= {*SOURCES, "datacomp"}, data.key
    for name, templates in data.templates.items():
      assert templates, (data.key, name)
      assert all(text.count("{}") == 1 and "{c}" not in text for text in templates), (data.key, name)


def test_suites_have_the_published_sizes():
  assert {name: len(found.keys) for name, found in catalogue.suites().items()} == SIZES
  for found in catalogue.suites().values():
    assert len(set(found.keys)) == len(found.keys)
    assert set(found.metrics.values()) <= set(catalogue.METRICS)
    assert set(found.metrics) <= set(found.keys)
    assert all(set(members) <= set(found.keys) for members in found.means.values())
    assert set(found.sources) <= set(found.keys)
  assert set(suite("clip27").keys) ^ set(suite("slip26").keys) == {"birdsnap", "voc2007", "cub200"}
  scored = [key for key in suite("datacomp38").keys if suite("datacomp38").metric(key)]
  assert scored == list(suite("datacomp38").means["mean"])
  assert len(scored) == 38


def test_number_of_prompts():
  found = suite("slip26")
  own = {key: sum(map(len, data_set(key).prompts(found.prompt_set(key)))) for key in found.keys}
  assert own["imagenet"] == 7000
  assert own["fer2013"] == 6 * 12
  assert sum(own.values()) - own["imagenet"] + sum(map(len, data_set("imagenet").prompts("openai"))) == 115_418


def test_prompts_have_all_templates_and_names_of_a_class():
  data = data_set("fer2013")
  assert data.prompts()[3][:2] == ("a photo of a happy looking face.", "a photo of a smiling looking face.")
  assert data.prompts("clip_benchmark")[3][:1] == ("a photo of a happy looking face.",)
  assert len(data.prompts("clip_benchmark")[3]) == 6
  assert data_set("kitti_distance").prompts()[1] == ("a photo i took with a car nearby.",)
  assert data_set("clevr_counts").prompts()[:2] == (("a photo of 10 objects.",), ("a photo of 3 objects.",))
  assert data_set("clevr_counts").prompts("clip_benchmark")[:2] == (
    ("a picture of ten objects",),
    ("a picture of three objects",),
  )
  assert data_set("cifar10").prompts("bare")[0] == ("airplane",)
  with pytest.raises(ValueError, match=r"food101.*'openai7'.*openai, clip_benchmark, bare"):
    data_set("food101").prompts("openai7")


def test_subsets_of_imagenet():
  imagenet = data_set("imagenet")
  assert imagenet.folders[0] == "n01440764"
  assert len(set(imagenet.folders)) == 1000
  for key, classes in {"imagenet_v2": 1000, "imagenet_sketch": 1000, "imagenet_r": 200, "imagenet_a": 200}.items():
    data = data_set(key)
    assert len(data.classes) == classes
    assert len(data.templates["openai"]) == 80
    assert data.classes == tuple(imagenet.classes[number] for (number,) in data.parent_ids)
  assert [number for (number,) in data_set("imagenet_r").parent_ids][:5] == [1, 2, 4, 6, 8]  # imagenet-testbed
  objectnet = data_set("objectnet")
  assert len(objectnet.classes) == 113
  assert len(objectnet.classes) + len(objectnet.others) == 313
  alarm_clock = objectnet.parent_ids[objectnet.classes.index("alarm clock")]
  assert [imagenet.classes[number] for number in alarm_clock] == ["analog clock", "digital clock"]
  for key, shift in {"r": "imagenet_r", "a": "imagenet_a", "objectnet": "objectnet"}.items():
    data, same = data_set(f"imagenet_on_{key}"), data_set(shift)
    assert (data.prompts(), data.parent_ids, data.images) == (same.prompts(), same.parent_ids, "imagenet")
    assert data.sizes["test"] == 50 * sum(map(len, data.parent_ids))
    assert WITHOUT_SHIFT[shift] == data.key
    assert {data.key, shift} < {*suite("shifts").keys}
  equal = [name for name in imagenet.classes if imagenet.classes.count(name) > 1]
  assert equal == ["missile", "missile", "sunglasses", "sunglasses"]
  assert [n for n, name in enumerate(imagenet.classes) if name in equal] == [657, 744, 836, 837]


def test_averages_need_all_of_their_data_sets():
  found = suite("vtab")
  values = dict(zip(found.keys, itertools.count(), strict=False))
  averages = found.averages(values)
  assert averages["mean"] == 9
  assert averages["natural"] == 3
  del values["dmlab"]
  assert found.averages(values) == {"natural": averages["natural"], "specialised": averages["specialised"]}
  assert found.missing(values) == ["dmlab"]


def test_protocols_differ_between_suites():
  assert suite("clip27").metric("pets") == "mean_per_class"
  assert suite("vtab").metric("pets") == "top1"
  assert suite("clip27").prompt_set("imagenet") == "openai"
  assert suite("slip26").prompt_set("imagenet") == "openai7"
  assert suite("retrieval").prompt_set("flickr30k") == ""
  assert suite("vtab").sources["sun397"]["tfds"][0] == "sun397/tfds:test"
  assert suite("vtab1k").sources["eurosat"]["tfds"] == (
    "eurosat/rgb:train[21600:]",
    "eurosat/rgb:train[:800]",
    "eurosat/rgb:train[16200:16400]",
  )


def test_chance():
  guesses = {"pets": 1 / 37, "hateful_memes": 0.5, "kinetics700": 3 / 700, "voc2007": None, "fmow": 1 / 62}
  assert {key: data_set(key).chance for key in guesses} == guesses
  assert [catalogue.chance(*of) for of in (("top1", 4), ("top1", 0), ("accuracy", 0), ("top2", 4))] == [
    0.25,
    None,
    0.5,
    None,
  ]


def test_unknown_names_are_suggested():
  with pytest.raises(ValueError, match="'foods101'.*own/NAME.*did you mean food101"):
    data_set("foods101")
  with pytest.raises(ValueError, match=r"slip26.*did you mean slip26"):
    suite("slip25")


def test_data_set_of_the_user():
  data = data_set("own/mine").with_classes(["cat", "dog"])
  assert data.prompts() == (("a photo of a cat.",), ("a photo of a dog.",))
  data = data_set("own/mine").with_classes(["cat", "dog"], ["{} here"])
  assert data.prompts() == (("cat here",), ("dog here",))
  several = data_set("own/mine").with_classes(["cat", "dog"], several=True)
  assert (several.task, several.metric) == ("multilabel", "mean_average_precision_11")
  captions = data_set("own/mine").with_classes([])
  assert (captions.task, captions.metric, captions.prompt_sets) == ("retrieval", "mean_recall@1", ())
  with pytest.raises(ValueError, match="fmow has 62 classes.*2"):
    data_set("fmow").with_classes(["cat", "dog"])
  with pytest.raises(ValueError, match="own/mine has no classes"):
    data_set("own/mine").prompts()


def test_names_in_results():
  names = {"pets": "vtab/pets", "kitti_distance": "vtab/kitti_closest_vehicle_distance", "birdsnap": "birdsnap"}
  assert {key: data_set(key).clip_benchmark for key in names} == names
  assert data_set("fmow").clip_benchmark == "wilds/fmow"
  assert replace(data_set("fmow"), sources={}).clip_benchmark == "fmow"


def test_a_data_set_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  about = {"title": "Toy", "task": "classification", "metric": "top1", "classes": ["cat", ["dog", "hound"]]}
  (tmp_path / "toy.json").write_text(json.dumps({**about, "prompts": {"openai": ["a {}."]}}))
  monkeypatch.setattr(catalogue, "_FOLDER", tmp_path)
  for cached in (catalogue.keys, catalogue.data_set):
    cached.cache_clear()
  try:
    assert catalogue.keys() == ("toy",)
    assert data_set("toy").prompts() == (("a cat.",), ("a dog.", "a hound."))
  finally:
    for cached in (catalogue.keys, catalogue.data_set):
      cached.cache_clear()

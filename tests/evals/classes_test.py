"""Tests of the matching of classes by name: the orders of data sets in different places."""

from pathlib import Path

import numpy as np
import pytest

from declip_jax.data.sources.derived_labels import DERIVED
from declip_jax.evals.catalogue import DataSet, data_set, keys
from declip_jax.evals.classes import align, canonical, names_for_prompts

TFDS_PETS = (
  "Abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle Bengal Birman Bombay boxer "
  "British_Shorthair chihuahua Egyptian_Mau english_cocker_spaniel english_setter german_shorthaired great_pyrenees "
  "havanese japanese_chin keeshond leonberger Maine_Coon miniature_pinscher newfoundland Persian pomeranian pug "
  "Ragdoll Russian_Blue saint_bernard samoyed scottish_terrier shiba_inu Siamese Sphynx staffordshire_bull_terrier "
  "wheaten_terrier yorkshire_terrier"
)
NEAR = "a photo i took with a car nearby."
SIDE = "a photo i took of a car on my left or right side."
FAR = "a photo i took with a car in the distance."
NONE = "a photo i took with no car."


def matched(key: str, names: list[str], spec: str = "folder:/data") -> list[str]:
  data = data_set(key)
  return [data.classes[number] if number >= 0 else "" for number in align(data, names, spec)]


def test_canonical_names():
  names = ["001.Black_footed_Albatross", "aquarium_fish", "apartment building/outdoor", " A-B  c", "707-320"]
  expected = ["black footed albatross", "aquarium fish", "apartment building outdoor", "a b c", "707 320"]
  assert list(map(canonical, names)) == expected
  assert canonical("/a/abbey") == "abbey"


def test_pets_are_in_another_order_in_clips_list():
  found = align(data_set("pets"), TFDS_PETS.split(), "tfds:oxford_iiit_pet:test")
  assert sorted(found) == [*range(37)]
  assert matched("pets", TFDS_PETS.split())[20] == "Maine Coon"
  assert sum(name != own for name, own in zip(TFDS_PETS.split(), data_set("pets").classes, strict=True)) == 36


def test_orders_that_differ_between_sources():
  assert align(data_set("kitti_distance"), [FAR, SIDE, NEAR, NONE], "folder:/data").tolist() == [2, 0, 1, 3]  # SLIP
  words = ["three", "four", "five", "six", "seven", "eight", "nine", "ten"]  # CLIP_benchmark
  assert matched("clevr_counts", words) == ["3", "4", "5", "6", "7", "8", "9", "10"]
  assert matched("clevr_counts", [str(number) for number in range(3, 11)])[0] == "3"
  names = ["accordion", "airplanes", "anchor", "background_google", "faces", "faces_easy", "car_side"]
  own = data_set("caltech101")
  rest = [name for name in own.classes if name not in own.aliases.values() and name not in names]
  others = [alias for alias in own.aliases if alias not in names]
  found = matched("caltech101", [*names, *rest, *others])
  assert found[:7] == [
    "accordion",
    "airplane",
    "anchor",
    "background",
    "off-center face",
    "centered face",
    "side of a car",
  ]
  voc = "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant"
  voc = f"{voc} sheep sofa train tvmonitor".split()
  assert align(data_set("voc2007"), voc, "tfds:voc/2007:test").tolist()[10:] == [16, 10, 11, 12, 13, 17, 14, 15, 18, 19]
  eurosat = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
  assert matched("eurosat", eurosat.split())[:3] == ["annual crop land", "forest", "brushland or shrubland"]
  kaggle = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
  assert align(data_set("fer2013"), kaggle, "folder:/fer").tolist() == [0, 1, 2, 3, 6, 4, 5]


def test_another_order_of_names_is_another_permutation():
  names = data_set("cifar10").classes
  assert align(data_set("cifar10"), names[::-1], "folder:/data").tolist() == [*range(9, -1, -1)]


@pytest.mark.parametrize(
  ("own", "theirs", "expected"),
  [
    (("A", "a", "C++", "C--"), ("a", "A", "C--", "C++"), [1, 0, 3, 2]),
    (("A", "a"), ("A_", "a"), [0, 1]),
    (("crane", "ship", "crane"), ("ship", "Crane", "Crane"), [1, 0, 2]),
    (("A", "a"), ("a", "a"), None),
    (("A", "a"), ("A_", "a_"), None),
    (("crane", "crane"), ("Crane", "CRANE"), None),
  ],
)
def test_names_that_are_alike_are_matched_exactly_or_not_at_all(own, theirs, expected):
  data = DataSet("toy", "Toy", "classification", "top1", own)
  if expected is not None:
    assert align(data, theirs, "folder:/data").tolist() == expected
  else:
    with pytest.raises(ValueError, match=r"folder:/data: which of its classes.*toy.*is not clear"):
      align(data, theirs, "folder:/data")


def test_other_names_of_classes_with_one_name_tell_them_apart():
  imagenet = data_set("imagenet")
  first, second = (number for number, name in enumerate(imagenet.classes) if name == "missile")
  names = list(imagenet.folders)
  names[first], names[second] = names[second], names[first]
  found = align(imagenet, names, "folder:/data")
  assert (found[first], found[second]) == (second, first)


def test_numbers_and_missing_names_have_the_order_of_the_source():
  numbers = [str(number) for number in range(200)]
  assert align(data_set("cub200"), numbers, "tfds:caltech_birds2011:test").tolist() == [*range(200)]
  assert align(data_set("stl10"), (), "tfds:stl10:test").tolist() == [*range(10)]
  folders = sorted(str(number) for number in range(1, 103))  # 1, 10, 100, 101, 102, 11, ...
  assert align(data_set("flowers"), folders, "folder:/data").tolist()[:4] == [0, 9, 99, 100]
  data = DataSet("toy", "Toy", "classification", "top1", ("a", "b", "c"), orders={"tfds": (2, 0, 1)})
  assert align(data, ["0", "1", "2"], "heldout:1%:tfds:toy:test").tolist() == [2, 0, 1]
  with pytest.raises(ValueError, match=r"folder:/data.*no names.*toy in folder:"):
    align(data, ["0", "1", "2"], "folder:/data")
  with pytest.raises(ValueError, match=r"no names.*pets"):
    align(data_set("pets"), (), "table:/data/pets.csv")


def test_imagenet_by_wordnet_id_and_with_equal_names():
  imagenet = data_set("imagenet")
  assert align(imagenet, imagenet.folders, "tfds:imagenet2012:validation").tolist() == [*range(1000)]
  assert align(imagenet, imagenet.classes, "clip_benchmark:/data").tolist() == [*range(1000)]
  numbers = sorted(str(number) for number in range(1000))  # folders of ImageNet-V2
  assert align(data_set("imagenet_v2"), numbers, "folder:/v2").tolist() == list(map(int, numbers))


def test_subsets_accept_the_classes_of_their_parent():
  imagenet, rendition = data_set("imagenet"), data_set("imagenet_r")
  found = align(rendition, imagenet.folders, "tfds:imagenet_r:test")
  assert np.flatnonzero(found >= 0).tolist() == [number for (number,) in rendition.parent_ids]
  assert found[1] == 0
  assert found[0] == -1
  assert found.max() == 199
  assert (align(rendition, [str(number) for number in range(1000)], "table:/val.csv") == found).all()
  assert align(rendition, rendition.folders, "folder:/r").tolist() == [*range(200)]
  objectnet = data_set("objectnet")
  every = sorted([*objectnet.folders, *objectnet.others])
  found = align(objectnet, every, "folder:/objectnet")
  assert (found >= 0).sum() == 113
  assert objectnet.classes[found[every.index("alarm_clock")]] == "alarm clock"
  parents = align(objectnet, imagenet.folders, "tfds:imagenet2012:validation")
  assert objectnet.classes[parents[409]] == objectnet.classes[parents[530]] == "alarm clock"


def test_the_rest_of_both_sides_is_listed():
  names = [*data_set("cifar10").classes[:8], "boat", "lorry"]
  with pytest.raises(ValueError, match=r"folder:/data.*'boat', 'lorry'.*cifar10: 'ship', 'truck'"):
    align(data_set("cifar10"), names, "folder:/data")
  with pytest.raises(ValueError, match=r"only in the source: 'cat'; only in cifar10: none"):
    align(data_set("cifar10"), [*data_set("cifar10").classes, "cat"], "folder:/data")
  with pytest.raises(ValueError, match=r"only in the source: none; only in cifar10: 'truck'"):
    align(data_set("cifar10"), data_set("cifar10").classes[:9], "folder:/data")
  with pytest.raises(ValueError, match=r"fmow has no classes"):
    align(data_set("fmow"), ["a"], "folder:/data")


def tfds_names(spec: str, folder: Path) -> list[str]:
  """Names of classes, from the code of TFDS alone."""
  import tensorflow_datasets as tfds

  name, _, label = spec.partition("?label=")
  features = tfds.builder(name.partition(":")[0], data_dir=folder).info.features
  derived = DERIVED.get(label)
  if derived and derived.classnames:
    return list(derived.classnames)
  feature = features[derived.features[0] if derived else label or "label"]
  return list(getattr(feature, "feature", feature).names)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in keys() if "tfds" in data_set(key).sources])
def test_classes_of_tfds_map_onto_those_of_the_catalogue(key: str, tmp_path: Path):
  data = data_set(key)
  if not data.classes:
    pytest.skip("no classes")
  (spec, *_) = data.sources["tfds"]
  found = align(data, tfds_names(spec, tmp_path), f"tfds:{spec}")
  assert sorted(found[found >= 0]) == [*range(len(data.classes))]


def test_prompts_have_names_in_place_of_wordnet_ids() -> None:
  names, remark = names_for_prompts(("n01440764", "n01443537"))
  assert names == ("tench", "goldfish")
  assert "'tench' for n01440764" in remark
  names, remark = names_for_prompts(("n01440764", "n99999999", "n02084071"))
  assert names == ("tench", "n99999999", "n02084071")
  assert remark.startswith("2 class names are WordNet ids that ImageNet does not have, such as n99999999:")
  assert names_for_prompts(("tench", "n1")) == (("tench", "n1"), "")

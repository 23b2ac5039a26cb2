"""The command that finds duplicates, over small folders of synthetic images."""

import functools
import json

from absl import flags
import cv2
import numpy as np
import pytest

from declip_jax import overlap as command
from declip_jax.data.images import EvalView
from declip_jax.data.sources import open_source
from declip_jax.evals import results
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.feature_cache import FeatureCache
from declip_jax.evals.results import Result
from declip_jax.overlap import HASH, Detector, overlap


def picture(seed):
  """Random colours of all scales, as in photographs."""
  rng, pixels = np.random.default_rng(seed), np.full((80, 60, 3), 128.0)
  for cells in (2, 4, 8, 16):
    coarse = rng.normal(scale=128 / cells**0.5, size=(cells, cells, 3))
    pixels += cv2.resize(coarse, (60, 80), interpolation=cv2.INTER_CUBIC)
  return np.clip(pixels, 0, 255).astype(np.uint8)


def write(folder, seeds):
  """A folder of pictures; None is one that cannot be read."""
  (folder / "class").mkdir(parents=True)
  for number, seed in enumerate(seeds):
    path = folder / "class" / f"{number:03d}.png"
    path.write_bytes(b"broken") if seed is None else cv2.imwrite(str(path), picture(seed))
  return f"folder:{folder}"


def predicted(folder, spec, **arrays):
  """Predictions of an evaluation on a source, beside its result."""
  source = open_source(spec)
  about = {"source": source.name, "stamp": source.stamp, "samples": len(source)}
  result = Result("toys", "m", "w", "zeroshot_classification", {}, {"data": {"test": about}})
  return results.predictions_path(results.write(folder, result, arrays))


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
  """20 test images: 1 and 2 are smaller JPEGs in the training set, 3 is the same there, and 4 cannot be read."""
  folder = tmp_path_factory.mktemp("images")
  test = write(folder / "test", [*range(4), None, *range(5, 20)])
  train = write(folder / "train", [*range(100, 130), 3])
  for number in (1, 2):
    smaller = cv2.resize(picture(number), (36, 48), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(folder / "train" / "class" / f"{number + 900}.jpg"), smaller, [cv2.IMWRITE_JPEG_QUALITY, 60])
  return test, train


def test_duplicates_are_found_without_a_model(specs, tmp_path, monkeypatch):
  test, train = specs
  predictions = predicted(tmp_path, test, row=np.arange(1, 20), rank=np.arange(1, 20) >= 4)
  cached = HASH._replace(encode=FeatureCache(tmp_path / "cache", "none", {}, (64, 0)).encode)
  found = overlap(test, train, cached, tmp_path / "out", predictions=predictions)
  assert (found["images"], found["unreadable"], found["overlap"]) == (19, 1, 3)
  assert found["contamination"] == pytest.approx(3 / 19)
  assert found["identical"] == 1
  assert found["precision"] == 1
  assert found["recall"] < 0.8  # the hash does not recognise all crops
  assert sum(found["histogram"].values()) == 19
  assert found["effect"]["accuracy_overlap"] == 1
  assert found["effect"]["accuracy_clean"] == 0
  assert json.loads((tmp_path / "out" / "overlap.json").read_text()) == found
  with np.load(tmp_path / "out" / "overlap.npz") as arrays:
    assert np.flatnonzero(arrays["overlaps"]).tolist() == [1, 2, 3]
    assert arrays["index"][[1, 2, 3], 0].tolist() == [31, 32, 30]
    assert arrays["index"].shape == (20, 5)
    assert arrays["cosine"][3, 0] == 1
  del found["effect"]
  monkeypatch.setattr("declip_jax.overlap.plot_pairs", lambda *arguments: None)
  assert overlap(test, train, cached, tmp_path / "again") == found  # with features from the cache
  sheet = cv2.imread(str(tmp_path / "out" / "overlap.png"))
  assert (sheet == (0xB2, 0x72, 0)).all(axis=-1).any()  # a frame: the files have blue first


@pytest.fixture
def no_pictures(monkeypatch):
  monkeypatch.setattr("declip_jax.overlap.plot_pairs", lambda *arguments: None)


@pytest.mark.usefixtures("no_pictures")
def test_duplicates_within_a_set_are_clusters(specs, tmp_path):
  _, train = specs
  found = overlap(train, "", HASH, tmp_path)
  assert (found["images"], found["overlap"], found["clusters"], found["duplicate_share"]) == (33, 0, 0, 0)
  twice = write(tmp_path / "twice", [1, 2, 1, 3, 1])
  found = overlap(twice, "", HASH, tmp_path, threshold=0.9)
  assert (found["overlap"], found["clusters"], found["duplicate_share"]) == (3, 1, 0.4)
  assert found["identical"] == 3


@pytest.mark.usefixtures("no_pictures")
def test_a_model_gets_the_threshold_of_a_precision(specs, tmp_path, caplog):
  """A detector by mean colours of a grid, whose threshold is chosen."""
  encoders = Encoders(
    image=lambda images: (images.reshape(-1, 4, 4, 4, 4, 3).mean(axis=(2, 4)).reshape(len(images), -1) - 127.5, None),
    text=lambda tokens: tokens,
    tokenizer=lambda texts: np.zeros((len(texts), 1), int),
    view=EvalView(16, squash=True),
    batch_size=8,
    batch_rows=np.arange(8),
  )
  found = overlap(*specs, Detector(encoders, None), tmp_path, precision=0.9)
  assert 0.5 < found["threshold"] < 1
  assert found["precision"] >= 0.9
  assert found["overlap"] == 3
  assert "precision" not in caplog.text
  assert overlap(*specs, Detector(encoders, None), tmp_path, threshold=-1.0)["contamination"] == 1
  assert "threshold -1 has a precision of 0.5" in caplog.text


def test_a_set_without_images_that_can_be_read_is_named(specs, tmp_path):
  broken = write(tmp_path / "broken", [None, 1, None])
  with pytest.raises(ValueError, match=f"{broken}: 1 image can be read"):
    overlap(broken, specs[1], HASH, tmp_path)


@pytest.mark.usefixtures("no_pictures")
def test_predictions_of_other_data_are_named(specs, tmp_path):
  test, train = specs
  one = {"row": np.array([1]), "correct": np.array([1])}
  for spec, arrays, message in (
    (test, {"row": np.array([20]), "correct": np.array([1])}, "image 20, but --test has 20"),
    (test, {"row": np.array([1])}, "the arrays .*row"),
    (train, one, f"{train}, 33 samples.*--test={test}, 20 samples"),
    (write(tmp_path / "copy", [*range(20)]), one, "copy, 20 samples"),
  ):
    path = predicted(tmp_path, spec, **arrays)
    with pytest.raises(ValueError, match=f"{path.name} has .*{message}"):
      overlap(*specs, HASH, tmp_path, predictions=path)
  path.parents[1].joinpath(f"{path.stem}.json").unlink()
  with pytest.raises(FileNotFoundError, match=path.stem):
    overlap(*specs, HASH, tmp_path, predictions=path)


@pytest.fixture
def parse(monkeypatch):
  """Parses the flags of the command, without running it."""
  values = flags.FlagValues()
  monkeypatch.setattr(flags, "FLAGS", values)
  for name in ("string", "integer", "float", "multi_string"):
    define = getattr(flags, f"DEFINE_{name}")
    monkeypatch.setattr(flags, f"DEFINE_{name}", functools.partial(define, flag_values=values))
  monkeypatch.setattr(command, "launch", lambda *arguments, **options: None)
  command.main()
  return lambda *arguments: values(["overlap", *arguments])


@pytest.mark.parametrize("flag", ["--batch_size=7", "--settings=image.activation=gelu"])
def test_flags_without_effect_are_rejected(flag, parse):
  parse("--test=folder:/x", flag)
  with pytest.raises(ValueError, match=f"^{flag.partition('=')[0]} has an effect only with --weights"):
    command._detector()


@pytest.mark.parametrize("numbers", [{"threshold": np.nan}, {"threshold": 1.5}, {"precision": np.nan}])
def test_numbers_out_of_range_are_rejected_before_anything_is_read(numbers, tmp_path):
  with pytest.raises(ValueError, match=rf"{next(iter(numbers))}=.*: expected a number from"):
    overlap("folder:/is/never/opened", "", HASH, tmp_path / "out", **numbers)
  assert not (tmp_path / "out").exists()

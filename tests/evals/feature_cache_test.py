"""Tests of `declip_jax.evals.feature_cache`: what is read back, what is encoded again, and what is removed."""

from collections.abc import Iterator
from dataclasses import replace
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

from greys import Greys, grey_encoders
import numpy as np
from PIL import Image
import pytest

from declip_jax.evals import feature_cache, features
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.feature_cache import FeatureCache, remove_oldest, tree_hash
from declip_jax.runtime import records

NUMBER = 23  # images, in blocks of 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(feature_cache, "BLOCK", 8)


def source(stamp: str = "1") -> Greys:
  greys = Greys([(None if index == 4 else 10 * index, index % 2) for index in range(NUMBER)])
  greys.stamp = stamp
  return greys


class Counting:
  """Encoders that count the images that they encode, and may fail after some batches."""

  def __init__(self, batch_size: int = 5, batches: float = np.inf):
    self.images, self.left, self.plain = 0, batches, grey_encoders(batch_size)
    self.encoders = replace(self.plain, image=self._encode)

  def _encode(self, images: np.ndarray) -> Any:
    if not self.left:
      raise KeyboardInterrupt
    self.left -= 1
    self.images += len(images)
    return self.plain.image(images)


def cached(folder: Path, encoders: Encoders, greys: Greys, weights: str = "w", limit: int = 2**30) -> Any:
  cache = FeatureCache(folder, weights, {"width": 1}, (1, 2), limit)
  return cache.encode(greys, encoders, range(NUMBER))


def test_features_are_read_back_as_they_were_encoded(tmp_path: Path) -> None:
  plain = features.encode(source(), grey_encoders(4), range(NUMBER))
  counting = Counting()
  for expected_images in (25, 25):  # 23 and padding; then none
    found = cached(tmp_path, counting.encoders, source())
    assert counting.images == expected_images
    for name in ("pooled", "embedding", "label", "readable"):
      np.testing.assert_array_equal(getattr(found, name)[found.readable], getattr(plain, name)[plain.readable])
    assert found.id == plain.id
    assert isinstance(found.pooled.base, np.memmap) or isinstance(found.pooled, np.memmap)
  (entry,) = tmp_path.iterdir()
  assert json.loads((entry / "about.json").read_text())["source"] == "greys"


@pytest.mark.parametrize("batches", [1, 2, 3, 4])
def test_an_interrupted_entry_is_continued_after_its_last_block(batches: int, tmp_path: Path) -> None:
  """Batches of five images are fetched one batch late, and blocks have eight."""
  with pytest.raises(KeyboardInterrupt):
    cached(tmp_path / "a", Counting(batches=batches).encoders, source())
  rest, whole = Counting(), Counting()
  found = cached(tmp_path / "a", rest.encoders, source())
  expected = cached(tmp_path / "b", whole.encoders, source())
  blocks = 5 * (batches - 1) // 8
  assert rest.images == -(-(NUMBER - 8 * blocks) // 5) * 5 <= whole.images
  np.testing.assert_array_equal(found.pooled, expected.pooled)
  assert found.id == expected.id
  files = [
    {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.np*"))}
    for folder in (tmp_path / "a", tmp_path / "b")
  ]
  assert files[0] == files[1]
  assert len(files[0]) == 4


def test_a_damaged_block_is_encoded_again(tmp_path: Path) -> None:
  expected = np.array(cached(tmp_path, Counting().encoders, source()).pooled)
  (path,) = tmp_path.glob("*/host-00000-of-00001.npy")
  damaged = np.lib.format.open_memmap(path, "r+")
  damaged[9] += 1
  damaged.flush()
  again = Counting()
  np.testing.assert_array_equal(cached(tmp_path, again.encoders, source()).pooled, expected)
  assert again.images == 15  # the rows 8 to 22


def test_whatever_features_depend_on_is_part_of_the_key(tmp_path: Path) -> None:
  encoders = grey_encoders(4)
  variants: list[tuple[Encoders, Greys, str]] = [
    (encoders, source(), "w"),
    (encoders, source(), "v"),
    (encoders, source("2"), "w"),
    (replace(encoders, view=replace(encoders.view, interpolation="bicubic")), source(), "w"),
  ]
  keys = {FeatureCache(tmp_path, w, {"width": 1}, (1, 2)).entry(greys, enc) for enc, greys, w in variants}
  keys.add(FeatureCache(tmp_path, "w", {"width": 2}, (1, 2)).entry(source(), encoders))
  assert len(keys) == len(variants) + 1
  bigger = replace(encoders, batch_size=8)
  assert FeatureCache(tmp_path, "w", {"width": 1}, (1, 2)).entry(source(), bigger) in keys


def test_features_in_float16_take_half_the_space_and_are_those_without_a_cache(tmp_path: Path) -> None:
  third = Counting()
  third.plain = replace(third.plain, image=lambda images: tuple(x / 3 for x in grey_encoders(5).image(images)))
  half = replace(third.encoders, features_dtype="float16")
  expected = features.encode(source(), half, range(NUMBER))
  for folder in ("a", "a"):
    found = cached(tmp_path / folder, half, source())
    for name in ("pooled", "embedding"):
      np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
      assert getattr(found, name).dtype == np.float32
  assert third.images == 50  # without a cache, and once for it
  full = cached(tmp_path / "a", third.encoders, source())
  assert 0 < np.abs(full.pooled - found.pooled).max() < 0.04
  sizes = sorted(path.stat().st_size - 128 for path in (tmp_path / "a").glob("*/*.npy"))
  assert sizes == [2 * 3 * NUMBER, 4 * 3 * NUMBER]


def test_a_feature_that_is_too_large_for_float16_is_named(tmp_path: Path) -> None:
  encoders = grey_encoders(5)
  large = replace(encoders, image=lambda images: tuple(500 * x for x in encoders.image(images)))
  with pytest.raises(ValueError, match=r"greys: a feature is 70000, too large for float16: .*features_dtype=float32"):
    cached(tmp_path, replace(large, features_dtype="float16"), source())


def entries(folder: Path) -> Iterator[Path]:
  for number in range(3):
    entry = folder / f"entry{number}"
    entry.mkdir()
    (entry / "about.json").write_text("{}")
    (entry / "host.npy").write_bytes(bytes(98))
    os.utime(entry / "about.json", (0, number))
    yield entry


def test_the_oldest_entries_are_removed_until_the_rest_fits(tmp_path: Path) -> None:
  first, second, third = entries(tmp_path)
  (tmp_path / "theirs").mkdir()
  assert [*remove_oldest(tmp_path, 300, set())] == []
  assert [*remove_oldest(tmp_path, 200, {first})] == [second]
  assert (first.exists(), third.exists(), (tmp_path / "theirs").exists()) == (True, True, True)
  assert [*remove_oldest(tmp_path, 0, set())] == [first, third]


def test_entries_that_were_used_within_the_last_hour_remain(tmp_path: Path) -> None:
  first, second, _ = entries(tmp_path)
  os.utime(first / "about.json")
  assert [*remove_oldest(tmp_path, 200, set())] == [second]
  assert first.exists()


def test_two_processes_that_encode_do_not_disturb_each_other(tmp_path: Path) -> None:
  """Another one begins an entry, for which there is no room, and one with the same images, after a few batches."""
  counting = Counting()

  def meanwhile(images: np.ndarray) -> Any:
    counting.left = np.inf
    cached(tmp_path, grey_encoders(5), source("2"), limit=10)
    cached(tmp_path, grey_encoders(5), source(), limit=10)
    return counting.plain.image(images)

  def encode(images: np.ndarray) -> Any:
    counting.images += len(images)
    return (meanwhile if counting.images == 15 else counting.plain.image)(images)

  found = cached(tmp_path, replace(counting.plain, image=encode), source(), limit=10)
  np.testing.assert_array_equal(found.pooled, features.encode(source(), grey_encoders(4), range(NUMBER)).pooled)
  assert len([*tmp_path.iterdir()]) == 2


def test_an_entry_that_another_user_has_begun_is_left_as_it_is(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  with pytest.raises(KeyboardInterrupt):
    cached(tmp_path, Counting(batches=3).encoders, source())
  before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
  opened = os.open

  def denied(path: Any, flags: int, *others: Any, **more: Any) -> int:
    if str(path).startswith(str(tmp_path)) and flags & (os.O_RDWR | os.O_WRONLY):
      raise PermissionError(errno.EACCES, "denied", path)
    return opened(path, flags, *others, **more)

  monkeypatch.setattr(os, "open", denied)
  monkeypatch.setattr(records, "write", lambda path, _: denied(path, os.O_WRONLY))
  found = cached(tmp_path, Counting().encoders, source())
  np.testing.assert_array_equal(found.pooled, features.encode(source(), grey_encoders(4), range(NUMBER)).pooled)
  assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
  assert "greys: its features are not kept, since" in capsys.readouterr().err


def test_a_file_that_was_cut_off_before_it_had_its_size_is_made_again(tmp_path: Path) -> None:
  expected = np.array(cached(tmp_path, Counting().encoders, source()).pooled)
  (path,) = tmp_path.glob("*/host-00000-of-00001.npy")
  for size in (0, 64, 200):
    os.truncate(path, size)
    np.testing.assert_array_equal(cached(tmp_path, Counting().encoders, source()).pooled, expected)
    np.testing.assert_array_equal(np.load(path)[:, :1], expected)


def test_checksums_are_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  cached(tmp_path, Counting().encoders, source())
  verified: list[int] = []
  checksum = feature_cache.zlib.crc32
  monkeypatch.setattr(feature_cache.zlib, "crc32", lambda block: verified.append(len(block)) or checksum(block))
  cache = FeatureCache(tmp_path, "w", {"width": 1}, (1, 2))
  assert cache.rows_left(source(), grey_encoders(4), range(NUMBER)) == 0
  cache.encode(source(), grey_encoders(4), range(NUMBER))
  assert verified == [8, 8, 7]


def test_captions_and_hashes_of_images_are_read_back(tmp_path: Path) -> None:
  class Captioned(Greys):
    def __getitem__(self, index: int) -> dict[str, Any]:
      file = io.BytesIO()
      Image.new("RGB", (4, 4), (10 * (index // 2),) * 3).save(file, "PNG")
      captions = ("a\nb", "\ud83d é") if index % 2 else ("one",)
      return {**super().__getitem__(index), "image": file.getvalue(), "captions": captions[: index % 3]}

  greys = Captioned([(0, 0)] * NUMBER)
  first, second = (cached(tmp_path, grey_encoders(5), greys) for _ in range(2))
  assert first.captions == second.captions == [tuple(greys[index]["captions"]) for index in range(NUMBER)]
  assert first.image_hash == second.image_hash
  assert first.image_hash[0] == first.image_hash[1] != first.image_hash[4] == first.image_hash[5] != first.image_hash[7]


def test_the_hash_of_weights_depends_on_names_shapes_types_and_values() -> None:
  base = {"a": np.arange(4.0), "b": {"c": np.zeros((2, 3), np.float32)}}
  others = [
    {"a": np.arange(4.0) + 1e-9, "b": {"c": np.zeros((2, 3), np.float32)}},
    {"a": np.arange(4.0), "b": {"c": np.zeros((3, 2), np.float32)}},
    {"a": np.arange(4.0), "b": {"c": np.zeros((2, 3), np.float16)}},
    {"a": np.arange(4.0), "b": {"d": np.zeros((2, 3), np.float32)}},
  ]
  assert len({tree_hash(tree) for tree in (base, *others)}) == 5
  assert tree_hash(base) == tree_hash({"b": {"c": np.zeros((2, 3), np.float32)}, "a": np.arange(4.0)})


def test_an_empty_source_is_named(tmp_path: Path) -> None:
  with pytest.raises(ValueError, match="greys has no samples"):
    FeatureCache(tmp_path, "w", {}, (1, 2)).encode(Greys([]), grey_encoders(4), range(0))

import pickle
import tarfile

import numpy as np
import pytest

from declip_jax.data import sources
from declip_jax.data.sources import open_source
from declip_jax.data.sources.heldout import _hash, open_heldout, open_kept, shuffled
from declip_jax.data.sources.scenes import open_scenes
from declip_jax.data.sources.webdataset import open_webdataset


def ids(source: sources.Source) -> list[str]:
  return [source[index]["id"] for index in range(len(source))]


@pytest.mark.parametrize("fraction", ["10%", "0.1", "1/3", "0.5%", "99%"])
def test_the_subsets_are_disjoint_and_complete(fraction):
  location = f"{fraction}:scenes:test/201/16"
  held, kept = open_heldout(location, open_source), open_kept(location, open_source)
  assert len(held) == {"10%": 20, "0.1": 20, "1/3": 67, "0.5%": 1, "99%": 199}[fraction]
  assert sorted(ids(held) + ids(kept)) == sorted(ids(open_scenes("test/201/16")))
  assert held.classnames == kept.classnames == open_scenes("test/201/16").classnames
  assert held.skipped == {}


def test_the_subsets_have_the_prompts_of_their_source():
  class Prompted(list):
    templates = ("a drawing of a {}.",)

  assert open_heldout("50%:x", lambda spec: Prompted("ab")).templates == ("a drawing of a {}.",)
  assert open_kept("50%:x", lambda spec: ["a", "b"]).templates == ()


@pytest.mark.parametrize(("size", "count"), [("5", 5), ("10%,50", 20), ("10%,7", 7), ("7,10%", 7), ("1", 1)])
def test_a_number_of_samples_may_be_given_and_the_smaller_of_two(size, count):
  held, kept = (open_source(f"{kind}:{size}:scenes:test/200/16") for kind in ("heldout", "kept"))
  assert (len(held), len(kept)) == (count, 200 - count)
  assert ids(held) == ids(open_source(f"heldout:{count / 2}%:scenes:test/200/16"))  # the same first samples


def test_a_fraction_may_be_written_in_two_ways():
  percent, decimal = (open_heldout(f"{text}:scenes:test/2000/16", open_source) for text in ("0.7%", "0.007"))
  assert ids(percent) == ids(decimal)


def test_subsets_of_subsets_and_pickling():
  source = open_source("kept:10%:heldout:50%:scenes:test/40/16")
  assert source.name == "kept:10%:heldout:50%:scenes:test/40/16"
  assert len(source) == 18
  assert set(ids(source)) < set(ids(open_source("heldout:50%:scenes:test/40/16")))
  assert len(pickle.dumps(source)) < 1000
  assert ids(pickle.loads(pickle.dumps(source))) == ids(source)
  for index in (-1, 18):
    with pytest.raises(IndexError, match=f"no sample {index}, there are 18"):
      source[index]


@pytest.mark.parametrize(
  "location",
  ["scenes:test", "0:scenes:test", "1.5:scenes:test", "-1%:scenes:test", "100%:scenes:test", "1%,x:s:t", "1%", "1%:"],
)
def test_a_bad_fraction_is_an_error(location):
  with pytest.raises(ValueError, match="expected heldout:SIZE:SPEC"):
    open_heldout(location, open_source)


@pytest.mark.parametrize(("share", "held_out"), [("1%", 1), ("5%", 1), ("99%", 9), ("1%,5000", 1)])
def test_a_fraction_leaves_at_least_one_sample_on_each_side(share: str, held_out: int) -> None:
  heldout, kept = (open_(f"{share}:scenes:test/10/16", open_source) for open_ in (open_heldout, open_kept))
  assert (len(heldout), len(kept)) == (held_out, 10 - held_out)


def test_an_empty_subset_is_an_error():
  with pytest.raises(
    ValueError, match="10 of 10 samples leaves none on one side: hold out fewer, or add samples to scenes"
  ):
    open_kept("10:scenes:test/10/16", open_source)
  with pytest.raises(ValueError, match="10%,5000 of 1 sample leaves none on one side"):
    open_heldout("10%,5000:scenes:test/1/16", open_source)
  with pytest.raises(ValueError, match="expected KIND:LOCATION"):
    open_heldout("1%:nothing", open_source)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 99, 100, 101, 4096, 5001])
def test_the_order_is_a_permutation(count):
  assert sorted(shuffled(index, count) for index in range(count)) == list(range(count))


def test_the_order_is_fixed():
  # The hash is SplitMix64, whose first numbers from seed 0 are published; the orders are those of our first release.
  assert [_hash(0, number) for number in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
  assert [shuffled(index, 1000) for index in range(8)] == [216, 431, 739, 460, 249, 369, 916, 651]
  assert [shuffled(index, 400_000_000) for index in range(4)] == [44340577, 105852089, 196481855, 78805139]


def test_the_order_looks_random():
  count = 100_000
  order = np.array([shuffled(index, count) for index in range(count)])
  held = order[:5000]
  # Expected counts of 500 and 714, with standard deviations of 21 and 25.
  assert np.abs(np.histogram(held, 10, (0, count))[0] - 500).max() < 80
  assert np.abs(np.bincount(held % 7) - 5000 / 7).max() < 95
  assert np.abs(np.bincount(held % 317 % 7) - 5000 / 7).max() < 100  # 317 is the side of the network's square
  assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.015
  assert np.std(np.diff(np.sort(held))) == pytest.approx(20, rel=0.1)  # the gaps are geometric


def test_the_stamp_equals_the_whole_sources(tmp_path):
  with tarfile.open(tmp_path / "s.tar", "w") as tar:
    for key in range(4):
      tar.addfile(tarfile.TarInfo(f"{key}.jpg"))
  assert open_kept(f"50%:webdataset:{tmp_path}/s.tar", open_source).stamp == open_webdataset(f"{tmp_path}/s.tar").stamp
  assert open_kept("50%:scenes:test/10/16", open_source).stamp != open_kept("50%:scenes:test/10/32", open_source).stamp

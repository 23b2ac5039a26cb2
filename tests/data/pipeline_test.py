"""Streams depend on seed and position, and on nothing else."""

from dataclasses import dataclass
import io
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
from PIL import Image
import psutil
import pytest
from tiers import slow_except

from declip_jax.data import images, pipeline, readers
from declip_jax.data.deaths import Deaths
from declip_jax.data.make_views import MakeViews, Masking, Rendering
from declip_jax.data.mixture import Mixture
from declip_jax.data.recipes import RECIPES
from declip_jax.data.sources import BAD, BadSample, open_source
from declip_jax.data.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Numbers:
  """Image and caption of example i are i; images in `broken` cannot be decoded, those in `blank` have no caption."""

  count: int
  first: int = 0
  broken: tuple[int, ...] = ()
  blank: tuple[int, ...] = ()
  name: str = "numbers"
  classnames: tuple[str, ...] = ("even", "odd")

  @property
  def skipped(self) -> dict[str, int]:
    return {}

  @property
  def left_out(self) -> dict[str, int]:
    return {}

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> dict:
    value = self.first + index
    image = b"no image" if index in self.broken else np.full((4, 4, 3), value, np.uint8)
    captions = () if index in self.blank else (str(value),)
    return {"image": image, "captions": captions, "label": value % 2, "id": f"numbers:{index}"}


class Unreadable(Numbers):
  """Examples none of which can be read."""

  def __getitem__(self, index: int) -> dict:
    raise BadSample("missing file", f"numbers:{index}")


def say_number(example: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
  images.decode(example["image"])
  return {"value": np.int32(example["captions"][0]), "random": rng.random()}


def say_both(example: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
  return say_number(example, rng) | {"other": np.int32(images.decode(example["ssl_image"])[0, 0, 0])}


def rows(*sources: Numbers, weights: tuple[float, ...] = (1.0,), seed: int = 0):
  return pipeline.training_samples(Mixture(sources, weights), say_number, seed)


def decoupled(*others: Numbers, first: Numbers, weights: tuple[float, ...] = (1.0,), seed: int = 0):
  second = Mixture(others, weights, needs_caption=False, field="ssl_mixture")
  return pipeline.training_samples(Mixture((first,)), say_both, seed, second)


def read(stream: pipeline.TrainStream, batches: int) -> dict[str, np.ndarray]:
  out = [next(stream) for _ in range(batches)]
  stream.close()
  return {name: np.concatenate([batch[name] for batch in out]) for name in out[0]}


def test_each_pass_is_another_permutation_with_other_randomness() -> None:
  got = read(pipeline.TrainStream(rows(Numbers(60)), 20), 6)
  first, second = got["value"][:60], got["value"][60:]
  assert sorted(first) == sorted(second) == list(range(60))
  assert not np.array_equal(first, second)
  assert not np.array_equal(first, np.arange(60))
  assert len(set(got["random"])) == 120


def test_stream_equals_earlier_versions() -> None:
  """Their runs resume with the same examples."""
  mixed = rows(Numbers(60), Numbers(20, first=100), weights=(0.75, 0.25), seed=5)
  values = [int(mixed[index]["value"]) for index in range(12)]
  assert values == [7, 14, 9, 112, 37, 33, 13, 109, 52, 28, 44, 114]
  randoms = [mixed[index]["random"] for index in range(3)]
  np.testing.assert_allclose(randoms, [0.8575790745355746, 0.5714996183535328, 0.023811064663947445], rtol=1e-15)


def test_seed_changes_order_and_augmentation() -> None:
  a, b = (read(pipeline.TrainStream(rows(Numbers(60), seed=seed), 20), 3) for seed in (0, 1))
  assert not np.array_equal(a["value"], b["value"])
  assert not set(a["random"]) & set(b["random"])


@pytest.mark.parametrize("workers", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_stream_and_resumption_do_not_depend_on_workers(workers: int) -> None:
  whole = read(pipeline.TrainStream(rows(Numbers(50)), 8), 12)
  stream = pipeline.TrainStream(rows(Numbers(50)), 8)
  head = [next(stream) for _ in range(5)]
  state = stream.state
  stream.close()
  assert state == {"next_index": 40}
  tail = read(pipeline.TrainStream(rows(Numbers(50)), 8, workers=workers, threads=2, state=state), 7)
  for name in ("value", "random"):
    np.testing.assert_array_equal(np.concatenate([*(batch[name] for batch in head), tail[name]]), whole[name])


def test_hosts_share_each_batch_and_any_number_continues() -> None:
  whole = read(pipeline.TrainStream(rows(Numbers(50)), 8), 6)["value"].reshape(6, 8)
  parts = [pipeline.TrainStream(rows(Numbers(50)), 8, host=host, hosts=2, state={"next_index": 16}) for host in (0, 1)]
  assert [part.state for part in parts] == [{"next_index": 16}] * 2
  values = [read(part, 4)["value"].reshape(4, 4) for part in parts]
  np.testing.assert_array_equal(values[0], whole[2:, :4])
  np.testing.assert_array_equal(values[1], whole[2:, 4:])


def test_another_batch_size_continues_at_the_same_example() -> None:
  mixed = rows(Numbers(50), Numbers(20, first=100), weights=(0.75, 0.25))
  whole = [int(mixed[index]["value"]) for index in range(60)]
  stream = pipeline.TrainStream(mixed, 8)
  head = read(stream, 3)["value"]
  middle = pipeline.TrainStream(mixed, 12, state=stream.state)
  tail = read(middle, 2)["value"]
  assert [*head, *tail, *read(pipeline.TrainStream(mixed, 4, state=middle.state), 3)["value"]] == whole


def test_mixture_is_in_exact_proportion() -> None:
  mixed = rows(Numbers(30), Numbers(30, first=100), weights=(0.75, 0.25))
  values = read(pipeline.TrainStream(mixed, 40), 3)["value"]
  assert (values < 100).sum() == 90


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0)])
def test_bad_mixture_is_rejected(weights: tuple[float, ...]) -> None:
  with pytest.raises(ValueError, match="a positive weight for each of 2 sources"):
    rows(Numbers(3), Numbers(3), weights=weights)


def test_empty_source_is_rejected() -> None:
  with pytest.raises(ValueError, match="numbers has no usable sample"):
    rows(Numbers(0))


def test_bad_example_is_replaced_by_another_and_named(caplog: pytest.LogCaptureFixture) -> None:
  pipeline._warned.clear()
  good, mixed = rows(Numbers(60)), rows(Numbers(60, broken=(1, 2), blank=(5,)))
  kinds = {1: "unknown format", 2: "unknown format", 5: "no caption"}
  for index in range(120):
    value, row = int(good[index]["value"]), mixed[index]
    passed = dict(zip(BAD, row["bad_counts"], strict=True))
    if value in kinds:
      assert row["value"] not in kinds
      assert passed[kinds[value]] >= 1
    else:
      assert row["value"] == value
      assert not any(passed.values())
  assert "skipped (unknown format) numbers:1: " in caplog.text
  assert "skipped (no caption) numbers:5: no caption" in caplog.text


def test_runs_of_bad_examples_do_not_favour_the_next_good_one() -> None:
  mixed = rows(Numbers(240, broken=tuple(range(60, 180))))
  counts = np.bincount([int(mixed[index]["value"]) for index in range(240)], minlength=240)
  assert counts[60:180].sum() == 0
  assert counts.sum() == 240
  assert counts.max() < 8


def test_only_the_first_bad_examples_of_a_kind_are_named(caplog: pytest.LogCaptureFixture) -> None:
  pipeline._warned.clear()
  mixed = rows(Numbers(200, broken=tuple(range(0, 200, 2)), blank=(1,)))
  counted = sum(mixed[index]["bad_counts"] for index in range(200))
  assert caplog.text.count("unknown format") == 20
  assert "further ones of this kind are only counted" in caplog.text
  assert "numbers:1: no caption" in caplog.text
  assert counted[BAD.index("unknown format")] > 90


def test_a_bad_example_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
  pipeline._warned.clear()
  mixed = rows(Numbers(4, broken=(2,)))
  assert sum(mixed[index]["bad_counts"].sum() for index in range(40)) > 1
  assert caplog.text.count("numbers:2: ") == 1


def test_file_that_cannot_be_read_is_a_bad_example() -> None:
  class Gone(Numbers):
    def __getitem__(self, index: int) -> dict:
      if index == 2:
        raise FileNotFoundError("2.jpg")
      return super().__getitem__(index)

  got = [rows(Gone(4))[index] for index in range(4)]
  assert {int(row["value"]) for row in got} == {0, 1, 3}
  assert sum(row["bad_counts"][BAD.index("missing file")] > 0 for row in got) == 1


def test_source_without_anything_usable_is_one_error_that_names_the_first(caplog: pytest.LogCaptureFixture) -> None:
  pipeline._warned.clear()
  broken = Numbers(3, broken=(0, 1, 2))
  with pytest.raises(ValueError, match=r"numbers: none of 100 random draws from 3 samples .* first one: numbers:\d: "):
    rows(broken)[0]
  with pytest.raises(ValueError, match=r"100 random draws from 3 samples .* first one: numbers:0: "):
    pipeline.check_readable(broken, images.MAX_PIXELS, Deaths())
  assert not caplog.text
  pipeline.check_readable(Numbers(3, broken=(0,)), images.MAX_PIXELS, Deaths())


def test_captions_are_required_only_if_the_recipe_reads_them() -> None:
  def say_pixel(example: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"value": np.int32(example["image"][0, 0, 0])}

  silent = Numbers(20, blank=tuple(range(20)))
  got = pipeline.training_samples(Mixture((silent,), needs_caption=False), say_pixel, 0)
  assert sorted(int(got[index]["value"]) for index in range(20)) == list(range(20))
  with pytest.raises(ValueError, match="none of 100 random draws from 20 samples .*no caption"):
    pipeline.training_samples(Mixture((silent,)), say_pixel, 0)[0]


def test_templates_caption_the_examples_that_have_a_class_and_no_caption() -> None:
  def say_captions(example: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"captions": np.array("|".join(example["captions"]))}

  mixture = Mixture((Numbers(4, blank=(0, 1, 2)),), templates=("a {} one", "{}!"))
  got = pipeline.training_samples(mixture, say_captions, 0)
  assert sorted(str(got[index]["captions"]) for index in range(4)) == [
    "3",
    "a even one|even!",
    "a even one|even!",
    "a odd one|odd!",
  ]


@pytest.mark.parametrize(
  ("cores", "given", "planned"),
  [
    (1, (None, None), (0, 1)),
    (2, (None, None), (0, 2)),
    (4, (None, None), (0, 4)),
    (16, (None, None), (3, 4)),
    (112, (None, None), (27, 4)),
    (16, (None, 2), (7, 2)),
    (16, (0, None), (0, 4)),
    (2, (3, 1), (3, 1)),
  ],
)
def test_reader_counts_follow_the_cores(cores: int, given: tuple, planned: tuple[int, int]) -> None:
  assert readers.reader_counts(*given, cores=cores) == planned


def test_processes_read_an_evaluation_only_if_it_is_worth_their_start() -> None:
  assert readers.evaluation_reader_counts(5000, None, None, cores=16) == (0, 16)
  assert readers.evaluation_reader_counts(50000, None, None, cores=16) == (3, 4)
  assert readers.evaluation_reader_counts(50000, 0, 2, cores=16) == (0, 2)
  assert readers.evaluation_reader_counts(5000, 2, None, cores=16) == (0, 16)


def test_reading_in_this_process_leaves_opencvs_threads_alone() -> None:
  before = cv2.getNumThreads()
  cv2.setNumThreads(3)
  try:
    list(pipeline.EvaluationBatches(Numbers(3), range(3), 2, 2, images.EvalView(2)))
    assert cv2.getNumThreads() == 3
  finally:
    cv2.setNumThreads(before)


def die_at_30(example: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
  if int(example["captions"][0]) == 30:
    os._exit(7)
  return say_number(example, rng)


@pytest.mark.slow
def test_dead_worker_is_an_error_within_seconds() -> None:
  stream = pipeline.TrainStream(
    pipeline.training_samples(Mixture((Numbers(40),)), die_at_30, 0), 4, workers=2, threads=1
  )
  batches = pipeline.Prefetch(stream, lambda batch: batch)
  next(batches)  # the processes have started
  start = time.perf_counter()
  with pytest.raises(ChildProcessError, match=r"exit code 7.*config\.data\.workers"):
    list(itertools.islice(batches, 12))
  batches.close()
  assert time.perf_counter() - start < 30


# The limit of pixels.


@dataclass(frozen=True)
class Squares(Numbers):
  """The encoded image of example i has 4 x 4 pixels, or 6 x 6 if i is in `broken`."""

  def __getitem__(self, index: int) -> dict:
    side, file = (6 if index in self.broken else 4), io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return super().__getitem__(index) | {"image": file.getvalue()}


def test_a_limit_of_pixels_holds_in_training_and_evaluation() -> None:
  """Also above the default, and for the images of a second stream."""
  views = MakeViews(RECIPES["slip"], Tokenizer(16), Rendering(4, max_pixels=16))
  sources = [Mixture((Squares(20, broken=broken),)) for broken in ((1, 2), (5, 6, 7))]
  samples = pipeline.training_samples(sources[0], views, 0, sources[1], max_pixels=16)
  counts = sum(samples[index]["bad_counts"] for index in range(20))
  assert dict(zip(BAD, counts.tolist(), strict=True))["too many pixels"] == counts.sum() >= 5
  for limit, readable in ((16, 18), (36, 20)):
    reading = pipeline.Reading(max_pixels=limit)
    batches = pipeline.EvaluationBatches(Squares(20, broken=(1, 2)), range(20), 4, 5, images.EvalView(2), reading)
    assert sum(batch["readable"].sum() for batch in batches) == readable
  large = io.BytesIO()
  Image.new("1", (9000, 8000)).save(large, "PNG")
  assert images.open_photo(large.getvalue(), images.LARGEST_LIMIT).width == 9000


# Decoupled: self-supervision on images of a second stream.


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_decoupled_stream_and_resumption_do_not_depend_on_workers(workers: int) -> None:
  mixed = {"first": Numbers(50), "weights": (0.5, 0.5), "seed": 3}
  others = Numbers(23, first=100, broken=(4,)), Numbers(31, first=150)
  whole = [decoupled(*others, **mixed)[index] for index in range(96)]
  stream = pipeline.TrainStream(decoupled(*others, **mixed), 8)
  head = read(stream, 5)
  assert stream.state == {"next_index": 40}
  tail = read(pipeline.TrainStream(decoupled(*others, **mixed), 8, workers=workers, threads=2, state=stream.state), 7)
  for name in ("value", "other", "random", "bad_counts"):
    np.testing.assert_array_equal(np.concatenate([head[name], tail[name]]), [row[name] for row in whole])
  others = np.array([row["other"] for row in whole])
  assert (others < 150).sum() == 48


def test_hosts_share_decoupled_batches() -> None:
  whole = read(pipeline.TrainStream(decoupled(Numbers(31, first=100), first=Numbers(50)), 8), 3)["other"]
  for host in (0, 1):
    stream = pipeline.TrainStream(decoupled(Numbers(31, first=100), first=Numbers(50)), 8, host=host, hosts=2)
    np.testing.assert_array_equal(read(stream, 3)["other"].reshape(3, 4), whole.reshape(3, 2, 4)[:, host])


def test_second_stream_changes_nothing_in_the_first() -> None:
  alone = rows(Numbers(50), seed=3)
  both = decoupled(Numbers(31, first=100), first=Numbers(50), seed=3)
  for index in (*range(60), 10**9):
    row = both[index]
    assert all(np.array_equal(row[name], value) for name, value in alone[index].items())


def test_second_stream_is_shuffled_by_itself() -> None:
  """Over the same source, too, it has neither the same images nor those of another pass."""
  passes, count = 6, 40
  got = [decoupled(Numbers(count), first=Numbers(count))[index] for index in range(passes * count)]
  first, second = (np.array([row[name] for row in got]).reshape(passes, count) for name in ("value", "other"))
  assert all(sorted(one) == list(range(count)) for one in second)
  equal = (first[:, None] == second[None]).mean(axis=2)
  assert equal.max() < 0.25  # by chance 1 of 40


def test_skipped_counts_both_streams_and_no_missing_caption_of_the_second() -> None:
  others = Numbers(10, broken=(3, 4), blank=tuple(range(10)))
  got = [decoupled(others, first=Numbers(10, broken=(0,), blank=(5,)))[index] for index in range(10)]
  assert {int(row["other"]) for row in got} == set(range(10)) - {3, 4}
  assert {int(row["value"]) for row in got} == set(range(10)) - {0, 5}
  alone = [rows(Numbers(10, broken=(0,), blank=(5,)))[index]["bad_counts"].sum() for index in range(10)]
  both = [row["bad_counts"].sum() for row in got]
  assert sum(count > 0 for count in alone) == 2
  assert sum(both) >= sum(alone) + 2


def test_sources_with_only_classes_require_templates() -> None:
  silent = Numbers(20, blank=tuple(range(20)))
  with pytest.raises(ValueError, match=r"numbers has classes but no captions: set config.data.templates, such as"):
    Mixture((silent,)).check_captions()
  Mixture((silent,), templates=("{}",)).check_captions()
  Mixture((silent,), needs_caption=False).check_captions()
  Mixture((Numbers(20),)).check_captions()


def test_sources_without_captions_are_rejected_but_not_those_with_few_or_unreadable_ones() -> None:
  blank = tuple(range(200))
  with pytest.raises(ValueError, match=r"numbers has no captions: found none in 100 samples tried"):
    Mixture((Numbers(200, blank=blank, classnames=()),), templates=("{}",)).check_captions()
  Mixture((Numbers(200, blank=blank[:-2], classnames=()),)).check_captions()
  Mixture((Unreadable(200, classnames=()),)).check_captions()  # the pipeline says what is wrong with them


def read_slowly(example: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
  time.sleep(0.01)
  return say_number(example, rng)


def test_a_batch_is_made_by_all_threads() -> None:
  """128 rows of 10 ms: one thread would take 1.3 s for the first batch."""
  stream = pipeline.TrainStream(pipeline.training_samples(Mixture((Numbers(250),)), read_slowly, 0), 128, threads=4)
  start = time.perf_counter()
  batch = next(stream)
  assert time.perf_counter() - start < 1.0
  stream.close()
  whole = pipeline.training_samples(Mixture((Numbers(250),)), say_number, 0)
  np.testing.assert_array_equal(batch["value"], [whole[index]["value"] for index in range(128)])


@pytest.mark.slow
def test_workers_end_when_the_training_is_killed(tmp_path: pathlib.Path) -> None:
  """The script has no main guard: workers do not import it, however late they start."""
  program = tmp_path / "train.py"
  program.write_text(
    "import os, signal, sys, time\n"
    "from multiprocessing import spawn\n"
    f"sys.path[:0] = [{str(pathlib.Path(__file__).parent)!r}, {str(pathlib.Path(__file__).parents[1])!r}]\n"
    "import psutil, pipeline_test as here\n"
    "prepare = spawn.get_preparation_data\n"
    "spawn.get_preparation_data = lambda name: (time.sleep(0.3), prepare(name))[1]\n"
    "stream = here.pipeline.TrainStream(here.rows(here.Numbers(50)), 8, workers=2, threads=1)\n"
    "next(stream)\n"
    "print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)\n"
    "os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  path = os.pathsep.join(filter(None, [str(pathlib.Path(pipeline.__file__).parents[2]), os.environ.get("PYTHONPATH")]))
  done = subprocess.run(
    [sys.executable, program], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=False
  )
  assert done.returncode == -signal.SIGKILL
  children = [int(pid) for pid in done.stdout.split()]
  assert len(children) >= 2
  for _ in range(100):
    left = [pid for pid in children if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    if not left:
      break
    time.sleep(0.1)
  assert not left


def test_bad_second_mixture_is_rejected() -> None:
  with pytest.raises(
    ValueError, match=r"config.data.ssl_mixture=\(1.0,\): expected a positive weight for each of 2 sources"
  ):
    decoupled(Numbers(3), Numbers(3), first=Numbers(3))
  with pytest.raises(ValueError, match="numbers has no usable sample"):
    decoupled(Numbers(0), first=Numbers(3))


def test_prefetch_yields_states_and_raises_errors() -> None:
  def fail_at_30(example: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if int(example["captions"][0]) == 30:
      raise MemoryError("thirty")
    return say_number(example, rng)

  stream = pipeline.TrainStream(rows(Numbers(30, broken=(7,))), 10)
  with_broken = pipeline.Prefetch(stream, lambda batch: batch)
  seen = [next(with_broken) for _ in range(3)]
  with_broken.close()
  assert [state for _, state, _ in seen] == [{"next_index": 10}, {"next_index": 20}, {"next_index": 30}]
  assert sum(passed_over.sum() for *_, passed_over in seen) == 1
  failing = pipeline.training_samples(Mixture((Numbers(31),)), fail_at_30, 0)
  batches = pipeline.Prefetch(pipeline.TrainStream(failing, 31), lambda batch: batch)
  with pytest.raises(MemoryError, match="numbers:30: .*thirty"):
    next(batches)
  batches.close()


@pytest.mark.parametrize(
  ("batch_size", "hosts", "workers"),
  [(4, 1, 0), (16, 1, 0), (4, 2, 0), (16, 2, 0), pytest.param(4, 2, 2, marks=pytest.mark.slow)],
)
def test_evaluation_is_in_order_padded_and_masked(
  batch_size: int, hosts: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(readers, "_WORTH_PROCESSES", 0)
  source, local = Numbers(11, broken=(3,)), batch_size // hosts
  rows = [range(0, 11)] if hosts == 1 else [range(0, 6), range(6, 11)]
  num_batches = -(-len(rows[0]) // local)
  of_hosts = [
    list(pipeline.EvaluationBatches(source, own, local, num_batches, images.EvalView(2), pipeline.Reading(workers)))
    for own in rows
  ]
  assert {len(batches) for batches in of_hosts} == {num_batches}
  assert {(batch["image"].shape, batch["image"].dtype.name) for batches in of_hosts for batch in batches} == {
    ((local, 2, 2, 3), "uint8")
  }
  joined = {
    name: np.concatenate(
      [batch[name] for batches in of_hosts for batch in batches]
      if hosts == 1
      else [np.concatenate([batch[name] for batch in of_hosts[host]])[: len(rows[host])] for host in range(2)]
    )
    for name in ("image", "label", "readable", "id")
  }
  assert (joined["label"].dtype.name, joined["readable"].dtype.name) == ("int32", "bool")
  readable, kept = joined["readable"], [value for value in range(11) if value != 3]
  np.testing.assert_array_equal(np.flatnonzero(readable), kept)
  np.testing.assert_array_equal(joined["image"][readable, 0, 0, 0], kept)
  np.testing.assert_array_equal(joined["label"][readable], [value % 2 for value in kept])
  assert (joined["label"][~readable] == -1).all()
  assert joined["id"][readable].tolist() == [f"numbers:{value}" for value in kept]


@pytest.mark.parametrize("recipe", slow_except(("clip", "declip", "filip", "slip_mim"), RECIPES))
def test_batch_shapes_equal_the_samples(recipe: str) -> None:
  source = open_source("scenes:train/40/24")
  make_views = MakeViews(
    RECIPES[recipe], Tokenizer(16), Rendering(20), Masking(patch_grid=5), num_classes=len(source.classnames)
  )
  dataset = pipeline.training_samples(Mixture((source,)), make_views, 0)
  batch = next(pipeline.TrainStream(dataset, 8))
  batch.pop(pipeline.BAD_COUNTS)
  assert {name: (value.shape, value.dtype.type) for name, value in batch.items()} == make_views.batch_shapes(8)


def test_views_follow_the_recipe() -> None:
  file = io.BytesIO()
  Image.new("RGB", (40, 30), (10, 200, 90)).save(file, "PNG")
  example = {"image": images.decode(file.getvalue()), "captions": ("a tall red house stands alone",)}
  tokenizer = Tokenizer(16)
  clip = MakeViews(RECIPES["clip"], tokenizer, Rendering(8))(example, np.random.default_rng(0))
  assert (clip["image"] == [10, 200, 90]).all()  # a crop and nothing else
  np.testing.assert_array_equal(clip["text"], tokenizer(example["captions"]))
  slip = MakeViews(RECIPES["slip"], tokenizer, Rendering(8))(example, np.random.default_rng(1))
  assert (slip["image"][0] == [10, 200, 90]).all()
  assert not np.array_equal(slip["image"][1], slip["image"][2])
  for seed in range(20):
    row = MakeViews(RECIPES["declip"], tokenizer, Rendering(8))(example, np.random.default_rng(seed))
    raw, _, masked = row["text"]
    np.testing.assert_array_equal(raw, clip["text"][0])  # the contrast sees a clean caption
    real = row["mlm_weight"] > 0
    np.testing.assert_array_equal(raw[row["mlm_position"][real]], row["mlm_target"][real])
    changed = np.flatnonzero(raw != masked)
    assert set(changed) <= set(row["mlm_position"][real])


def test_sources_with_fewer_samples_than_positions_in_a_batch_are_named():
  few, enough = Numbers(4, name="few"), Numbers(12, name="enough")
  assert Mixture((few,)).repeats(4) == []
  (message,) = Mixture((few, enough), (0.3, 0.7)).repeats(16)
  assert message.startswith("few has 4 samples for 4.8 positions in each batch")

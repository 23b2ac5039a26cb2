"""Whatever goes wrong in one sample, the stream continues, and equals one in which that sample is known to be bad."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
from dataclasses import dataclass, field, replace
import errno
import multiprocessing
import os
from pathlib import Path
import pickle
import subprocess
import sys
import threading
import time
from typing import Any
import zipfile

from absl import logging
import cv2
import numpy as np
import pytest

from declip_jax import command_line
from declip_jax.data import deaths as deaths_lib
from declip_jax.data import hangs, images, pipeline, readers, records
from declip_jax.data.deaths import Deaths
from declip_jax.data.images import views as image_views
from declip_jax.data.make_views import MakeViews, Rendering
from declip_jax.data.mixture import Mixture
from declip_jax.data.recipes import RECIPES
from declip_jax.data.sources import BAD, BadSample, read_example
from declip_jax.data.sources.base import bad_sample
from declip_jax.data.sources.folder import open_folder
from declip_jax.data.storage import files, remote, texts, zips
from declip_jax.data.text.tokenizer import Tokenizer


class Panic(BaseException):
  """Like the panics of Rust libraries, which are not an `Exception`."""


class Speechless(Exception):
  def __str__(self) -> str:
    raise RuntimeError("no message")


class Unreadable:
  def __array__(self, *_: object) -> np.ndarray:
    raise Panic("collate")


def fail(error: type[BaseException]) -> Callable[[], None]:
  def raise_it() -> None:
    raise error("a fault")

  return raise_it


def hang() -> None:
  time.sleep(1000)


def spin() -> None:
  while True:
    pass


def crash() -> None:
  ctypes.string_at(0)


def leave() -> None:
  os._exit(0)


# What happens in a sample: the kind that it counts as when a source is read, and what does it.
FAULTS: dict[str, tuple[str, Callable[[], None]]] = {
  "panic": ("unexpected error", fail(Panic)),
  "speechless": ("unexpected error", fail(Speechless)),
  "stop": ("unexpected error", fail(StopIteration)),
  "recursion": ("unexpected error", fail(RecursionError)),
  "assertion": ("unexpected error", fail(AssertionError)),
  "value": ("unexpected error", fail(ValueError)),
  "os": ("missing file", fail(OSError)),
  "too large": ("too large", fail(files.TooLarge)),
  "hang": ("too slow", hang),
  "spin": ("too slow", spin),
  "crash": ("fatal", crash),
  "leave": ("fatal", leave),
}
KILLS = ("crash", "leave")
STAGES = ("open", "views", "collate")


@pytest.fixture(autouse=True)
def forget_slow_samples() -> None:
  hangs._slow.clear()


@dataclass(frozen=True)
class Faulty:
  """Image and caption of sample i are i; what goes wrong in samples is given by stage and name of the fault."""

  count: int
  faults: dict[int, tuple[str, str]] = field(default_factory=dict)
  known: tuple[int, ...] = ()
  name: str = "faulty"
  classnames: tuple[str, ...] = ()
  stamp: str = "1"
  skipped: dict[str, int] = field(default_factory=dict)

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> dict:
    if index in self.known:
      raise BadSample("no caption", f"faulty:{index}")
    stage, fault = self.faults.get(index, ("", ""))
    if stage == "open":
      FAULTS[fault][1]()
    return {
      "image": np.full((4, 4, 3), index, np.uint8),
      "captions": (str(index),),
      "label": -1,
      "id": f"faulty:{index}",
    }


@dataclass(frozen=True)
class Views:
  faults: dict[int, tuple[str, str]] = field(default_factory=dict)

  def __call__(self, example: dict, rng: np.random.Generator) -> dict:
    value = int(example["captions"][0])
    drawn = rng.random()
    stage, fault = self.faults.get(value, ("", ""))
    if stage == "views":
      FAULTS[fault][1]()
    return {"value": np.int32(value), "random": Unreadable() if stage == "collate" else drawn}


def patient(seconds: float) -> float:
  """A limit for one sample that other processes of a busy machine do not use up: more, the more of them wait."""
  return seconds * max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))


def _stream(
  source: Faulty,
  folder: Path | None = None,
  *,
  workers: int = 0,
  state: dict | None = None,
  seconds: float | None = None,
) -> pipeline.TrainStream:
  deaths, limit = Deaths(folder), patient(0.6) if seconds is None else seconds
  for line in deaths.recover():
    logging.warning(line)
  samples = pipeline.training_samples(Mixture((source,)), Views(source.faults), 0, deaths=deaths)
  return pipeline.TrainStream(samples, 8, workers=workers, threads=3, state=state, seconds=limit, deaths=deaths)


def _read(stream: pipeline.TrainStream, batches: int) -> dict[str, np.ndarray]:
  try:
    out = [next(stream) for _ in range(batches)]
  finally:
    stream.close()
  return {name: np.concatenate([batch[name] for batch in out]) for name in out[0]}


def _equals_the_stream_without(faults: dict[int, tuple[str, str]], got: dict[str, np.ndarray], count: int) -> None:
  batches = len(got["value"]) // 8
  want = _read(_stream(Faulty(count, known=tuple(faults)), seconds=0), batches)
  np.testing.assert_array_equal(got["value"], want["value"])
  np.testing.assert_array_equal(got["random"], want["random"])
  kinds = Counter(FAULTS[fault][0] for _, fault in faults.values())
  counts = dict(zip(BAD, got["bad_counts"].sum(axis=0), strict=True))
  assert {kind for kind, number in counts.items() if number} == set(kinds)
  assert sum(counts.values()) == want["bad_counts"].sum()


@pytest.mark.parametrize("stage", STAGES)
def test_the_stream_is_that_without_the_bad_samples(stage: str) -> None:
  names = [name for name in FAULTS if name not in KILLS and (stage != "collate" or name == "panic")]
  faults = {3 * number: (stage, name) for number, name in enumerate(names)}
  hangs_too = any(name in ("hang", "spin") for name in names)
  stream = _stream(Faulty(40, faults), seconds=None if hangs_too else 0)  # no sample but those takes too long
  _equals_the_stream_without(faults, _read(stream, 5), 40)


HERE = threading.local()  # `fault`: stage and name of the fault of the sample that a thread reads
# The functions that do the work of a stage, which fail before they begin.
WORK = {
  "open": (files._File, "__init__"),
  "read": (files._File, "read"),
  "parse": (texts, "decode"),
  "decode": (images.Photo, "decode"),
  "tokenise": (Tokenizer, "__call__"),
  "augment": (image_views, "_augment"),
}
LIST_STAGES = ("open", "read", "parse")  # a list takes a ValueError of these for a path that it cannot resolve
CONTENTS = {"empty": "empty image", "cut": "damaged image", "sparse": "too large"}  # of the file of an image
replaced: list[tuple[Any, str, Any]] = []  # in this process
replacing = threading.Lock()


def inject() -> None:
  """Lets the functions of `WORK` fail, once in each process, for the samples that a `Staged` names."""
  with replacing:  # no thread reads while only some of them are replaced
    for stage, (owner, name) in WORK.items() if not replaced else ():
      replaced.append((owner, name, getattr(owner, name)))
      setattr(owner, name, failing(stage, getattr(owner, name)))


def failing(stage: str, function: Callable) -> Callable:
  def work(*args: Any, **kwargs: Any) -> Any:
    where, fault = getattr(HERE, "fault", ("", ""))
    if where == stage:
      FAULTS[fault][1]()
    return function(*args, **kwargs)

  return work


@pytest.fixture
def undo_injection() -> Iterator[None]:
  yield
  while replaced:
    setattr(*replaced.pop())


@dataclass(frozen=True)
class Staged(Faulty):
  """The samples of a folder."""

  folder: str = ""

  def __getitem__(self, index: int) -> dict:
    if index in self.known:
      raise BadSample("no caption", f"staged:{index}")
    if not hasattr(HERE, "source"):
      HERE.source = {}
    if self.folder not in HERE.source:
      HERE.fault = ("", "")
      HERE.source[self.folder] = open_folder(self.folder)
    inject()
    HERE.fault = self.faults.get(index, ("", ""))
    return HERE.source[self.folder][index]


@dataclass(frozen=True)
class StagedViews:
  make_views: Callable

  def __call__(self, example: dict, rng: np.random.Generator) -> dict:
    made = self.make_views(example, rng)
    return {**made, "text": Unreadable()} if HERE.fault[0] == "collate" else made


def write_pairs(folder: Path, count: int, contents: dict[int, str]) -> None:
  """Pairs of images and captions; the images of some samples have one of `CONTENTS`."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  for index in range(count):
    _, png = cv2.imencode(".png", rng.integers(0, 256, (12, 12, 3), np.uint8))
    kind, path = contents.get(index, ""), folder / f"{index:04}.png"
    path.write_bytes({"empty": b"", "cut": png.tobytes()[:90]}.get(kind, png.tobytes()))
    if kind == "sparse":
      os.truncate(path, 2 * files.MAX_BYTES)
    (folder / f"{index:04}.txt").write_text(f"caption {index} " + "long " * (20_000 if index % 50 == 0 else 1))


def staged_stream(source: Staged, folder: Path | None = None, **kwargs: Any) -> pipeline.TrainStream:
  deaths = Deaths(folder)
  views = StagedViews(MakeViews(RECIPES["clip"], Tokenizer(16), Rendering(8)))
  samples = pipeline.training_samples(Mixture((source,)), views, 0, deaths=deaths)
  return pipeline.TrainStream(samples, 8, threads=3, deaths=deaths, **kwargs)


def run_staged(tmp_path: Path, faults: dict[int, tuple[str, str]], count: int, **kwargs: Any) -> None:
  """Reads all samples once, and compares them with a stream in which the bad ones are known; counts add up by kind."""
  contents = {index: fault for index, (stage, fault) in faults.items() if stage == "content"}
  write_pairs(tmp_path / "pairs", count, contents)
  source = Staged(count, faults, folder=str(tmp_path / "pairs"))
  got = _read(staged_stream(source, tmp_path, **kwargs), count // 8)
  want = _read(staged_stream(replace(source, faults={}, known=tuple(faults)), seconds=0), count // 8)
  np.testing.assert_array_equal(got["image"], want["image"])
  np.testing.assert_array_equal(got["text"], want["text"])
  kinds = Counter(
    CONTENTS[fault]
    if stage == "content"
    else "missing file"
    if fault == "value" and stage in LIST_STAGES
    else FAULTS[fault][0]
    for stage, fault in faults.values()
  )
  counts = dict(zip(BAD, got["bad_counts"].sum(axis=0).tolist(), strict=True))
  assert {kind for kind, number in counts.items() if number} == set(kinds)
  assert sum(counts.values()) == want["bad_counts"].sum()
  assert all(counts[kind] >= number for kind, number in kinds.items())


def staged_faults(names: Sequence[str]) -> list[tuple[str, str]]:
  """Each fault at each stage, and each content of a file."""
  found = [(stage, name) for stage in WORK for name in names]
  return [*found, ("collate", "panic"), *(("content", name) for name in CONTENTS)]


PLAIN = [name for name in FAULTS if name not in (*KILLS, "hang", "spin")]


@pytest.mark.usefixtures("undo_injection")
def test_errors_of_every_type_from_every_stage_of_reading_files(tmp_path: Path) -> None:
  faults = {3 * number + 2: fault for number, fault in enumerate(staged_faults(PLAIN))}
  run_staged(tmp_path, faults, 8 * (3 * len(faults) // 8 + 1), seconds=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("undo_injection")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_random_faults_at_random_stages(workers: int, tmp_path: Path) -> None:
  """Errors, sizes and hangs at every stage; workers also die, at two of them, and are then replaced."""
  rng = np.random.default_rng(workers)
  found = [*staged_faults(PLAIN), *((stage, str(rng.choice(["hang", "spin"]))) for stage in WORK)]
  found += [(str(stage), name) for stage, name in zip(rng.choice([*WORK], 2), KILLS, strict=True) if workers]
  bad = rng.choice(400, len(found), replace=False).tolist()
  run_staged(tmp_path, dict(zip(bad, found, strict=True)), 400, workers=workers, seconds=patient(2.0))


@pytest.mark.slow
@pytest.mark.parametrize("fault", KILLS)
def test_a_sample_that_kills_a_worker_is_skipped_and_the_run_continues(fault: str, tmp_path: Path) -> None:
  faults = {5: ("open", fault)}
  got = _read(_stream(Faulty(40, faults), tmp_path, workers=1), 5)
  _equals_the_stream_without(faults, got, 40)
  assert not (tmp_path / "reading").exists()
  again = Deaths(tmp_path)
  again.recover()
  with pytest.raises(BadSample, match="2 processes died"):
    again.check(hangs.key_of(Faulty(40), 5), "5")


def test_a_worker_that_ends_with_exit_code_0_counts_as_dead() -> None:
  process = multiprocessing.get_context("spawn").Process(target=os._exit, args=(0,))
  process.start()
  readers._report_exits([process])
  assert process.exitcode


@pytest.mark.slow
def test_a_sample_that_kills_a_worker_is_skipped_in_evaluations(
  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  monkeypatch.setattr(readers, "_WORTH_PROCESSES", 0)
  source = Faulty(12, {5: ("open", "crash"), 7: ("open", "hang")})
  for count in (2, 0):  # of deaths; the second evaluation remembers them
    caplog.clear()
    batches = pipeline.EvaluationBatches(
      source, range(12), 4, 3, images.EvalView(2), pipeline.Reading(workers=1, seconds=patient(1.0))
    )
    assert np.flatnonzero(~np.concatenate([batch["readable"] for batch in batches])).tolist() == [5, 7]
    assert caplog.text.count("a process died while reading faulty: sample 5") == count


def _dies(folder: Path, index: int, others: tuple[int, ...] = ()) -> int:
  """Runs a process that dies while reading a sample, with others in other threads; returns its exit code."""
  program = (
    "import os, sys, threading, time\n"
    f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
    "import sample_faults_test as here\n"
    f"deaths = here.Deaths(here.Path({str(folder)!r}))\n"
    "for line in deaths.recover(): print(line)\n"
    "def read(number):\n"
    "  with deaths.reading({here.hangs.key_of(here.Faulty(40), number): f'faulty:{number}'}):\n"
    f"    time.sleep(0.5) if number != {index} else os._exit(7)\n"
    f"for number in {others}: threading.Thread(target=read, args=(number,), daemon=True).start()\n"
    "time.sleep(0.1)\n"
    f"read({index})\n"
  )
  path = os.pathsep.join(filter(None, [str(Path(pipeline.__file__).parents[2]), os.environ.get("PYTHONPATH")]))
  return subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, check=False).returncode


@pytest.mark.slow
def test_two_deaths_are_known_after_restarts_and_other_samples_are_not_blamed(tmp_path: Path) -> None:
  assert _dies(tmp_path, 5, (6, 7)) == 7
  assert _dies(tmp_path, 5, (8,)) == 7
  third = Deaths(tmp_path)
  (line,) = third.recover()
  assert "faulty:5" in line
  assert "skipped from now on" in line
  names = {index: hangs.key_of(Faulty(40), index) for index in (5, 6, 7, 8)}
  with pytest.raises(BadSample, match=r"five: 2 processes died") as caught:
    third.check(names[5], "five")
  assert caught.value.kind == "fatal"
  for index in (6, 7, 8):
    third.check(names[index], "")
  third.check(hangs.key_of(Faulty(40, stamp="2"), 5), "")  # other data


def test_a_process_that_ends_normally_blames_no_sample(tmp_path: Path) -> None:
  stream = _stream(Faulty(40), tmp_path)
  next(stream)
  assert len(list((tmp_path / "reading").iterdir())) == 1
  stream.close()
  assert not (tmp_path / "reading").exists()
  assert Deaths(tmp_path).recover() == []


def test_bad_lines_in_a_list_of_deaths_are_ignored(tmp_path: Path) -> None:
  key = hangs.key_of(Faulty(3), 1)
  (tmp_path / "deaths.0.jsonl").write_text(f'{{"sample": "{key}"}}\n[]\n\n{{"x": 1}}\n{{"sample": "{key}", "na')
  (tmp_path / "deaths.1.jsonl").write_text(f'{{"sample": "{key}", "name": "x"}}\n')
  deaths = Deaths(tmp_path)
  assert deaths.recover() == []
  with pytest.raises(BadSample, match="2 processes died"):
    pickle.loads(pickle.dumps(deaths)).check(key, "")


def test_without_a_writable_folder_samples_are_read_but_not_recorded(tmp_path: Path) -> None:
  (tmp_path / "reading").write_text("a file")
  assert len(_read(_stream(Faulty(10), tmp_path), 2)["value"]) == 16


def test_a_sample_in_which_a_process_died_is_read_alone() -> None:
  turns, seen = deaths_lib._Turns(), []
  others = [turns.take(alone=False) for _ in range(2)]

  def read() -> None:
    turn = turns.take(alone=True)
    seen.append(len(turns.reading))
    turn.give()

  thread = threading.Thread(target=read)
  thread.start()
  for other in others:
    assert not seen
    other.give()
  thread.join(5)
  assert seen == [1]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit])
def test_what_is_not_a_samples_fault_ends_the_stream_with_its_name(
  error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setitem(FAULTS, "other", ("", fail(error)))
  stream = _stream(Faulty(8, {3: ("views", "other")}))
  batches = pipeline.Prefetch(stream, lambda batch: batch)
  with pytest.raises(error) as caught:
    next(batches)
  batches.close()
  assert "faulty:3" in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))


def test_a_sample_of_another_shape_than_the_others_of_its_batch_is_named() -> None:
  def views(example: dict, rng: np.random.Generator) -> dict:
    return {"image": np.zeros(3 if example["captions"][0] == "5" else 4)}

  samples = pipeline.training_samples(Mixture((Faulty(8),)), views, 0)
  with pytest.raises(ValueError, match=r"faulty:5: views \{'image': \(3,\)\}, but .*'image': \(4,\)"):
    next(pipeline.TrainStream(samples, 8))


def test_errors_of_the_prefetch_thread_are_raised() -> None:
  batches = pipeline.Prefetch(_stream(Faulty(8)), lambda batch: fail(Panic)())
  with pytest.raises(Panic):
    next(batches)
  batches.close()


def test_messages_are_short_and_name_the_sample() -> None:
  error = bad_sample(ValueError("1\n" * 10_000), "a.jpg")
  assert str(error).startswith("a.jpg: ValueError: 1 1")
  assert len(str(error)) < 600


@pytest.mark.parametrize(("label", "usable"), [(2**31 - 1, True), (2**31, False), (10**30, False), (-2, False)])
def test_labels_fit_the_devices(label: int, usable: bool) -> None:
  example = {"image": np.zeros((2, 2, 3), np.uint8), "captions": ("x",), "label": label, "id": "here"}
  source = type("One", (list,), {"name": "one", "classnames": ()})([example])
  if usable:
    assert read_example(source, 0) == example
  else:
    with pytest.raises(BadSample, match=f"here: label {label}"):
      read_example(source, 0)
  (batch,) = pipeline.EvaluationBatches(source, range(1), 1, 1, images.EvalView(2))
  assert batch["readable"].tolist() == [usable]


def test_evaluation_skips_whatever_is_bad() -> None:
  names = [name for name in FAULTS if name not in KILLS]
  source = Faulty(20, {2 * number: ("open", name) for number, name in enumerate(names) if name != "other"})
  (batch,) = pipeline.EvaluationBatches(source, range(20), 20, 1, images.EvalView(2), pipeline.Reading(seconds=0.3))
  assert set(np.flatnonzero(~batch["readable"])) == set(source.faults)


def test_conversion_and_inspection_skip_whatever_is_bad() -> None:
  for index, kind in ((0, "unexpected error"), (1, "missing file")):
    with pytest.raises(BadSample) as caught:
      records.make_record(Faulty(3, {0: ("open", "panic"), 1: ("open", "os")}), index)
    assert caught.value.kind == kind


def _pipe(path: Path) -> None:
  os.mkfifo(path)


def _sparse(path: Path) -> None:
  with path.open("wb") as file:
    file.truncate(100 * 2**30)


@pytest.mark.parametrize(
  ("make", "error", "reason"),
  [
    (_pipe, OSError, "not a regular file"),
    (lambda path: path.symlink_to("/dev/zero"), OSError, "not a regular file"),
    (Path.mkdir, IsADirectoryError, "directory"),
    (_sparse, files.TooLarge, "107,374,182,400 bytes"),
  ],
)
def test_only_regular_files_of_some_size_are_read(make: Callable, error: type, reason: str, tmp_path: Path) -> None:
  path = tmp_path / "image.jpg"
  make(path)
  start = time.perf_counter()
  with pytest.raises(error, match=reason):
    files.read(str(path))
  with pytest.raises(OSError, match=str(path)):
    files.read(str(path), 0, 2**40)
  assert time.perf_counter() - start < 5


def test_members_of_zips_are_inflated_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(files, "MAX_BYTES", 2**20)
  path = tmp_path / "bomb.zip"
  for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
    with zipfile.ZipFile(path, "w", method) as archive:
      archive.writestr("1.jpg", bytes(2**20 + 1))
      archive.writestr("2.jpg", b"fine")
    with pytest.raises(files.TooLarge, match=r"1\.jpg: more than 1,048,576 bytes"):
      zips.read_member(str(path), "1.jpg")
    assert zips.read_member(str(path), "2.jpg") == b"fine"


@pytest.mark.parametrize(
  "scheme", ["nothing", "reference", "filecache", "dask", "data", "zip", "a b", "\0", "local", ""]
)
def test_a_url_of_any_scheme_raises_only_documented_errors(scheme: str) -> None:
  with contextlib.suppress(OSError, ValueError), remote.filesystem(f"{scheme}://x/y.jpg") as (_, name):
    assert name is not None


@dataclass(frozen=True)
class Broken(Faulty):
  """Every read fails with an error number of the system."""

  number: int = 0

  def __getitem__(self, index: int) -> dict:
    raise OSError(self.number, os.strerror(self.number), f"/mount/{index}.jpg")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT])
def test_a_shortage_of_the_machine_ends_the_run_with_the_name_of_the_sample(number: int) -> None:
  with pytest.raises(OSError, match=r"faulty: sample 7: .*/mount/7\.jpg") as caught:
    read_example(Broken(40, number=number), 7)
  assert caught.value.errno == number
  assert not isinstance(caught.value, BadSample)
  with pytest.raises(OSError, match="faulty: sample"):
    next(_stream(Broken(40, number=number)))


def test_a_shortage_of_memory_that_the_system_reports_is_a_memory_error() -> None:
  with pytest.raises(MemoryError, match=r"faulty: sample 7: .*/mount/7\.jpg"):
    read_example(Broken(40, number=errno.ENOMEM), 7)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
def test_a_dead_mount_ends_the_run_with_the_exit_code_after_which_launchers_restart(number: int) -> None:
  with pytest.raises(BadSample) as bad:
    read_example(Broken(40, number=number), 7)
  assert bad.value.kind == "read error"
  with pytest.raises(OSError, match=r"faulty: none of 100 random draws from 40 samples .*/mount/") as caught:
    next(_stream(Broken(40, number=number)))
  assert command_line.report(caught.value) == command_line.IO_EXIT_CODE
  with pytest.raises(ValueError, match="none of 100 random draws") as caught:
    next(_stream(Broken(40, number=errno.EACCES)))
  assert command_line.report(caught.value) == 2


@dataclass(frozen=True)
class Partly(Faulty):
  """Reading some samples fails with error numbers of the system."""

  numbers: dict[int, int] = field(default_factory=dict)

  def __getitem__(self, index: int) -> dict:
    if index in self.numbers:
      raise OSError(self.numbers[index], "fails", f"/mount/{index}.jpg")
    return super().__getitem__(index)


def _evaluate(source: Faulty) -> np.ndarray:
  batches = pipeline.EvaluationBatches(source, range(len(source)), 16, -(-len(source) // 16), images.EvalView(2))
  return np.concatenate([batch["readable"] for batch in batches])[: len(source)]


def test_a_dead_mount_ends_an_evaluation_as_it_ends_training() -> None:
  with pytest.raises(OSError, match=r"faulty: 100 examples in a row .*/mount/129\.jpg") as caught:
    _evaluate(Partly(300, numbers=dict.fromkeys(range(30, 300), errno.EIO)))
  assert command_line.report(caught.value) == command_line.IO_EXIT_CODE
  with pytest.raises(OSError, match="faulty: 5 examples in a row"):  # all that there are
    _evaluate(Partly(5, numbers={0: errno.ENOENT, **dict.fromkeys(range(1, 5), errno.EIO)}))


def test_samples_that_cannot_be_read_do_not_end_an_evaluation() -> None:
  scattered = {**dict.fromkeys(range(100, 199), errno.EIO), 10: errno.EIO, 230: errno.ESTALE}
  assert np.flatnonzero(~_evaluate(Partly(240, numbers=scattered))).tolist() == sorted(scattered)
  assert not _evaluate(Partly(120, numbers=dict.fromkeys(range(120), errno.ENOENT))).any()  # missing, not failing


def test_an_evaluation_reads_an_example_that_is_too_slow_once_more_and_then_skips_it(
  caplog: pytest.LogCaptureFixture,
) -> None:
  tries, free = Counter[int](), threading.Event()

  @dataclass(frozen=True)
  class Slow(Faulty):
    def __getitem__(self, index: int) -> dict:
      tries[index] += 1
      if index == 5 or (index == 2 and tries[index] == 1):
        free.wait(20)
      return super().__getitem__(index)

  batches = pipeline.EvaluationBatches(
    Slow(8), range(8), 8, 1, images.EvalView(2), pipeline.Reading(workers=0, seconds=0.1)
  )
  (batch,) = batches
  free.set()
  assert np.flatnonzero(~batch["readable"]).tolist() == [5]
  assert (tries[2], tries[5]) == (2, 2)
  assert "skipped in the evaluation (too slow) faulty: sample 5: not read within 0.1 s, twice" in caplog.text


def test_a_mount_that_delivers_nothing_in_time_ends_an_evaluation() -> None:
  @dataclass(frozen=True)
  class Stuck(Faulty):
    def __getitem__(self, index: int) -> dict:
      raise BadSample("too slow", f"faulty:{index}")

  with pytest.raises(OSError, match="faulty: 5 examples in a row"):
    _evaluate(Stuck(5))
  with pytest.raises(OSError, match="faulty: none of 100 random draws"):
    next(_stream(Stuck(40)))


def test_an_image_of_too_many_bytes_is_bad_whatever_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
  @dataclass(frozen=True)
  class Large(Faulty):
    def __getitem__(self, index: int) -> dict:
      return {**super().__getitem__(index), "image": bytes(index)}

  monkeypatch.setattr(files, "MAX_BYTES", 7)
  assert len(read_example(Large(40), 7)["image"]) == 7
  with pytest.raises(BadSample, match="faulty:8: an image of 8 bytes") as caught:
    read_example(Large(40), 8)
  assert caught.value.kind == "too large"


def test_a_dead_mount_ends_a_conversion(tmp_path: Path) -> None:
  @dataclass(frozen=True)
  class Dead(Faulty):
    def __getitem__(self, index: int) -> dict:
      if index == 150:
        return super().__getitem__(index)
      raise OSError(errno.ESTALE, "stale", f"/mount/{index}.jpg")

  shard = records.Shard(str(tmp_path / "a.array_record"), 51, 250)
  report = records.write(Dead(300), images.MAX_PIXELS, shard, lambda _: None)
  assert (report["count"], report["skipped"]) == (1, {"read error": 198})
  with pytest.raises(OSError, match=r"100 samples in a row.*/mount/250\.jpg"):
    records.write(Dead(300), images.MAX_PIXELS, shard._replace(stop=251), lambda _: None)
  assert list(tmp_path.iterdir()) == [tmp_path / "a.array_record"]

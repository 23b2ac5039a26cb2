from concurrent.futures import ThreadPoolExecutor
import io
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
import numpy as np
from PIL import Image
import pytest

from declip_jax.data import convert as convert_lib
from declip_jax.data import images, records, sources
from declip_jax.data.convert import convert
from declip_jax.data.mixture import Mixture
from declip_jax.data.sources.scenes import open_scenes
from declip_jax.data.storage import files, indexes, jobs, outputs


def jpeg(key: int) -> bytes:
  file = io.BytesIO()
  Image.fromarray(np.random.default_rng(key).integers(256, size=(8, 9, 3), dtype=np.uint8)).save(file, "JPEG")
  return file.getvalue()


# Also if the tests run in the background of a script, whose processes ignore it.
HEARS_CTRL_C = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}


@pytest.fixture
def shards(tmp_path) -> str:
  """60 samples of which 55 can be used, with classes, in three tars."""
  members = {}
  for key in range(60):
    members |= {f"{key}.jpg": jpeg(key), f"{key}.txt": f"caption {key}".encode(), f"{key}.cls": str(key % 2).encode()}
  members |= {"3.jpg": b"", "17.jpg": jpeg(17)[:300], "31.cls": b"dog", "32.cls": b"2"}
  del members["45.jpg"], members["50.txt"]
  for shard in range(3):
    with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
      for name, contents in members.items():
        if int(name.partition(".")[0]) % 3 == shard:
          info = tarfile.TarInfo(name)
          info.size = len(contents)
          tar.addfile(info, io.BytesIO(contents))
  (tmp_path / "classnames.txt").write_text("cat\nhot dog\n")
  return f"webdataset:{tmp_path}/*.tar"


def contents(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def usable(source: sources.Source) -> list[sources.Example]:
  found = []
  for index in range(len(source)):
    try:
      example = source[index]
      images.decode(example["image"])
      found.append(example)
    except ValueError:
      continue
  return found


def test_images_of_too_many_pixels_are_skipped(tmp_path):
  (tmp_path / "in").mkdir()
  for name, side in (("small", 8), ("large", 10)):
    Image.new("RGB", (side, side)).save(tmp_path / "in" / f"{name}.png")
  about = convert(f"folder:{tmp_path}/in", tmp_path / "out", shards=1, workers=1, max_pixels=99)
  assert (about["count"], about["skipped"], about["max_pixels"]) == (1, {"too many pixels": 1}, 99)
  with pytest.raises(ValueError, match="max_pixels 99, not 67108864"):
    convert(f"folder:{tmp_path}/in", tmp_path / "out")
  about = {name: value for name, value in about.items() if name != "max_pixels"}
  (tmp_path / "out" / "dataset.json").write_text(json.dumps(about))  # as older versions wrote it
  assert convert(f"folder:{tmp_path}/in", tmp_path / "out")["count"] == 1


def test_samples_are_unchanged_and_bad_ones_are_skipped_and_counted(shards, tmp_path):
  output = tmp_path / "out"
  summary = convert_lib._summary(convert(shards, output, shards=4, workers=2), str(output))
  names = [f"data-{number:05d}-of-00004.array_record" for number in range(4)]
  assert sorted(contents(output)) == ["classnames.txt", *names, "dataset.json"]
  source, converted = sources.open_source(shards), sources.open_source(f"arrayrecord:{output}/*.array_record")
  assert list(converted) == usable(source)
  assert len(converted) == 55
  assert converted.classnames == ("cat", "hot dog")
  about = json.loads((output / "dataset.json").read_text())
  named = about.pop("named")
  assert sum(about["skipped"].values()) == 5
  assert (about["skipped"]["damaged record"], about["skipped"]["no label"]) == (1, 1)
  assert about["skipped"]["missing file"] == 1  # counted when the tars were indexed
  assert {name: about[name] for name in ("source", "samples", "shards", "count")} == {
    "source": shards, "samples": 59, "shards": 4, "count": 55
  }  # fmt: skip
  assert "2.tar:32: bad .cls" in named["no label"][0]
  assert "55 samples in 4 files" in summary
  assert "skipped 1: damaged record\n  1.tar:31: bad .cls" in summary
  assert f"arrayrecord:{output}/*.array_record" in summary


def test_bytes_do_not_depend_on_workers_and_a_complete_folder_is_not_touched(shards, tmp_path):
  convert(shards, tmp_path / "one", shards=3, workers=1)
  about = convert(shards, tmp_path / "two", shards=3, workers=2)
  assert contents(tmp_path / "one") == contents(tmp_path / "two")
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").iterdir()}
  assert convert(shards, tmp_path / "two") == about
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "two").iterdir()} == before
  (tmp_path / "two" / "data-00001-of-00003.array_record").unlink()
  with pytest.raises(ValueError, match="now lacks 1 file, such as data-00001-of-00003"):
    convert(shards, tmp_path / "two")


def test_a_source_that_changed_is_rejected(shards, tmp_path, monkeypatch):
  def killed(*_):
    raise KeyboardInterrupt

  output = tmp_path / "out"
  convert(shards, output, shards=2, workers=1)
  monkeypatch.setattr(convert_lib, "_finish", killed)
  with pytest.raises(KeyboardInterrupt):
    convert(shards, tmp_path / "half", shards=2, workers=1)
  monkeypatch.undo()
  tar = (tmp_path / "0.tar").read_bytes()
  (tmp_path / "0.tar").write_bytes(tar.replace(b"caption 6", b"CAPTION 6"))
  for folder in (output, tmp_path / "half"):
    before = contents(folder)
    with pytest.raises(
      ValueError, match=f"{folder} is a conversion of webdataset:.* from before its files changed: delete"
    ):
      convert(shards, folder, workers=1)
    assert contents(folder) == before


def test_files_that_another_process_writes_are_not_touched(tmp_path):
  output = tmp_path / "out"
  settings = convert_lib._settings(open_scenes("test/10/16"), str(output), 1, images.MAX_PIXELS)
  (output / ".data-00000-of-00001.array_record.1.tmp").write_bytes(b"of a process that was killed")
  with outputs.temporary(output / "other") as theirs:
    inode = theirs.stat().st_ino
    writer = records.array_record_module.ArrayRecordWriter(str(theirs), records.WRITER_OPTIONS)
    assert convert("scenes:test/10/16", output, workers=1)["shards"] == settings["shards"]
    assert theirs.stat().st_ino == inode  # the writer keeps the file that is locked
    writer.close()
  assert sorted(contents(output)) == ["classnames.txt", "data-00000-of-00001.array_record", "dataset.json"]


def test_a_sample_is_bad_by_the_rules_of_training(monkeypatch):
  def unreadable(*_):
    raise OSError("no such thing")

  source = open_scenes("test/10/16")
  assert records.read(source, 3)[1].shape == (16, 16, 3)
  monkeypatch.setattr(type(source), "__getitem__", unreadable)
  for read in (lambda: records.read(source, 3), lambda: Mixture((source,)).read((0, 3))):
    with pytest.raises(sources.BadSample, match="scenes:test/10/16: .*3: no such thing") as error:
      read()
    assert error.value.kind == "missing file"


def test_pixels_become_png(tmp_path):
  convert("scenes:test/10/16", tmp_path / "out", workers=1)
  source, converted = (
    sources.open_source("scenes:test/10/16"),
    sources.open_source(f"arrayrecord:{tmp_path}/out/*.array_record"),
  )
  assert converted.classnames == source.classnames
  for before, after in zip([source[index] for index in range(10)], converted, strict=True):
    assert after["image"].startswith(b"\x89PNG")
    np.testing.assert_array_equal(images.decode(after["image"]), before["image"])
    assert {**after, "image": 0} == {**before, "image": 0}


SCENES = "scenes:test/1600/32"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, bytes]:
  output = tmp_path_factory.mktemp("uninterrupted")
  convert(SCENES, output, shards=2, workers=1)
  return contents(output)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_interrupted_conversion_continues_and_gives_the_same_bytes(tmp_path, uninterrupted, number):
  output = tmp_path / "out"
  command = [sys.executable, "-m", "declip_jax.data.convert", SCENES, str(output), "--shards=2", "--workers=1"]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **HEARS_CTRL_C)
  first = output / "data-00000-of-00002.array_record"
  progress = output / "progress.jsonl"
  while not (progress.exists() and progress.stat().st_size) and process.poll() is None:
    time.sleep(0.005)
  if number == signal.SIGINT:
    os.killpg(process.pid, number)  # as a terminal does
  else:
    process.kill()  # the workers notice that their parent is gone
  printed, errors = process.communicate(timeout=60)
  assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), errors
  assert "Traceback" not in errors
  assert first.is_file()
  assert not (output / "data-00001-of-00002.array_record").exists()
  assert printed == ""
  written = first.stat().st_mtime_ns
  about = convert(SCENES, output, workers=1)
  assert first.stat().st_mtime_ns == written
  assert about["count"] == 1600
  assert contents(output) == uninterrupted


@pytest.mark.slow
def test_an_interrupt_while_processes_start_is_reported_in_one_line(tmp_path):
  command = [sys.executable, "-m", "declip_jax.data.convert", "scenes:test/99999/16", str(tmp_path / "out")]
  process = subprocess.Popen([*command, "--shards=9", "--workers=2"], stderr=subprocess.PIPE, **HEARS_CTRL_C)
  while not (tmp_path / "out" / "dataset.json").exists():
    time.sleep(0.005)
  time.sleep(0.2)
  os.killpg(process.pid, signal.SIGINT)
  time.sleep(0.1)
  os.killpg(process.pid, signal.SIGINT)
  errors = process.communicate(timeout=60)[1].decode()
  assert process.returncode in (130, -signal.SIGINT)  # of the second one, if Python is ending; shells report it as 130
  assert "Traceback" not in errors
  assert errors.endswith("interrupted; run the same command again to resume\n")


def test_a_missing_file_or_truncated_report_is_written_again(shards, tmp_path, monkeypatch):
  def killed(*_):
    raise KeyboardInterrupt

  output = tmp_path / "out"
  monkeypatch.setattr(convert_lib, "_finish", killed)
  with pytest.raises(KeyboardInterrupt):
    convert(shards, output, shards=4, workers=1)
  monkeypatch.undo()
  whole = {name: file for name, file in contents(output).items() if name.startswith("data-")}
  lines = (output / "progress.jsonl").read_text().splitlines()
  (output / "progress.jsonl").write_text("\n".join([*lines[:2], lines[2][:20], lines[3]]))
  (output / "data-00000-of-00004.array_record").write_bytes(b"kept")
  (output / "data-00001-of-00004.array_record").unlink()
  (output / "data-00002-of-00004.array_record").write_bytes(b"written again")
  assert convert(shards, output, workers=1)["count"] == 55
  now = contents(output)
  assert {name: now[name] for name in whole} == {**whole, "data-00000-of-00004.array_record": b"kept"}
  assert sorted(now.keys() - whole.keys()) == ["classnames.txt", "dataset.json"]


def test_several_machines_write_the_files_of_one(shards, tmp_path):
  output, alone = tmp_path / "out", tmp_path / "alone"
  parts = [jobs.Part(number, 3) for number in range(3)]
  assert "count" not in convert(shards, output, shards=4, workers=1, part=parts[2])
  assert sorted(contents(output)) == [
    "classnames.txt", "data-00002-of-00004.array_record", "dataset.json", "progress-2-of-3.jsonl"
  ]  # fmt: skip
  about = convert(shards, output, workers=1, part=parts[0])
  assert convert_lib._summary(about, str(output)).startswith(f"{output}: 3 of 4 files; ")
  last = output / "data-00002-of-00004.array_record"
  written = last.stat().st_mtime_ns
  assert "count" not in convert(shards, output, workers=1, part=parts[2])
  assert last.stat().st_mtime_ns == written
  about = convert(shards, output, workers=1, part=parts[1])
  assert about == convert(shards, alone, shards=4, workers=1)
  assert contents(output) == contents(alone)
  assert convert(shards, output, workers=1, part=parts[0]) == about
  with pytest.raises(ValueError, match="shard=0/5: expected at most as many machines as files, 4"):
    convert(shards, output, workers=1, part=jobs.Part(0, 5))


def test_machines_that_work_at_once_complete_the_conversion(shards, tmp_path):
  output = tmp_path / "out"
  with ThreadPoolExecutor(3) as pool:
    found = list(pool.map(lambda number: convert(shards, output, workers=1, part=jobs.Part(number, 3)), range(3)))
  complete = [about for about in found if "count" in about]
  assert complete
  assert all(about == complete[0] for about in complete)
  assert json.loads((output / "dataset.json").read_text()) == complete[0]
  assert (complete[0]["shards"], complete[0]["count"]) == (3, 55)  # a file for each
  assert sorted(contents(output)) == [
    "classnames.txt", *(f"data-0000{number}-of-00003.array_record" for number in range(3)), "dataset.json"
  ]  # fmt: skip


def test_a_machine_that_was_interrupted_does_not_hold_up_one_that_writes_all(shards, tmp_path):
  output = tmp_path / "out"
  convert(shards, output, shards=4, workers=1, part=jobs.Part(1, 2))
  journal = output / "progress-1-of-2.jsonl"
  journal.write_text(journal.read_text()[:-9])
  first = output / "data-00001-of-00004.array_record"
  written = first.stat().st_mtime_ns
  assert convert(shards, output, workers=1)["count"] == 55
  assert first.stat().st_mtime_ns == written
  assert not [*output.glob("progress*")]


@pytest.mark.parametrize(("limit", "expected"), [(10**9, 1), (100_000, 5), (1, 300)])
def test_the_size_determines_the_number_of_files(tmp_path, monkeypatch, limit, expected):
  monkeypatch.setattr(convert_lib, "_SHARD_BYTES", limit)
  source = open_scenes("test/300/32")
  size = sum(len(records.make_record(source, index)) for index in range(300))
  assert 430_000 < size < 470_000
  assert convert_lib._settings(source, f"{tmp_path}/out", None, images.MAX_PIXELS)["shards"] == expected
  monkeypatch.setattr(convert_lib, "_MAX_SHARDS", 4)
  assert convert_lib._settings(source, f"{tmp_path}/few", None, images.MAX_PIXELS)["shards"] == min(expected, 4)


def test_user_errors_are_one_line(shards, tmp_path):
  def error(spec: str, output: str, **settings: int) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
      convert(spec, output, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)

  output = str(tmp_path / "out")
  assert "expected KIND:LOCATION" in error("/data/*.tar", output)
  assert "no file matches" in error(f"webdataset:{tmp_path}/x-*.tar", output)
  assert "shards=11: expected 1 to 10" in error("scenes:test/10/16", output, shards=11)
  assert "Protocol not known: unknown" in error("scenes:test/10/16", "unknown://bucket/out")
  assert not os.path.exists(output)
  convert("scenes:test/10/16", output, workers=1)
  assert "source 'scenes:test/10/16', not 'scenes:test/11/16'" in error("scenes:test/11/16", output)
  assert "shards 1, not 2" in error("scenes:test/10/16", output, shards=2)
  assert "it contains .declip_jax, 0.tar" in error(shards, str(tmp_path))
  (tmp_path / "out" / "dataset.json").write_text("[1]")
  assert f"{output}/dataset.json" in error("scenes:test/10/16", output)


@pytest.mark.parametrize(
  "arguments",
  [
    ["scenes:none", "OUT"],
    pytest.param(["scenes:test/10/16", "OUT", "--workers=0"], marks=pytest.mark.slow),
    pytest.param(["one"], marks=pytest.mark.slow),
  ],
)
def test_the_command_ends_with_one_line_and_exit_code_2(tmp_path, arguments):
  command = [sys.executable, "-m", "declip_jax.data.convert", *arguments]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (2, "")
  assert len(done.stderr.splitlines()) == 1
  assert list(tmp_path.iterdir()) == []


def test_a_source_without_usable_samples_is_an_error(tmp_path):
  with tarfile.open(tmp_path / "s.tar", "w") as tar:
    tar.addfile(tarfile.TarInfo("0.jpg"))
  with pytest.raises(ValueError, match="no usable sample among 1:"):
    convert(f"webdataset:{tmp_path}/s.tar", tmp_path / "out", workers=1)


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> dict[str, bytes]:
  """The store of an empty memory://, with a separate cache folder and folder for temporary files."""
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  (tmp_path / "temporary").mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
  return memory.store


def stored(bucket: dict) -> dict[str, bytes]:
  return {name.rpartition("/")[2]: file.getvalue() for name, file in bucket.items()}


def test_a_url_gets_the_same_files_as_a_folder(shards, tmp_path, bucket):
  summary = convert_lib._summary(convert(shards, "memory://bucket/out/", shards=4, workers=1), "memory://bucket/out")
  local = convert(shards, tmp_path / "out", shards=4, workers=1)
  assert stored(bucket) == contents(tmp_path / "out")
  assert list(sources.open_source("arrayrecord:memory://bucket/out/*.array_record")) == usable(
    sources.open_source(shards)
  )
  size = sum(len(file) for name, file in stored(bucket).items() if name.startswith("data-"))
  assert f"memory://bucket/out: 55 samples in 4 files, {size / 2**20:.1f} MiB" in summary
  assert list((tmp_path / "temporary").iterdir()) == []
  assert convert(shards, "memory://bucket/out", workers=1) == local
  del bucket["/bucket/out/data-00002-of-00004.array_record"]
  with pytest.raises(ValueError, match="was complete and now lacks 1 file, such as data-00002-of-00004"):
    convert(shards, "memory://bucket/out")
  with pytest.raises(ValueError, match="contains another conversion"):
    convert("scenes:test/10/16", "memory://bucket/out")
  bucket["/bucket/full/other.txt"] = bucket["/bucket/out/dataset.json"]
  with pytest.raises(ValueError, match="it contains other.txt"):
    convert("scenes:test/10/16", "memory://bucket/full")


def test_an_interrupted_conversion_to_a_url_continues(shards, tmp_path, bucket, monkeypatch):
  def put_file(self, local, name, **more):
    puts.append(name.rpartition("/")[2])
    if interrupted and "data-00002" <= puts[-1] < "data-00004":
      raise KeyboardInterrupt
    return put(self, local, name, **more)

  put, puts, interrupted = MemoryFileSystem.put_file, [], [True]
  monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
  with pytest.raises(KeyboardInterrupt):
    convert(shards, "memory://bucket/out", shards=4, workers=1)
  assert sorted(stored(bucket)) == [
    "classnames.txt", "data-00000-of-00004.array_record", "data-00001-of-00004.array_record", "dataset.json",
    "progress.jsonl",
  ]  # fmt: skip
  left = tmp_path / "temporary" / f".declip_jax-{indexes.digest('memory://bucket/out')}-data-00002.1.tmp"
  left.write_bytes(b"of a process that was killed")
  puts.clear()
  interrupted.clear()
  assert convert(shards, "memory://bucket/out", workers=1)["count"] == 55
  assert [name for name in puts if name.startswith("data-")] == [
    f"data-0000{number}-of-00004.array_record" for number in (2, 3)
  ]
  convert(shards, tmp_path / "out", shards=4, workers=1)
  assert stored(bucket) == contents(tmp_path / "out")
  assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.slow
def test_workers_write_to_a_url_and_never_expose_a_partial_file(shards, tmp_path, monkeypatch):
  (tmp_path / "temporary").mkdir()
  monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))  # of the workers
  convert(shards, f"local://{tmp_path}/deep/out", shards=4, workers=2)
  convert(shards, tmp_path / "out", shards=4, workers=1)
  assert contents(tmp_path / "deep" / "out") == contents(tmp_path / "out")
  assert list((tmp_path / "temporary").iterdir()) == []

  def put_file(self, local, name, **more):
    names.append(name)
    put(self, local, name, **more)
    raise OSError("the connection broke")

  put, names = LocalFileSystem.put_file, []
  monkeypatch.setattr(LocalFileSystem, "put_file", put_file)
  monkeypatch.setattr(files, "_PAUSES", (0.0,))
  (tmp_path / "a").write_bytes(b"contents")
  with pytest.raises(OSError, match="the connection broke"):
    files.upload(tmp_path / "a", f"local://{tmp_path}/broken/a")
  assert len(names) == 2
  assert f"{tmp_path}/broken/a" not in names
  assert list((tmp_path / "broken").iterdir()) == []


def test_finished_files_are_reported_to_a_url_at_once_and_then_every_few_seconds(bucket, monkeypatch):
  def num_reported() -> int:
    return stored(bucket)["progress.jsonl"].count(b"\n")

  now = 100.0
  monkeypatch.setattr(convert_lib.time, "monotonic", lambda: now)
  names = [str(number) for number in range(5)]
  fsspec.filesystem("memory").pipe({f"/bucket/out/{name}": b"" for name in names})
  journal = convert_lib._Journal("memory://bucket/out/progress.jsonl", {})
  report = {"count": 1, "skipped": {}, "named": {}}
  counts = []
  for number, now in enumerate([100.0, 101.0, 104.9, 105.1, 106.0]):  # noqa: B007
    journal.add(number, report)
    counts.append(num_reported())
  journal.close()
  assert [*counts, num_reported()] == [1, 1, 1, 4, 4, 5]
  assert convert_lib._finished("memory://bucket/out", names) == dict.fromkeys(range(5), report)

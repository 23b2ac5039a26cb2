"""metrics.jsonl survives crashes; the final table is aligned."""

import io
import json
import math
import os

import numpy as np
import pytest
from record_files import damages

from declip_jax.reporting.metrics import MetricWriter, read_metrics, summary_table


def write_rows(workdir, steps, resume_step=0, trackers=()):
  with MetricWriter(workdir, resume_step=resume_step, trackers=trackers) as writer:
    for step in steps:
      writer.write(step, {"loss": step / 10, "loss/clip": 1.0})


def steps_in(workdir):
  return [row["step"] for row in read_metrics(workdir)]


def test_round_trip_is_exact_and_strict_json(tmp_path):
  values = {"loss": np.float32(0.1), "a": np.array([3]), "nan": math.nan, "up": math.inf, "down": -math.inf}
  with MetricWriter(tmp_path / "new" / "run", resume_step=0) as writer:
    writer.write(np.int64(7), values)
  [line] = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()

  def refuse(word):
    raise AssertionError(f"{word} is not JSON")

  written = json.loads(line, parse_constant=refuse)
  assert (written["nan"], written["up"], written["down"]) == ("NaN", "Infinity", "-Infinity")
  [row] = read_metrics(tmp_path / "new" / "run")
  assert row["step"] == 7
  assert row["time"] > 1e9
  assert {name: row[name] for name in values if name != "nan"} == {
    "loss": float(np.float32(0.1)),
    "a": 3.0,
    "up": math.inf,
    "down": -math.inf,
  }
  assert math.isnan(row["nan"])


def test_a_line_is_on_disk_before_write_returns(tmp_path):
  with MetricWriter(tmp_path, resume_step=0) as writer:
    for step in (1, 2):
      writer.write(step, {"loss": 1.0})
      assert steps_in(tmp_path)[-1] == step


def test_resuming_drops_the_steps_that_did_not_happen(tmp_path):
  write_rows(tmp_path, [10, 20, 30, 40])
  before = (tmp_path / "metrics.jsonl").read_text().splitlines()[:2]
  write_rows(tmp_path, [30, 50], resume_step=20)
  assert steps_in(tmp_path) == [10, 20, 30, 50]
  assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:2] == before


def test_a_run_that_starts_anew_drops_all_lines_even_that_of_its_first_state(tmp_path):
  write_rows(tmp_path, [0, 10])
  write_rows(tmp_path, [0])
  assert steps_in(tmp_path) == [0]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_crash_while_resuming_leaves_the_old_file(tmp_path, monkeypatch):
  write_rows(tmp_path, [10, 20])

  def crash(*_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "replace", crash)
  with pytest.raises(OSError, match="disk full"):
    MetricWriter(tmp_path, resume_step=10)
  assert steps_in(tmp_path) == [10, 20]


def test_a_file_torn_anywhere_loses_its_last_line_only(tmp_path):
  write_rows(tmp_path, [10, 20])
  path = tmp_path / "metrics.jsonl"
  whole = path.read_bytes()
  first = whole.index(b"\n")
  for size in range(len(whole)):
    path.write_bytes(whole[:size])
    assert steps_in(tmp_path) == ([10] if size > first else []), size
  write_rows(tmp_path, [20], resume_step=10)
  assert steps_in(tmp_path) == [10, 20]


def test_a_last_line_garbled_anywhere_stops_no_run(tmp_path):
  write_rows(tmp_path, [10, 20])
  path = tmp_path / "metrics.jsonl"
  for damaged in damages(path.read_bytes()):
    path.write_bytes(damaged)
    assert steps_in(tmp_path)[:1] == [10]
    MetricWriter(tmp_path, resume_step=10).close()
    assert steps_in(tmp_path)[:1] == [10]


ODD_LINES = ('{"step": 1', "[1]", '{"step": "x"}', '{"step": 2, "loss": [1]}', '{"loss": 1}', '{"step": NaN}', "\0" * 9)
ODD_LINES += ("7", "null", '{"step": null}', '{"step": 2, "loss": "low"}', f'{{"step": {"9" * 400}}}', "[" * 9999)


@pytest.mark.parametrize("odd", ODD_LINES)
def test_an_odd_line_is_named_and_left_out(tmp_path, odd, caplog):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n' + odd + '\n{"step": 3}\n')
  assert steps_in(tmp_path) == [1, 3]
  assert f"{tmp_path / 'metrics.jsonl'}: line 2 cannot be used" in caplog.text
  write_rows(tmp_path, [4], resume_step=3)
  caplog.clear()
  assert steps_in(tmp_path) == [1, 3, 4]
  assert not caplog.text


def test_only_an_enabled_writer_touches_the_disk(tmp_path):
  with MetricWriter(tmp_path / "run", resume_step=0, enabled=False) as writer:
    writer.write(1, {"loss": 1.0})
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(FileNotFoundError):
    read_metrics(tmp_path / "run")


@pytest.mark.parametrize("values", [{"loss": np.ones(2)}, {"loss": []}, {"step": 1.0}, {"time": 1.0}])
def test_values_that_are_not_one_number_are_rejected_by_name(tmp_path, values):
  with MetricWriter(tmp_path, resume_step=0) as writer:
    with pytest.raises(ValueError, match=next(iter(values))):
      writer.write(1, values)
    writer.close()  # closing twice is fine
  assert read_metrics(tmp_path) == []


def test_a_bucket_is_rejected_and_no_directory_is_created():
  with pytest.raises(ValueError, match="gs://bucket/run"):
    MetricWriter("gs://bucket/run", resume_step=0)


class FullDisk(io.RawIOBase):
  """Takes a few bytes at a time, or none."""

  def __init__(self, path):
    self.path, self.full = path, False

  def write(self, data):
    if self.full:
      raise OSError(28, "No space left on device")
    with self.path.open("ab") as file:
      return file.write(bytes(data[:7]))


def test_on_a_full_disk_lines_wait_for_space(tmp_path, caplog):
  disk = FullDisk(tmp_path / "metrics.jsonl")
  with MetricWriter(tmp_path, resume_step=0) as writer:
    writer._lines._file = disk
    writer.write(1, {"loss": 1.0})
    disk.full = True
    for step in (2, 3):
      writer.write(step, {"loss": 1.0})
    assert steps_in(tmp_path) == [1]
    disk.full = False
    writer.write(4, {"loss": 1.0})
    assert steps_in(tmp_path) == [1, 2, 3, 4]
  assert caplog.text.count("metrics.jsonl cannot be written for now: [Errno 28] No space left on device") == 1


def test_rolling_back_drops_lines_as_resuming_does(tmp_path):
  with MetricWriter(tmp_path, resume_step=0) as writer:
    for step in (1, 2, 3):
      writer.write(step, {"loss": step})
    writer.roll_back(1)
    writer.write(2, {"loss": 20})
  assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1), (2, 20)]
  with MetricWriter(tmp_path / "other", resume_step=0, enabled=False) as writer:
    writer.roll_back(1)
  assert not (tmp_path / "other").exists()


def test_summary_table_is_aligned():
  rows = {"model": "ViT-B/32", "steps": 100_000, "images per second": np.float32(5231.3), "top1": 0.3281234, "ok": True}
  assert summary_table(rows).splitlines() == [
    "model              ViT-B/32",
    "steps              100,000",
    "images per second  5,231",
    "top1               0.3281",
    "ok                 True",
  ]
  scores = {"eval/a/top1": 0.3281, "eval/a/images": 2098, "eval/b/image_to_text_mean_rank": 12.34}
  assert [line.split()[1] for line in summary_table(scores).splitlines()] == ["32.8%", "2,098", "12.3"]
  assert summary_table({}) == ""

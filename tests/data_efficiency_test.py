"""benchmarks/data_efficiency.py: its lines of finished runs replace the working directories."""

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from declip_jax.evals import results

ROOT = Path(__file__).parents[1]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  return importlib.import_module("data_efficiency")


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
  """A finished run with a result, without its checkpoints."""
  folder = tmp_path / "run"
  folder.mkdir()
  (folder / "starts.jsonl").write_text('{"git": "a"}\n{"git": "b"}\n{"git": "b"}\n')
  lines = [
    {"step": 10, "loss": 4.0, "time/step": 0.5},
    {"step": 20, "loss": 3.0, "time/step": 0.25},
    {"step": 20, "eval/zero_shot/top1": 0.125},
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  result = results.Result("own/pets", "declip", "step 20", "zeroshot_classification", {"acc1": 0.5}, {"key": "k"})
  results.write(folder / "results", result, {})
  return folder


def test_a_run_is_collected_and_restored(study: ModuleType, workdir: Path, tmp_path: Path) -> None:
  line = study.collect(study.Cell("declip:plain", 12.5, 1), workdir, argparse.Namespace(steps=20))
  (found,) = line.pop("results")
  assert line == {
    "run": "declip_plain-12.5pct-1",
    "method": "declip:plain",
    "spec": "declip:plain",
    "share_percent": 12.5,
    "seed": 1,
    "steps": 20,
    "git": ["a", "b"],
    "end_of_training": {"loss": 3.0},
    "during_training": [{"step": 20, "eval/zero_shot/top1": 0.125}],
  }
  study.restore(json.loads(json.dumps({"results": [found]})), tmp_path / "again")
  (before,), (after,) = ([*(folder / "results").glob("*.json")] for folder in (workdir, tmp_path / "again"))
  assert (before.name, before.read_bytes()) == (after.name, after.read_bytes())


def test_a_method_may_have_other_views_and_other_fields(study: ModuleType) -> None:
  args = argparse.Namespace(dataset="fashion44k", data="d", steps=500)
  cell = study.Cell("filip:plain:model.heads.dense_dim=96;optimizer.ema=0.999", 10, 3)
  c = cell.config(args)
  assert (c.model.heads.dense_dim, c.optimizer.ema, c.data.jitter_probability, c.seed) == (96, 0.999, 0.0, 3)
  assert cell.name == "filip_plain_model.heads.dense_dim=96_optimizer.ema=0.999-10pct-3"
  assert study.Cell("filip", 10, 3).config(args).model.heads.dense_dim == 64
  cell = study.Cell("low@clip::stages.first.duration.share=0.8;stages.first.image_size=16", 100, 0)
  assert (cell.method, cell.name) == ("low", "low-100pct-0")
  assert (cell.config(args).stages.first.duration.share, cell.config(args).stages.first.image_size) == (0.8, 16)


def test_finished_runs_are_not_repeated(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  ran = []
  monkeypatch.setattr(study, "run", lambda cell, *_: ran.append(cell.name))

  def collect(cell: Any, *_: object) -> dict[str, object]:
    about = {"method": cell.method, "share_percent": cell.share, "seed": cell.seed}
    return {"run": cell.name, "steps": 5, "results": [], **about}

  monkeypatch.setattr(study, "collect", collect)
  monkeypatch.setattr(study, "table", lambda lines: "")
  command = ["x", "--data", "d", "--workdir", str(tmp_path / "runs"), "--results", str(tmp_path / "all.jsonl")]
  for shares, new in (("5",), ["clip-5pct-0"]), (("10", "5"), ["clip-10pct-0"]):
    monkeypatch.setattr(
      "sys.argv", [*command, "--methods", "clip", "--seeds", "1", "--steps", "5", "--shares", *shares]
    )
    ran.clear()
    study.main()
    assert ran == new
  names = [json.loads(line)["run"] for line in (tmp_path / "all.jsonl").read_text().splitlines()]
  assert names == ["clip-5pct-0", "clip-10pct-0"]
  monkeypatch.setattr("sys.argv", [*command, "--steps", "6"])
  with pytest.raises(SystemExit):
    study.main()


def test_the_table_has_means_and_deviations_over_seeds(study: ModuleType) -> None:
  def line(seed: int, top1: float, **more: float) -> dict[str, object]:
    facts = {"metrics": {"top1": top1, **more}, "training": {"unique_pairs": 3970, "epochs": 32.2, "flops": 1.234e12}}
    result = {"task": "zeroshot_classification", "declip_jax": facts}
    return {"method": "clip", "share_percent": 10.0, "seed": seed, "results": [result]}

  text = study.table([line(1, 0.5), line(0, 0.25, mean_per_class=0.125), {**line(0, 0.0), "share_percent": 5.0}])
  head, _, *rows = [row.strip("| ").split(" | ") for row in text.splitlines()]
  assert head == ["method", "share", "pairs", "epochs", "TFLOPs", "seeds", "zero-shot top-1", "mean per class"]
  assert rows[0] == ["clip", "5 %", "3,970", "32", "1.2", "1", "0.0"]
  assert rows[1] == ["clip", "10 %", "3,970", "32", "1.2", "2", "37.5 ± 17.7", "12.5"]


def test_differences_are_paired_by_seed_and_the_mean_has_four_parts(study: ModuleType) -> None:
  def line(method: str, seed: int, score: float) -> dict[str, object]:
    metrics = {metric: score for _, metric in study.COLUMNS.values()} | {"image_to_text_r10": score + 0.4}
    results = [{"task": task, "declip_jax": {"metrics": metrics}} for task, _ in study.COLUMNS.values()]
    return {"method": method, "share_percent": 10.0, "seed": seed, "results": results}

  assert study.scores(line("clip", 0, 0.2))[study.MEAN] == pytest.approx(25.0)  # of 20, (60 + 20) / 2, 20 and 20
  clip = [line("clip", seed, 0.1 * seed) for seed in range(3)]
  other = [line("declip", seed, 0.1 * seed + gain) for seed, gain in ((0, 0.01), (1, 0.02), (5, 0.9))]
  text = study.differences([*clip, *other, line("slip", 0, 0.5)], "clip")
  head, _, row = [row.strip("| ").split(" | ") for row in text.splitlines()]
  assert head[:3] == ["minus clip", "share", "seeds"]
  # scipy.stats.ttest_1samp([1, 2], 0).confidence_interval() is (-4.85, 7.85)
  assert row == ["declip", "10 %", "2", *["+1.5 ± 6.4"] * len(head[3:])]
  same = [line("declip", seed, 0.1 * seed + 0.01) for seed in range(2)]
  assert "**+1.0 ± 0.0**" in study.differences([*clip, *same], "clip")
  assert not study.differences(clip, "clip")


@pytest.mark.parametrize(
  "path", sorted((ROOT / "docs" / "data_efficiency").glob("*.jsonl")), ids=lambda path: path.stem
)
def test_the_tables_in_the_docs_are_those_of_the_finished_runs(study: ModuleType, path: Path) -> None:
  lines, text = [*map(json.loads, path.read_text().splitlines())], (ROOT / "docs" / "results.md").read_text()
  assert study.table(lines) in text
  assert study.differences(lines, "clip") in text

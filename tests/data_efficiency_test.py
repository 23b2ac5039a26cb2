"""benchmarks/data_efficiency.py: its lines of finished runs replace the working directories."""

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType

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
    "share_percent": 12.5,
    "seed": 1,
    "steps": 20,
    "git": ["a", "b"],
    "train_seconds": 7.5,
    "end_of_training": {"loss": 3.0},
    "during_training": [{"step": 20, "eval/zero_shot/top1": 0.125}],
  }
  study.restore(json.loads(json.dumps({"results": [found]})), tmp_path / "again")
  (before,), (after,) = ([*(folder / "results").glob("*.json")] for folder in (workdir, tmp_path / "again"))
  assert (before.name, before.read_bytes()) == (after.name, after.read_bytes())


def test_a_method_may_have_other_views_and_other_fields(study: ModuleType) -> None:
  args = argparse.Namespace(dataset="fashion44k", data="d", steps=931)
  cell = study.Cell("filip:plain:model.heads.dense_dim=96;optimizer.ema=0.999", 10, 3)
  c = cell.config(args)
  assert (c.model.heads.dense_dim, c.optimizer.ema, c.data.jitter_probability, c.seed) == (96, 0.999, 0.0, 3)
  assert cell.name == "filip_plain_model.heads.dense_dim=96_optimizer.ema=0.999-10pct-3"
  assert study.Cell("filip", 10, 3).config(args).model.heads.dense_dim == 64


def test_finished_runs_are_not_repeated(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  ran = []
  monkeypatch.setattr(study, "run", lambda cell, *_: ran.append(cell.name))
  monkeypatch.setattr(study, "collect", lambda cell, *_: {"run": cell.name, "steps": 5, "results": []})
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


def test_the_table_in_the_docs_is_that_of_the_finished_runs() -> None:
  table = (ROOT / "docs" / "results.md").read_text().split("### With few pairs")[1].split("\n## ")[0]
  rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
  lines = (ROOT / "docs" / "data_efficiency" / "fashion44k.jsonl").read_text().splitlines()
  expected = []
  for line in sorted(map(json.loads, lines), key=lambda line: (line["method"], line["share_percent"])):
    (probe,) = (result["declip_jax"] for result in line["results"] if result["task"] == "linear_probe")
    last, training = line["during_training"][-1], probe["training"]
    scores = (
      "zero_shot/top1",
      "zero_shot/mean_per_class",
      "retrieval/image_to_text_r10",
      "retrieval/text_to_image_r10",
    )
    values = [*(last[f"eval/{name}"] for name in scores), probe["metrics"]["top1"]]
    about = [f"{line['method']}, {line['share_percent']:g} %", f"{training['unique_pairs']:,}"]
    expected.append([*about, f"{training['epochs']:.0f}", *(f"{100 * value:.1f}" for value in values)])
  assert rows == expected

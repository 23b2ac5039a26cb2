"""benchmarks/results.py: the figures that it collects from a run, and the table in docs/results.md."""

import json
from pathlib import Path
import subprocess
import sys

from declip_jax import config

ROOT = Path(__file__).parents[1]


def results(*arguments: str | Path) -> str:
  command = [sys.executable, str(ROOT / "benchmarks" / "results.py"), *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_table_in_the_docs_is_the_one_printed_for_the_runs() -> None:
  printed = [line for line in results(ROOT / "docs" / "fashion44k.jsonl").splitlines() if line.startswith("| ")]
  documented = (ROOT / "docs" / "results.md").read_text().splitlines()
  assert len(printed) == 12
  start = documented.index(printed[0])
  assert documented[start : start + 13] == [printed[0], documented[start + 1], *printed[1:]]


def test_a_run_is_collected_with_its_revisions_and_the_means_since_the_previous_evaluation(tmp_path: Path) -> None:
  for seed, top1 in (("0", 0.25), ("1", 0.5)):
    workdir = tmp_path / f"clip-{seed}"
    workdir.mkdir()
    c = config.default()
    c.batch_size = 10
    (workdir / "config.json").write_text(c.to_json_best_effort())
    (workdir / "starts.jsonl").write_text('{"git": "a"}\n{"git": "b"}\n{"git": "b"}\n')
    lines = [
      {"step": 1, "loss": 4.0, "image_to_text_accuracy": 0.1},
      {"step": 2, "loss": 2.0, "image_to_text_accuracy": 0.3},
      {"step": 2, "eval/zero_shot/top1": 0.125},
      {"step": 3, "loss": 1.0},
      {"step": 3, "eval/zero_shot/top1": top1},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  collected = tmp_path / "all.jsonl"
  printed = results(tmp_path / "clip-0", tmp_path / "clip-1", "--collect", collected)
  assert printed.splitlines()[2] == "| clip | 2 | 30 | 37.5 ± 12.5 |"
  assert results(collected) == printed
  first, last, *_ = map(json.loads, collected.read_text().splitlines())
  about = {"run": "clip-0", "git": ["a", "b"]}
  assert first == about | {
    "examples": 20,
    "eval/zero_shot/top1": 0.125,
    "loss": 3.0,
    "image_to_text_accuracy": 0.2,
  }
  assert last == about | {"examples": 30, "eval/zero_shot/top1": 0.25, "loss": 1.0}

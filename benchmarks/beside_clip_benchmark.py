"""Compares evaluation with CLIP_benchmark 1.6.2: the same exported model, images and tasks on this machine's CPU.

The model is exported in open_clip's format. The data sets of a data file (those of `evaluate --data`) are written to
folders in CLIP_benchmark's layout, from which both read. Both then do zero-shot classification, retrieval, and a linear
probe whose strength is chosen on a validation split, twice: first nothing is there, then the features of the first time
and, for us, compiled programs. CLIP_benchmark keeps features for its probe only. Its probe trains with AdamW, 20 times;
ours is L-BFGS to the optimum, 16 times. It runs through benchmarks/clip_benchmark_cpu.py, in float32, with the number
of processes that is faster on a CPU: one per core for zero-shot classification and retrieval, none for the probe.

Seconds of a process begin at its start. CPU seconds are those of all its threads and children, and depend less on what
else the machine does. Then CLIP_benchmark's functions evaluate our features: accuracies and recalls must agree within
1e-6, but for ties.

  make bench-clip-benchmark ARGS="--weights runs/clip --data sets.txt"    installs all of it in its own environment
  ... --test 500 --train 1000                                             fewer images

A line of the data file is NAME = TEST | TRAIN, without classes for retrieval; see `declip_jax.evals.data_files`.
"""

import argparse
from collections.abc import Sequence
import json
import os
from pathlib import Path
import resource
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import clip_benchmark_agreement
from clip_benchmark_folders import Folder, write_folder
from command import parser

from declip_jax.evals import results
from declip_jax.evals.data_files import read_data

HERE = Path(__file__).parent
TASKS = ("zeroshot_classification", "zeroshot_retrieval", "linear_probe")
PASSES = ("cold", "warm")


class Run(NamedTuple):
  """What one program took for all data sets.

  Attributes:
    seconds: in all.
    cpu: seconds of all cores.
    parts: seconds by data set and task.
  """

  seconds: float
  cpu: float
  parts: dict[tuple[str, str], float]


def main() -> None:
  """Prints the tables."""
  arguments = parser(__doc__)
  arguments.add_argument("--weights", type=Path, required=True, help="run or checkpoint that can be exported")
  arguments.add_argument("--data", type=Path, required=True, help="data file")
  arguments.add_argument("--test", type=int, default=2000, help="most images of a test split (default: 2000)")
  arguments.add_argument("--train", type=int, default=5000, help="most images of a training split (default: 5000)")
  args = arguments.parse_args()
  if clip_benchmark_agreement.torch is None:
    arguments.error("CLIP_benchmark is not installed; make bench-clip-benchmark installs it")
  with tempfile.TemporaryDirectory() as folder:
    compare(args, Path(folder))


def compare(args: argparse.Namespace, place: Path) -> None:
  """Writes the folders, runs both programs twice, and prints what they took and found."""
  sets = [
    write_folder(key.removeprefix("own/"), splits, place / key.removeprefix("own/"), args.test, args.train)
    for key, splits in read_data(args.data).items()
  ]
  (place / "sets.txt").write_text("".join(f"{one.line()}\n" for one in sets))
  export = [
    sys.executable,
    "-m",
    "declip_jax.export",
    "--workdir",
    str(args.weights.absolute()),
    "--format",
    "open_clip",
  ]
  took([*export, "--output", str(place / "export")], place)
  runs: dict[tuple[str, str], Run] = {}
  for name in PASSES:
    print(f"{name}, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    runs["ours", name] = ours(place, name)
    runs["CLIP_benchmark", name] = theirs(place, name, sets)
  print_times(sets, runs)
  clip_benchmark_agreement.print_agreement(place, sets)


def took(command: Sequence[str], place: Path) -> tuple[float, float]:
  """Runs a command, whose messages go to a file; returns its seconds, and those of its threads and children."""
  # PyTorch's threads that wait for each other give up their core: where other programs run, they would wait far longer.
  environment = os.environ | {"XDG_CACHE_HOME": str(place / "cache"), "OMP_WAIT_POLICY": "PASSIVE"}
  start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
  with (place / "messages.txt").open("a+") as messages:
    if subprocess.run(command, cwd=place, env=environment, stdout=messages, stderr=messages, check=False).returncode:
      messages.seek(0)
      sys.exit(f"{' '.join(command)} failed:\n{messages.read()[-3000:]}")
  seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
  return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(place: Path, name: str) -> Run:
  """All tasks by one command of ours."""
  output = place / f"ours-{name}"
  command = [sys.executable, "-m", "declip_jax.evaluate", "--weights", str(place / "export")]
  command += ["--data", str(place / "sets.txt"), "--tasks", "zero_shot,retrieval,linear_probe", "--output", str(output)]
  seconds, cpu = took(command, place)
  parts = {}
  for line in map(json.loads, (output / results.LOG).read_text().splitlines()):
    found = results.read(output / line["file"])
    parts[found.ours["about"]["key"].removeprefix("own/"), found.task] = line["seconds"]
  return Run(seconds, cpu, parts)


def theirs(place: Path, name: str, sets: Sequence[Folder]) -> Run:
  """All tasks by CLIP_benchmark, with one command per task, since a command has one task and number of processes."""
  log, total, cpu = place / f"theirs-{name}.jsonl", 0.0, 0.0
  for task in TASKS:
    names = [f"wds/{one.name}" for one in sets if task in one.tasks]
    if not names:
      continue
    command = [sys.executable, "-O", str(HERE / "clip_benchmark_cpu.py"), str(log), "eval", "--dataset", *names]
    command += ["--dataset_root", f"{place}/{{dataset}}", "--task", task, "--model", f"local-dir:{place / 'export'}"]
    command += ["--pretrained", "", "--no_amp", "--recall_k", "1", "5", "10", "--val_split", "val", "--quiet"]
    command += ["--num_workers", "0" if task == "linear_probe" else str(min(os.cpu_count() or 1, 2))]
    command += ["--feature_root", str(place / "features"), "--output", f"{place}/theirs-{{dataset}}-{{task}}.json"]
    seconds, own_cpu = took(command, place)
    total, cpu = total + seconds, cpu + own_cpu
  lines = map(json.loads, log.read_text().splitlines())
  parts = {(line["dataset"].removeprefix("wds/"), line["task"]): line["seconds"] for line in lines}
  return Run(total, cpu, parts)


def print_times(sets: Sequence[Folder], runs: dict[tuple[str, str], Run]) -> None:
  """Prints seconds by data set and task, and the ratios of their sums."""
  columns = [(side, name) for name in PASSES for side in ("CLIP_benchmark", "ours")]
  print(f"| data set | images | task | {' | '.join(f'{side}, {name}' for side, name in columns)} |")
  print("|---" * (3 + len(columns)) + "|")
  for one in sets:
    counts = " + ".join(f"{count:,} {split}" for split, count in one.splits.items())
    for task in one.tasks:
      values = " | ".join(f"{runs[column].parts[one.name, task]:.1f} s" for column in columns)
      print(f"| {one.name} | {counts} | {task} | {values} |")
  rest = " | ".join(f"{runs[column].seconds - sum(runs[column].parts.values()):.1f} s" for column in columns)
  print(f"| start and end of processes | | | {rest} |")
  print(f"| **all** | | | {' | '.join(f'{runs[column].seconds:.1f} s' for column in columns)} |")
  print(f"| CPU seconds | | | {' | '.join(f'{runs[column].cpu:.1f} s' for column in columns)} |")
  for field in ("seconds", "cpu"):
    totals = {column: getattr(runs[column], field) for column in columns}
    ratios = [f"{name} {totals['ours', name] / totals['CLIP_benchmark', name]:.2f}" for name in PASSES]
    both = [sum(totals[side, name] for name in PASSES) for side in ("ours", "CLIP_benchmark")]
    print(f"{field}, ours / CLIP_benchmark's: {', '.join(ratios)}, both {both[0] / both[1]:.2f}")


if __name__ == "__main__":
  main()

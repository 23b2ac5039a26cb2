"""Times the train step of two source trees in alternation, each in a process of its own."""

from collections.abc import Sequence
import contextlib
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile

from rounds import median_ratio

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path("benchmarks", "step_worker.py")


class Worker(contextlib.AbstractContextManager):
  """A process that compiles the step of one tree and takes steps on request; see `step_worker.py`.

  Attributes:
    compile_seconds: time to trace and compile the step.
    batch_size: pairs per step.

  Raises:
    ChildProcessError: the process failed; the message is the last line that it printed.
  """

  def __init__(self, tree: Path, script: Path, arguments: Sequence[str]):
    self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
    self._process = subprocess.Popen(
      [sys.executable, str(script), *arguments],
      cwd=tree,
      env=os.environ | {"PYTHONPATH": str(tree), "JAX_ENABLE_COMPILATION_CACHE": "false"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
    )
    found = self._read()
    self.compile_seconds, self.batch_size = found["compile_seconds"], found["batch_size"]

  def step(self) -> tuple[float, float]:
    """Takes one step; returns its seconds and its CPU seconds."""
    self._process.stdin.write("step\n")
    self._process.stdin.flush()
    found = self._read()
    return found["seconds"], found["cpu_seconds"]

  def __exit__(self, *_: object) -> None:
    self._process.communicate()  # closes stdin, which ends the process
    self._errors.close()

  def _read(self) -> dict[str, float]:
    line = self._process.stdout.readline()
    if not line:
      self._process.communicate()
      self._errors.seek(0)
      raise ChildProcessError(self._errors.read().strip().rpartition("\n")[2] or f"exit {self._process.returncode}")
    return json.loads(line)


def compare(
  tree: Path, script: Path | None, config: str, methods: list[str], batch_size: int | None, rounds: int
) -> None:
  """Prints a row for each method: compile and step times of this tree and of the other one, and their ratios.

  The trees take turns, in an order that alternates from round to round; the first round warms up and does not count.
  Ratios are medians over the rounds, of wall time (with quartiles) and of CPU time. Other load on the machine affects
  CPU time less, and the ratio of the fastest steps least.

  Args:
    tree: root of the other source tree.
    script: worker for the other tree; by default its own `benchmarks/step_worker.py`.
    config: name of a config with an argument `method`.
    methods: methods to time.
    batch_size: pairs per step; None is that of the config.
    rounds: timed steps of each tree.
  """
  print(f"this tree: {ROOT}; other tree: {tree}; {rounds} rounds")
  print(f"{'':13}{'compile s':>18}{'step ms':>20}{'this / other':>42}")
  heads = (
    f"{'this':>9}{'other':>9}{'this':>10}{'other':>10}{'step':>10}{'quartiles':>12}{'fastest':>10}{'CPU time':>10}"
  )
  print(f"{'method':13}{heads}", flush=True)
  for method in methods:
    arguments = ["--config", config, "--method", method]
    arguments += ["--batch-size", str(batch_size)] if batch_size else []
    try:
      print(row(method, tree, script, arguments, rounds), flush=True)
    except ChildProcessError as error:
      print(f"{method:13} not timed: {error}", flush=True)


def row(method: str, tree: Path, script: Path | None, arguments: Sequence[str], rounds: int) -> str:
  """Times one method; returns its row of the table."""
  with Worker(ROOT, ROOT / WORKER, arguments) as this, Worker(tree, script or tree / WORKER, arguments) as other:
    times: dict[Worker, list[tuple[float, float]]] = {this: [], other: []}
    for index in range(rounds + 1):
      for worker in (this, other) if index % 2 else (other, this):
        times[worker].append(worker.step())
  (wall, cpu), (other_wall, other_cpu) = (zip(*times[worker][1:], strict=True) for worker in (this, other))
  ratios = [a / b for a, b in zip(wall, other_wall, strict=True)]
  low, _, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
  return (
    f"{method:13}{this.compile_seconds:9.1f}{other.compile_seconds:9.1f}"
    f"{1e3 * statistics.median(wall):10.1f}{1e3 * statistics.median(other_wall):10.1f}"
    f"{statistics.median(ratios):10.3f}{f'{low:.2f}-{high:.2f}':>12}{min(wall) / min(other_wall):10.3f}"
    f"{median_ratio(cpu, other_cpu):10.3f}"
  )

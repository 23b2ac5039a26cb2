"""Short runs that are broken on purpose, and the warnings that they print: python benchmarks/symptoms.py

  python benchmarks/symptoms.py --runs collapsed waiting

Each run trains the config demo for 100 steps, or for 20 if it reads slowly, without evaluations, and is broken by
fields of the config alone; the first one, healthy, is not broken. It prints a row for each, with the names of its
warnings and the steps at which they came, and then the line of the warning that the run is named after. The exit status
is 1 if a run does not have this warning, or if the healthy one has any. docs/when_it_does_not_learn.md has the output.
"""

from collections.abc import Sequence
import math
import re
import shlex
import subprocess
import sys
import tempfile
from typing import NamedTuple

from command import parser

from declip_jax.reporting.symptoms import NAMES, link

# A scanned ViT and one length of texts, which compile fast.
COMMAND = (
  "python -m declip_jax.train --config=demo:method=slip_mim --steps=100 --config.evals={} "
  "--config.checkpoint.best_metric= --config.model.text.buckets='()' --workdir=FOLDER"
)
HEALTHY = "healthy"
# What breaks a run, by the warning that it shows.
RUNS: dict[str, tuple[str, ...]] = {
  HEALTHY: (),
  "collapsed": ("--config.optimizer.learning_rate=0.1",),
  "at_chance": ("--config.optimizer.learning_rate=0.1",),
  "temperature_at_bound": (
    f"--config.model.heads.logit_scale_init={math.log(100):.4f}",
    '--config.optimizer.frozen=("heads/logit_scale",)',
  ),
  "one_term": ("--config.objective.clip.weight=1000.0",),
  "skipped": ("--config.optimizer.learning_rate=1e30",),
  "waiting": ('--config.data.train=("scenes:train/100000/400",)', "--config.data.threads=1", "--steps=20"),
  "accuracy_falls": (
    "--config.optimizer.schedule=step",
    "--config.optimizer.milestones=((700, 1000.0),)",
  ),
}


class Warned(NamedTuple):
  """A warning of a run.

  Attributes:
    name: its symptom.
    step: the step at which it came.
    line: what the run printed.
  """

  name: str
  step: int
  line: str


def main() -> None:
  """Trains the runs and prints what they warn of."""
  arguments = parser(__doc__)
  arguments.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS], help="runs, by name (default: all)")
  names = arguments.parse_args().runs
  found = {}
  print(f"{COMMAND}\n\n| run | what breaks it | warning | step |\n|---|---|---|--:|", flush=True)
  for name in names:
    found[name] = train(RUNS[name])
    print(row(name, found[name]), flush=True)
  print("\n" + "\n".join(one.line for name, warned in found.items() for one in warned if one.name == name))
  sys.exit(not all(map(is_as_meant, found, found.values())))


def train(flags: Sequence[str]) -> list[Warned]:
  """Trains a run until it ends or, if it is broken, fails; returns its warnings."""
  program, *others = shlex.split(COMMAND)
  del program
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, *others, *flags, f"--workdir={folder}/run"]  # the last one counts
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  if done.returncode and not flags:
    sys.exit(done.stderr)
  return warnings(done.stderr)


def warnings(text: str) -> list[Warned]:
  """The warnings in what a run has printed."""
  names = {link(name): name for name in NAMES}
  lines = (re.fullmatch(r"warning: step (\d+): .*; see (\S+)", line) for line in text.splitlines())
  return [Warned(names[line[2]], int(line[1]), line[0]) for line in lines if line]


def row(name: str, warned: Sequence[Warned]) -> str:
  """A row of the table."""
  flags = f"`{shlex.join(RUNS[name])}`" if RUNS[name] else ""
  warning, step = (
    ", ".join(cells) for cells in ([f"`{one.name}`" for one in warned], [str(one.step) for one in warned])
  )
  return f"| {name} | {flags} | {warning or 'none'} | {step} |"


def is_as_meant(name: str, warned: Sequence[Warned]) -> bool:
  """Whether a run has its warning, and a healthy one none."""
  return not warned if name == HEALTHY else name in {one.name for one in warned}


if __name__ == "__main__":
  main()

"""Published results that can be trained on public data, and what they cost: the tables of docs/reproduce.md.

  python benchmarks/reproduce.py
  python benchmarks/reproduce.py --plan slip/slip_base_25ep=plan.json   # `python -m declip_jax.plan --json plan.json`

The first table has every such config. Batch size, steps and accuracy are those of the config; steps follow from the
number of pairs still available. FLOPs of a step are counted by tracing, without compiling, in a few seconds per config.
Hours assume that share of the peak rate of declip_jax/planning/devices.py which --utilisation gives. The second table
has the configs of --plan, with the time below which no step can take.
"""

import argparse
from collections.abc import Iterator, Mapping
import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

from command import parser

from declip_jax import build, config_files
from declip_jax.planning import devices, flops
from declip_jax.planning.run_cost import hours_at

UTILISATION = 0.4
# Pairs by the default of the argument `data`: docs/reproduce.md has the sources.
PAIRS = {
  "data/cc3m": 2_905_954,
  "data/cc12m": 10_968_539,
  "data/yfcc15m": 14_689_580,
  "data/yfcc15m_v2": 15_061_747,
}
CONFIGS = (
  "declip_paper/cc3m_clip",
  "declip_paper/cc3m_declip",
  "slip/clip_base_cc3m_40ep",
  "slip/slip_base_cc3m_40ep",
  "slip/clip_base_cc12m_35ep",
  "slip/slip_base_cc12m_35ep",
  "slip/clip_rn50_25ep",
  "slip/clip_base_25ep",
  "slip/slip_base_25ep",
  "declip_paper/yfcc15m_declip",
  "declip_yfcc15m/r50_clip",
  "declip_yfcc15m/r50_declip",
  "declip_yfcc15m/vit_clip",
  "declip_yfcc15m/vit_slip",
  "declip_yfcc15m/vit_declip",
  "declip_yfcc15m/vit_defilip",
)
MACHINES = {"16 v5e": ("TPU v5e", 16), "8 H200": ("NVIDIA H200", 8)}
COLUMNS = ("config", "tower", "data", "batch", "steps", "zero-shot", "linear probe", "PFLOPs of a step")
PLAN = ("config", "memory of a chip", "PFLOPs of a step", "least time of a step", "least hours", "hours", "steps/s")


class Row(NamedTuple):
  """What a config says about its result.

  Attributes:
    config: its name.
    tower: its image tower, without what is special to one paper.
    data: the last part of its default for `data`.
    batch: pairs in a batch.
    steps: steps of the whole schedule, with `PAIRS`.
    accuracy: published top-1 accuracies on ImageNet, zero-shot and of a linear probe, as texts; a star marks one that
      its config has second-hand.
  """

  config: str
  tower: str
  data: str
  batch: int
  steps: int
  accuracy: tuple[str, str]

  @property
  def cells(self) -> tuple[str, ...]:
    return (f"`{self.config}`", self.tower, self.data, f"{self.batch:,}", f"{self.steps:,}", *self.accuracy)


def row(name: str) -> Row:
  """Returns the row of a config, without its FLOPs."""
  module, c = config_files.load_module(name), config_files.load(name)
  data = inspect.signature(module.get_config).parameters["data"].default
  image, published = c.model.image, module.PUBLISHED
  star = "\\*" * ("imagenet_top1_percent" in published.get("second_hand", ()))
  top1 = published["imagenet_top1_percent"]
  return Row(
    config=name,
    tower="RN50" if image.kind == "resnet" else f"ViT-B/{image.patch}",
    data=data.removeprefix("data/"),
    batch=c.batch_size,
    steps=build.to_steps(c, PAIRS[data]).total,
    accuracy=tuple(f"{top1[way]}{star}" if way in top1 else "" for way in ("zero_shot", "linear_probe")),
  )


def step_flops(name: str) -> float:
  """FLOPs of the model in a step of a config."""
  c = config_files.load(name)
  return flops.step_flops(build.build(c), c.batch_size)


def hours(steps: int, step: float, kind: str, number: int, utilisation: float = UTILISATION) -> float:
  """Hours of `steps` steps of `step` FLOPs on a number of devices of a kind."""
  peak = devices.find(kind)
  assert peak is not None
  return hours_at(utilisation, steps * step, peak, number)


def plan_cells(one: Row, report: Mapping[str, Any], utilisation: float) -> tuple[str, ...]:
  """The cells of a config in the table of plans.

  Args:
    one: its row.
    report: what `declip_jax.plan --json` wrote.
    utilisation: share of the peak rate.
  """
  least = max(filter(None, report["seconds"].values()))
  expected = hours(one.steps, report["model_flops"], report["device"], report["devices"], utilisation)
  return (
    f"`{one.config}`",
    f"{report['needed'] / 2**30:.1f} of {report['available'] / 2**30:.2f} GiB",
    petaflops(report["model_flops"]),
    f"{1000 * least:.0f} ms",
    f"{one.steps * least / 3600:.1f}",
    f"{expected:.1f}",
    f"{one.steps / expected / 3600:.2f}",
  )


def petaflops(step: float) -> str:
  return f"{step / 1e15:.3f}"


def tables(args: argparse.Namespace) -> Iterator[str]:
  """Yields the lines of both tables."""
  rows = {name: row(name) for name in CONFIGS}
  yield from header((*COLUMNS, *(f"hours, {machine}" for machine in MACHINES)))
  for name, one in rows.items():
    step = step_flops(name)
    times = (f"{hours(one.steps, step, *machine, args.utilisation):.1f}" for machine in MACHINES.values())
    yield line((*one.cells, petaflops(step), *times))
  if args.plan:
    yield ""
    yield from header(PLAN)
  for name, _, file in (plan.partition("=") for plan in args.plan):
    yield line(plan_cells(row(name), json.loads(Path(file).read_text()), args.utilisation))


def header(columns: tuple[str, ...]) -> tuple[str, str]:
  return line(columns), "|" + "---|" * len(columns)


def line(cells: tuple[str, ...]) -> str:
  return f"| {' | '.join(cells)} |"


def main() -> None:
  """Prints the tables."""
  arguments = parser(__doc__)
  arguments.add_argument(
    "--plan", action="append", default=[], metavar="CONFIG=FILE", help="a report of declip_jax.plan"
  )
  arguments.add_argument(
    "--utilisation", type=float, default=UTILISATION, help=f"model FLOPs utilisation (default: {UTILISATION})"
  )
  for text in tables(arguments.parse_args()):
    print(text, flush=True)


if __name__ == "__main__":
  main()

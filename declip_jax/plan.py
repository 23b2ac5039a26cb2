"""Reports what a training run would cost, without its hardware: memory, minimum time and largest batch.

  python -m declip_jax.plan --config=clip_wit/vit_b_32 --topology=v5e:16x16

Compiles the real train step for a TPU topology, on any machine with libtpu (the extra tpu), or without --topology for
the devices of this machine. For each device it prints memory, FLOPs and traffic of a step, the minimum time that it
takes, the input rate required of the hosts, and the largest batch that fits; then the hours of the whole run, at that
time and at the model FLOPs utilisation that --utilisation assumes, and what they cost at --price. --fastest searches
for the mesh, recomputation and micro-batches of the fastest step. Training trims each batch to its longest
text (config.model.text.buckets); costs are those of the whole context length, which a batch may have at any time, or of
the length that --text_length names.

Memory grows almost linearly with the batch, so the search extrapolates from two compiled steps and compiles the
largest batch as well. Times are computed from the peak figures in declip_jax/planning/devices.py; compute, memory and
links work at the same time, so the slowest of them bounds the step. What a config leaves open, such as the batch size
of `pretrain`, is chosen for the number of samples of its data, if they are on this machine, as in
--config=pretrain:data=pairs.csv, and else as for a large data set; no sample is read. Compiling takes minutes. For a
config with stages there is a report on the step of each, and the FLOPs of the run. Exit codes: 0; 1 if a step does not
fit; 2 for an error that you can correct.
"""

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
import sys
from typing import Any

from absl import flags
import jax
from ml_collections import ConfigDict

from declip_jax.command_line import define_config, run
from declip_jax.data.guess import guess
from declip_jax.data.sources import open_source
from declip_jax.planning import devices as device_table
from declip_jax.planning.choose import choose, describe, open_fields
from declip_jax.planning.compile import with_trimmed_texts
from declip_jax.planning.fastest import Tried, fastest_lines, search_fastest
from declip_jax.planning.report import Report, RunFlops, available_memory, make_report, run_flops
from declip_jax.planning.run_cost import Assumptions, RunCost, comparison, cost_lines, run_cost
from declip_jax.planning.table import run_table, table
from declip_jax.planning.topology import EXAMPLES, topology_devices
from declip_jax.reporting.progress import message
from declip_jax.spelling import counted
from declip_jax.stages import LAST, lengths_of_stages, naming, stage_configs


@dataclasses.dataclass(frozen=True)
class _Plan:
  """A run on given devices.

  Attributes:
    topology: name of the topology; "" for the devices of this machine.
    config: its config, with everything chosen.
    reports: the report on a step of each stage, by its name.
    cost: the cost of the run; None if its length is unknown.
    why: why its data cannot be counted; "" if they were, or need not be.
    tried: with --fastest, what was compiled.
  """

  topology: str
  config: ConfigDict
  reports: dict[str, Report]
  cost: RunCost | None
  why: str
  tried: list[Tried]

  @property
  def lines(self) -> list[str]:
    """The plan as lines of text."""
    if self.config.stages:
      lines = run_table(self.reports, self._run_flops)
    else:
      lines = table(self.reports[LAST])
    fastest = ["", *fastest_lines(self.tried)] if self.tried else []
    return [*lines, *fastest, "", *cost_lines(self.cost, self.why)]

  @property
  def content(self) -> dict[str, Any]:
    """The plan as JSON."""
    cost = self.cost and dataclasses.asdict(self.cost)
    if not self.config.stages:
      tried = [{"flags": one.choice.flags, "report": dataclasses.asdict(one.report)} for one in self.tried]
      return {**dataclasses.asdict(self.reports[LAST]), "cost": cost, **({"fastest": tried} if tried else {})}
    of_stages = {name: dataclasses.asdict(report) for name, report in self.reports.items()}
    of_run = self._run_flops
    return {"stages": of_stages, "run": of_run and dataclasses.asdict(of_run), "cost": cost}

  @property
  def _run_flops(self) -> RunFlops | None:
    return run_flops(self.config, {name: report.model_flops for name, report in self.reports.items()})


def _command(_: list[str]) -> int:
  """Prints and writes the report; returns the exit code."""
  values = flags.FLAGS
  if values.json and not Path(values.json).absolute().parent.is_dir():
    raise ValueError(f"--json={values.json}: the folder does not exist")  # before minutes of compiling
  if values.slices > 1 and not values.topology:
    raise ValueError(f"--slices={values.slices} needs --topology")
  if values.fastest and values.config.stages:
    raise ValueError("--fastest: a config with config.stages has several steps; plan each stage as a config of its own")
  names = values.topology.split(",") if values.topology else [""]
  if len(set(names)) < len(names) or (len(names) > 1 and "" in names):
    raise ValueError(f"--topology={values.topology}: expected different names, separated by commas")
  known = {name: topology_devices(name, values.slices) if name else None for name in names}
  plans = [_plan(name, devices) for name, devices in known.items()]
  lines = plans[0].lines if len(plans) == 1 else comparison([(one.topology, one.reports, one.cost) for one in plans])
  if len(plans) > 1 and plans[0].cost is None:
    lines += ["", *cost_lines(None, plans[0].why)]
  for one in plans if len(plans) > 1 and values.fastest else ():
    lines += ["", f"topology {one.topology}: {fastest_lines(one.tried)[-1]}"]
  if values.text_length:
    lines.append(
      f"texts are trimmed to what {values.text_length} tokens need; a step on longer ones takes more memory and time"
    )
  print("\n".join(lines))
  if values.json:
    content = plans[0].content if len(plans) == 1 else {"topologies": {one.topology: one.content for one in plans}}
    Path(values.json).write_text(json.dumps(content, indent=2) + "\n")
  return 1 if any(report.fits is False for one in plans for report in one.reports.values()) else 0


def _plan(topology: str, devices: Sequence[jax.Device] | None) -> _Plan:
  """Plans the run of the flags for the devices of a topology; "" and None are the devices of this machine."""
  values = flags.FLAGS
  config, note, samples, why = _with_choices(values.config, devices)
  for line in (f"topology {topology}" if "," in (values.topology or "") else "", note):
    if line:
      message(line)  # before minutes of compiling
  tried: list[Tried] = []
  if values.fastest:
    used = list(devices or jax.devices())
    if not device_table.find(used[0].device_kind):
      raise ValueError(
        f"--fastest: the peak figures of {used[0].device_kind!r} are not known, so nothing says which step is fastest: "
        "name a --topology"
      )
    tried = search_fastest(
      config, used, available_memory(used[0]), lambda c: _reports(c, devices, False, values.text_length)[LAST]
    )
    if not tried:
      raise ValueError(
        f"--fastest: no choice divides config.batch_size={config.batch_size} over {counted(len(used), 'device')} "
        "and may fit into their memory"
      )
    config, reports = tried[0].choice.applied(config), {LAST: tried[0].report}
  else:
    reports = _reports(config, devices, values.search, values.text_length)
  assumed = Assumptions(samples, values.utilisation, values.price)
  return _Plan(topology, config, reports, run_cost(config, reports, assumed), why, tried)


def _with_choices(config: ConfigDict, devices: Sequence[jax.Device] | None) -> tuple[ConfigDict, str, int | None, str]:
  """Sets what a config leaves open.

  Returns:
    The config; for how many samples it was chosen, in words, "" if it left nothing open; the number of samples of its
    data, None if it is not known or not needed; and why it is not known, "" if it is or need not be.

  Raises:
    ValueError: the data cannot be read, see `open_source`, and are needed to choose.
  """
  fields = open_fields(config)
  lengths = lengths_of_stages(config)
  if not fields and not any(length.epochs for length in lengths):
    return config, "", None, ""
  samples, why = flags.FLAGS.samples, "without data=" if not config.data.train else ""
  try:
    if config.data.train and not samples:
      samples = sum(len(open_source(guess(spec), "config.data.train")) for spec in config.data.train)
  except (OSError, ModuleNotFoundError, ValueError) as error:
    if fields and isinstance(error, ValueError):
      raise
    why = " ".join(str(error).split())
  if not fields:
    return config, "", samples, why
  config = choose(config, samples, devices)
  what = counted(samples, "sample") if samples is not None else f"a large data set ({why})"
  return config, f"chosen for {what}: {describe(config, fields)}; --config.FIELD=VALUE sets another value", samples, why


def _reports(
  config: ConfigDict, devices: Sequence[jax.Device] | None, search: bool, text_length: int | None
) -> dict[str, Report]:
  """The report on each stage of a run, by its name."""
  reports = {}
  for name, of_stage in stage_configs(config).items():
    if config.stages:
      print(f"stage {name}", file=sys.stderr, flush=True)
    with naming(name, config):
      step = with_trimmed_texts(of_stage, text_length, devices) if text_length else of_stage
      run = [config] if config.stages or text_length else []
      reports[name] = make_report(step, devices, search, *run)
  return reports


def main() -> None:
  """Runs the command."""
  define_config()
  flags.DEFINE_string(
    "topology",
    None,
    f"TPU topology to compile for, TYPE:SHAPE as libtpu names it: {EXAMPLES}; or several, separated by commas, for a "
    "table.",
  )
  flags.DEFINE_integer(
    "slices", 1, "Number of slices of --topology, connected by the data center network.", lower_bound=1
  )
  flags.DEFINE_bool(
    "search", True, "Search for the largest batch that fits, which compiles two or three more steps; not on CPUs."
  )
  flags.DEFINE_integer(
    "text_length", None, "Tokens of the longest text of a batch (default: the context length).", lower_bound=1
  )
  flags.DEFINE_bool(
    "fastest",
    False,
    "Search, step by step, for the mesh, recomputation and micro-batches of a fast step, instead of the largest batch; "
    "not with config.stages. Compiles up to eight steps, or more if none of them fits.",
  )
  flags.DEFINE_integer(
    "samples", None, "Number of samples of the data (default: those on this machine).", lower_bound=1
  )
  flags.DEFINE_float(
    "utilisation", 0.4, "Model FLOPs utilisation, 0 to 1, at which the run is expected to train.", 0.001, 1.0
  )
  flags.DEFINE_float("price", None, "Price of a device for an hour, for the cost of the run.", lower_bound=0.0)
  flags.DEFINE_string("json", None, "Also write the report to this file, as one JSON object.")
  run(_command, __doc__, required=("config",))


if __name__ == "__main__":
  main()

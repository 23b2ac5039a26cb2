"""Reports what a training run would cost, without its hardware: memory, minimum time and largest batch.

  python -m declip_jax.plan --config=clip_wit/vit_b_32 --topology=v5e:16x16

Compiles the real train step for a TPU topology, on any machine with libtpu (the extra tpu), or without --topology for
the devices of this machine. For each device it prints memory, FLOPs and traffic of a step, the minimum time that it
takes, the input rate required of the hosts, and the largest batch that fits.

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

from absl import flags
import jax
from ml_collections import ConfigDict

from declip_jax.command_line import define_config, run
from declip_jax.data.sources import open_source
from declip_jax.planning.choose import choose, describe, open_fields
from declip_jax.planning.report import Report, make_report, run_flops
from declip_jax.planning.table import run_table, table
from declip_jax.planning.topology import EXAMPLES, topology_devices
from declip_jax.reporting.progress import message
from declip_jax.spelling import counted
from declip_jax.stages import LAST, naming, stage_configs


def _command(_: list[str]) -> int:
  """Prints and writes the report; returns the exit code."""
  values = flags.FLAGS
  if values.json and not Path(values.json).absolute().parent.is_dir():
    raise ValueError(f"--json={values.json}: the folder does not exist")  # before minutes of compiling
  if values.slices > 1 and not values.topology:
    raise ValueError(f"--slices={values.slices} needs --topology")
  devices = topology_devices(values.topology, values.slices) if values.topology else None
  config, note = _with_choices(values.config, devices)
  if note:
    message(note)  # before minutes of compiling
  if not config.stages:
    reports = {LAST: make_report(config, devices, values.search)}
    lines, content = table(reports[LAST]), dataclasses.asdict(reports[LAST])
  else:
    reports = _stage_reports(config, devices, values.search)
    of_run = run_flops(config, {name: report.model_flops for name, report in reports.items()})
    of_stages = {name: dataclasses.asdict(report) for name, report in reports.items()}
    lines, content = run_table(reports, of_run), {"stages": of_stages, "run": of_run and dataclasses.asdict(of_run)}
  print("\n".join(lines))
  if values.json:
    Path(values.json).write_text(json.dumps(content, indent=2) + "\n")
  return 1 if any(report.fits is False for report in reports.values()) else 0


def _with_choices(config: ConfigDict, devices: Sequence[jax.Device] | None) -> tuple[ConfigDict, str]:
  """Sets what a config leaves open, and says for how many samples; "" if it leaves nothing open.

  Raises:
    ValueError: the data cannot be read, see `open_source`.
  """
  if not (fields := open_fields(config)):
    return config, ""
  samples, why = None, "without data="
  try:
    if config.data.train:
      samples = sum(len(open_source(spec, "config.data.train")) for spec in config.data.train)
  except (OSError, ModuleNotFoundError) as error:
    why = " ".join(str(error).split())
  config = choose(config, samples, devices)
  what = counted(samples, "sample") if samples is not None else f"a large data set ({why})"
  return config, f"chosen for {what}: {describe(config, fields)}; --config.FIELD=VALUE sets another value"


def _stage_reports(config: ConfigDict, devices: Sequence[jax.Device] | None, search: bool) -> dict[str, Report]:
  """The report on each stage of a run, by its name."""
  reports = {}
  for name, of_stage in stage_configs(config).items():
    print(f"stage {name}", file=sys.stderr, flush=True)
    with naming(name, config):
      reports[name] = make_report(of_stage, devices, search, config)
  return reports


def main() -> None:
  """Runs the command."""
  define_config()
  flags.DEFINE_string("topology", None, f"TPU topology to compile for, TYPE:SHAPE as libtpu names it: {EXAMPLES}.")
  flags.DEFINE_integer(
    "slices", 1, "Number of slices of --topology, connected by the data center network.", lower_bound=1
  )
  flags.DEFINE_bool("search", True, "Search for the largest batch that fits, which compiles two or three more steps.")
  flags.DEFINE_string("json", None, "Also write the report to this file, as one JSON object.")
  run(_command, __doc__, required=("config",))


if __name__ == "__main__":
  main()

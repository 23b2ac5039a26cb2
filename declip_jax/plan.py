"""Reports what a training run would cost, without its hardware: memory, minimum time and largest batch.

  python -m declip_jax.plan --config=clip_wit/vit_b_32 --topology=v5e:16x16

Compiles the real train step for a TPU topology, on any machine with libtpu (the extra tpu), or without --topology for
the devices of this machine. For each device it prints memory, FLOPs and traffic of a step, the minimum time that it
takes, the input rate required of the hosts, and the largest batch that fits. Training trims each batch to its longest
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

from absl import flags
import jax
from ml_collections import ConfigDict

from declip_jax import build
from declip_jax.command_line import define_config, run
from declip_jax.data.sources import open_source
from declip_jax.planning.choose import choose, describe, open_fields
from declip_jax.planning.report import Report, make_report, run_flops
from declip_jax.planning.table import run_table, table
from declip_jax.planning.topology import EXAMPLES, topology_devices
from declip_jax.reporting.progress import message
from declip_jax.spelling import counted
from declip_jax.stages import LAST, naming, stage_configs
from declip_jax.training.trimming import trimmed_length


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
  reports = _reports(config, devices, values.search, values.text_length)
  if not config.stages:
    lines, content = table(reports[LAST]), dataclasses.asdict(reports[LAST])
  else:
    of_run = run_flops(config, {name: report.model_flops for name, report in reports.items()})
    of_stages = {name: dataclasses.asdict(report) for name, report in reports.items()}
    lines, content = run_table(reports, of_run), {"stages": of_stages, "run": of_run and dataclasses.asdict(of_run)}
  if values.text_length:
    lines.append(
      f"texts are trimmed to what {values.text_length} tokens need; a step on longer ones takes more memory and time"
    )
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


def _reports(
  config: ConfigDict, devices: Sequence[jax.Device] | None, search: bool, text_length: int | None
) -> dict[str, Report]:
  """The report on each stage of a run, by its name."""
  reports = {}
  for name, of_stage in stage_configs(config).items():
    if config.stages:
      print(f"stage {name}", file=sys.stderr, flush=True)
    with naming(name, config):
      step = _with_trimmed_texts(of_stage, text_length, devices) if text_length else of_stage
      run = [config] if config.stages or text_length else []
      reports[name] = make_report(step, devices, search, *run)
  return reports


def _with_trimmed_texts(config: ConfigDict, length: int, devices: Sequence[jax.Device] | None) -> ConfigDict:
  """The config of a step whose texts are trimmed to a length, as if it were a stage with shorter texts.

  Raises:
    ValueError: the config does not trim texts, or has none as long.
  """
  built = build.build(config, devices)
  if len(built.text_lengths) < 2:
    raise ValueError(f"--text_length={length}: this config does not trim texts, see config.model.text.buckets")
  whole, trimmed = built.text_lengths[-1], config.copy_and_resolve_references()
  if length > whole:
    raise ValueError(f"--text_length={length}: expected at most config.model.text.context_length={whole}")
  if slots := built.batch_shape(1).get("mlm_position"):
    trimmed.data.mask_slots = slots.shape[-1]
  trimmed.model.text.context_length = trimmed_length(built.text_lengths, length)
  return trimmed


def main() -> None:
  """Runs the command."""
  define_config()
  flags.DEFINE_string("topology", None, f"TPU topology to compile for, TYPE:SHAPE as libtpu names it: {EXAMPLES}.")
  flags.DEFINE_integer(
    "slices", 1, "Number of slices of --topology, connected by the data center network.", lower_bound=1
  )
  flags.DEFINE_bool("search", True, "Search for the largest batch that fits, which compiles two or three more steps.")
  flags.DEFINE_integer(
    "text_length", None, "Tokens of the longest text of a batch (default: the context length).", lower_bound=1
  )
  flags.DEFINE_string("json", None, "Also write the report to this file, as one JSON object.")
  run(_command, __doc__, required=("config",))


if __name__ == "__main__":
  main()

"""Plans a training without its hardware:

  python -m declip_jax.plan --config=configs/clip_wit/vit_b_32.py --topology=v5e:16x16

Compiles the real train step for a TPU topology, on any machine with libtpu (pip install 'declip_jax[tpu]'), or without
--topology for the devices that are here, and prints for each chip what it holds, computes and sends, how fast that can
be at best, which input rate that asks of the hosts, and the largest batch that fits. No data is read.

  --topology   TYPE:SHAPE as libtpu names it: v5e:16x16, v6e:16x16, v5p:4x4x8, v4:4x4x4, tpu7x:2x2x2
  --slices     that many of them, joined by the data center network
  --nosearch   does not look for the largest batch, which compiles two or three times more
  --json FILE  the same as one JSON object
  --config.FIELD=VALUE changes a field, such as --config.batch_size=16384 or --config.mesh.fsdp=8

The largest batch is found on a line through two compiled ones, as memory grows almost linearly, and is compiled too.
Times are what the peak figures of `devices.py` allow; a good program spends them at once, so that no step is faster
than the longest. Compiling takes minutes. Exits with 0, with 1 if the step does not fit, with 2 for what you can mend.
"""

from collections.abc import Callable, Sequence
import importlib.util
import json
import math
import os
from pathlib import Path
import re
import sys
import time
from typing import Any, NamedTuple

from absl import flags
import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from declip_jax import build
from declip_jax.build import make_step
from declip_jax.command_line import define_config, run
from declip_jax.config import duration
from declip_jax.planning import devices, flops, hlo
from declip_jax.sharding import batch_sharding, check_batch, layout_table
from declip_jax.training.state import State, abstract_state
from declip_jax.types import BatchShapes

Report = dict[str, Any]

EXAMPLES = "v4:4x4x4, v5e:4x4, v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:2x2x2"
# Images per second of the data set on one core, by `config.data.recipe`: the engines "fast" and "exact", and the host's
# part with `config.data.augment_on="device"`. docs/results.md, "The input pipeline, per core", 500x375 JPEGs of 58 kB.
RATES = {
  "clip": (840, 501, 876),
  "openai": (727, 417, 747),
  "slip": (411, 111, 609),
  "slip_mocov3": (404, 105, 607),
  "declip": (431, 120, 667),
  "filip": (620, 213, 883),
}
# Recipes with the same images as one that was measured, or with fewer views.
_LIKE = {
  "declip_repo": "declip",
  "filip_repo": "filip",
  "clip_color": "filip",
  "clip_crop": "filip",
  "clip_full": "filip",
  "simclr": "declip",
  "slip_mim": "declip",
}
# Otherwise libtpu asks a TPU VM's metadata server about its surroundings, keeps others out, and tells of it all.
_LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLarge(Exception):
  """A step that does not fit, which needs so many bytes; infinity is not known."""

  def __init__(self, needed: float):
    super().__init__(f"a step that needs {needed:.3g} bytes does not fit")
    self.needed = needed


class Step(NamedTuple):
  """A compiled train step, and what it is made of."""

  abstract: State
  batch: BatchShapes
  executed_flops: float  # of all devices, with what is computed again
  compiled: jax.stages.Compiled


def topology(name: str, slices: int = 1) -> list[jax.Device]:
  """The devices of TPU slices that need not exist, to compile for.

  Raises:
    ModuleNotFoundError: libtpu is not installed.
    ValueError: no such topology; says what libtpu says.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ModuleNotFoundError(
      f"--topology={name} needs libtpu, which any x86 Linux can run: pip install 'declip_jax[tpu]'"
    )
  os.environ |= _LIBTPU
  jax.config.update("jax_platforms", "cpu")
  options = {"num_slices": slices} if slices > 1 else {}
  if name.lower().startswith("v4"):
    options["chip_config_name"] = "megacore"  # one device for each chip, as on the machines
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
  except (RuntimeError, ValueError) as error:
    said = str(error).removeprefix("INVALID_ARGUMENT: ")
    raise ValueError(f"--topology={name}: {said}\nTopologies are written like {EXAMPLES}") from error


def compile_step(config: ConfigDict, over: Sequence[jax.Device] | None = None) -> Step:
  """The train step of a config as the trainer compiles it, over all devices or over those given.

  Raises:
    TooLarge: it does not fit into the devices' memory.
    ValueError: the config does not fit itself or the devices.
  """
  config = config.copy_and_resolve_references()
  config.duration = duration(steps=10**9)  # as no data set is opened, epochs have no length; nothing here depends on it
  built = build.build(config, over)
  shapes, rows = built.batch_shape(config.batch_size), batch_sharding(built.mesh)
  batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in shapes.items()}
  abstract = _abstract(config, built)
  traced = make_step(config, built, build.to_steps(config, epoch_examples=10**6), abstract).trace(abstract, batch)
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      raise TooLarge(needed(str(error), held((abstract, batch)))) from error
    raise
  return Step(abstract, batch, flops.count(traced.jaxpr), compiled)


def needed(message: str, arguments: float) -> float:
  """The bytes that a program needs according to libtpu's refusal; infinity if it does not say.

  There are two wordings: one counts all, the other leaves out the `arguments`.
  """
  number = r"([\d.]+)([KMGT])"
  if whole := re.search(rf"Used {number} of \S+ hbm", message):
    return float(whole[1]) * _UNITS[whole[2]]
  if rest := re.search(rf"HLO temporaries \({number}\) exceeds", message):
    return float(rest[1]) * _UNITS[rest[2]] + arguments
  return math.inf


def held(tree: Any) -> float:
  """Bytes of a tree of shapes with shardings on each device."""
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def memory(step: Step) -> dict[str, float]:
  """Bytes on each device: the state's parts, the batch, temporaries (activations, gradients), the program, the peak."""
  used, state = step.compiled.memory_analysis(), step.abstract
  outputs = used.output_size_in_bytes - used.alias_size_in_bytes  # the state is donated; what is left are metrics
  result = {
    "parameters": held(state.params),
    "optimizer_state": held(state.opt_state),
    "collections": held(state.collections),
    "batch": held(step.batch),
    "padding": used.argument_size_in_bytes - held((state, step.batch)),  # a TPU's, of what is no multiple of its tiles
    "temporaries": float(used.temp_size_in_bytes),
    "program": float(used.generated_code_size_in_bytes),
  }
  peak = used.argument_size_in_bytes + outputs + used.temp_size_in_bytes + used.generated_code_size_in_bytes
  return result | {"peak": float(peak)}


def plan(config: ConfigDict, over: Sequence[jax.Device] | None = None, search: bool = True) -> Report:
  """Compiles the step of a config for all devices or for those given, and reports what the table shows.

  All sizes are in bytes of one device, times in seconds, FLOPs of all devices. What is not known is None: of a device
  that is not in `devices.DEVICES`, or of a step that does not fit.

  Args:
    config: of a training; its length plays no part.
    over: devices, which may be those of `topology`.
    search: whether to look for the largest batch that fits.

  Raises:
    ValueError: the config does not fit itself or the devices.
  """
  chips = list(over or jax.devices())
  built = build.build(config, chips)
  check_batch(config.batch_size, built.mesh, "batch_size")
  abstract = _abstract(config, built)
  peak, available = devices.of(chips[0].device_kind), _available(chips[0])
  report: Report = {
    "device": chips[0].device_kind,
    "devices": len(chips),
    "hosts": len({chip.process_index for chip in chips}),
    "slices": len({getattr(chip, "slice_index", 0) for chip in chips}),
    "mesh": dict(built.mesh.shape),
    "batch_size": config.batch_size,
    "layout": layout_table(abstract),
    "model_flops": flops.step_flops(config, built),
    "peak": peak and peak._asdict(),
    "available": available,
  }
  step, moved, needs = None, None, math.inf
  try:
    step = _told(config, chips)
    moved = hlo.traffic(step.compiled.as_text(), len(chips), report["slices"])
    needs = memory(step)["peak"]
  except TooLarge as error:
    needs = error.needed
  report |= {
    "fits": None if available is None else needs <= available,
    "needed": _finite(needs),
    "memory": step and memory(step),
    "executed_flops": step and step.executed_flops,
    "collectives": moved and _collectives(moved),
    "memory_traffic": moved and moved.memory,
  }
  report["seconds"] = _seconds(report, peak) if peak and step else None
  report["input"] = _input(report, config, peak) if report["seconds"] else None
  report["largest"] = _largest(config, chips, needs, available) if search and available else None
  return report


def _abstract(config: ConfigDict, built: build.Built) -> State:
  shapes = built.batch_shape(config.batch_size)
  return abstract_state(shapes, built.mesh, model=built.model, optimizer=built.optimizer)


def _finite(size: float | None) -> float | None:
  return size if size is not None and math.isfinite(size) else None


def _collectives(moved: hlo.Traffic) -> dict[str, dict[str, float]]:
  return {
    kind: {"count": moved.collectives[kind], "links": moved.links[kind], "network": moved.network[kind]}
    for kind in hlo.COLLECTIVES
    if moved.collectives[kind]
  }


def _available(chip: jax.Device) -> float | None:
  """Bytes that a program may use: as the device says, or else by the table."""
  known = devices.of(chip.device_kind)
  try:
    limit = (chip.memory_stats() or {}).get("bytes_limit")
  except (AttributeError, RuntimeError):  # a device that is only compiled for
    limit = None
  return float(limit) if limit else known and known.memory


def _told(config: ConfigDict, chips: Sequence[jax.Device]) -> Step:
  """`compile_step`, with a line before and behind it."""
  share = config.batch_size / len(chips)
  print(
    f"compiling the step for {len(chips)} x {chips[0].device_kind}, {share:g} pairs on each, which takes minutes",
    file=sys.stderr,
    flush=True,
  )
  start = time.perf_counter()
  try:
    return compile_step(config, chips)
  finally:
    print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def _seconds(report: Report, peak: devices.Device) -> dict[str, float | None]:
  """What each part of a chip needs at its peak; None where that is not known."""
  links, network = (sum(kind[way] for kind in report["collectives"].values()) for way in ("links", "network"))
  return {
    "compute": report["executed_flops"] / report["devices"] / peak.flops,
    "memory": report["memory_traffic"] / peak.memory_bandwidth,
    "interconnect": links / peak.interconnect,
    "network": network and (network / peak.network_bandwidth if peak.network_bandwidth else None),
  }


def _input(report: Report, config: ConfigDict, peak: devices.Device) -> Report:
  """What the hosts have to deliver for the fastest step that is possible, and the cores that this takes."""
  fastest = max(filter(None, report["seconds"].values()))
  rate = report["batch_size"] / fastest / report["hosts"]
  name = _LIKE.get(config.data.recipe, config.data.recipe)
  way = 2 if config.data.augment_on == "device" else ("fast", "exact").index(config.data.engine)
  cores = RATES.get(name) and rate / RATES[name][way]
  cpus = peak.host_cpus and peak.host_cpus * report["devices"] / report["hosts"]
  utilisation = report["model_flops"] / report["devices"] / peak.flops / fastest
  return {
    "step": fastest,
    "utilisation": utilisation,
    "images_per_second": report["batch_size"] / fastest,
    "images_per_second_and_host": rate,
    "cores_per_host": cores,
    "cpus_per_host": cpus,
    "measured_of": name,
    "measured_rate": RATES[name][way] if name in RATES else None,
  }


def _largest(config: ConfigDict, chips: Sequence[jax.Device], needs: float, available: float) -> Report:
  """The most pairs for each chip that fit, of which the config's own number `needs` so many bytes."""
  heads, count = config.model.heads, len(chips)
  # What divides a batch; so many pairs on a chip come together.
  groups = heads.norm_groups, heads.bank_groups, config.model.image.get("norm_groups", 1)
  unit = math.lcm(math.lcm(count * config.micro_batches, *groups) // count, config.contrast.block or 1)

  def compile_with(pairs: int) -> float:
    other = config.copy_and_resolve_references()
    other.batch_size = pairs * count
    try:
      return memory(_told(other, chips))["peak"]
    except TooLarge as error:
      return error.needed
    except ValueError as error:  # a bank that is smaller than the batch, say
      print(f"  {pairs} pairs: {error}", file=sys.stderr, flush=True)
      return math.inf

  tried = search_largest(compile_with, available, {config.batch_size // count: needs}, unit)
  pairs = max((pairs for pairs, need in tried.items() if need <= available), default=None)
  return {
    "pairs": pairs,
    "batch_size": pairs and pairs * count,
    "tried": [[pairs, _finite(need)] for pairs, need in sorted(tried.items())],
  }


def search_largest(
  need_of: Callable[[int], float], available: float, known: dict[int, float], unit: int, tries: int = 3
) -> dict[int, float]:
  """Needs of a few multiples of `unit`, among them the largest of at most `available`, if needs grow on a line.

  Args:
    need_of: of a multiple of `unit`; expensive. Infinity is more than there is, nobody knows how much.
    available: what there is.
    known: the one need that was computed already.
    unit: of the multiples.
    tries: how often `need_of` may be called.
  """
  tried, (first,) = dict(known), known
  guess = first // 2 // unit * unit or 2 * first
  for _ in range(tries):
    tried[guess] = need_of(guess)
    fitting = [pairs for pairs, need in tried.items() if need <= available]
    others = [pairs for pairs in tried if pairs not in fitting]
    # On the line through the two needs next to what there is; where there is none that rises, by halves.
    finite = sorted((abs(need - available), pairs) for pairs, need in tried.items() if math.isfinite(need))
    low, high = sorted(pairs for _, pairs in finite[:2]) if len(finite) > 1 else (first, first)
    if tried[high] > tried[low]:
      guess = low + (available - tried[low]) * (high - low) / (tried[high] - tried[low])
    else:
      guess = (max(fitting, default=0) + min(others, default=32 * first)) / 2
    guess = min(guess, 16 * first, *(pairs - unit for pairs in others))
    guess = max(int(guess // unit * unit), *fitting, 0)
    if guess in tried or not guess:
      break
  return tried


def table(report: Report) -> list[str]:
  """The report as lines of text."""
  count, pairs = report["devices"], report["batch_size"] / report["devices"]
  mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
  several = f", {_counted(report['slices'], 'slice')}" if report["slices"] > 1 else ""
  lines = [
    f"{count} x {report['device']}, {_counted(report['hosts'], 'host')}{several}; mesh {mesh}",
    f"batch {report['batch_size']:,}: {pairs:g} pairs on each chip",
    "",
    *report["layout"],
    "",
    "memory of each chip",
  ]
  available, largest = report["available"], report["largest"]
  for name, size in (report["memory"] or {}).items():
    of = f" of {_bytes(available)}, {100 * size / available:.1f} %" if name == "peak" and available else ""
    lines.append(f"  {_words(name):<22}{_bytes(size):>12}{of}")
  if report["fits"] is False:
    lines.append(f"  DOES NOT FIT: needs {_bytes(report['needed'])} of {_bytes(available)}")
  elif report["fits"]:
    lines.append("  fits")
  if largest:
    tried = ", ".join(f"{pairs:,}: {_bytes(need)}" for pairs, need in largest["tried"])
    most = f"{largest['pairs']:,} pairs, batch {largest['batch_size']:,}" if largest["pairs"] else "none that was tried"
    if largest["pairs"] == max(pairs for pairs, _ in largest["tried"]):
      most += ", or more"
    lines.append(f"  largest batch on each chip that fits: {most} (compiled {tried})")
  work, peak, seconds = report["model_flops"], report["peak"], report["seconds"]
  lines += ["", f"FLOPs of a step: {work:.4g} of the model ({work / count:.4g} on each chip)"]
  if executed := report["executed_flops"]:
    lines[-1] += f"; {executed:.4g} with what is computed again (+{100 * (executed / work - 1):.1f} %)"
  if report["collectives"] is not None:
    lines += ["", f"{'sent by each chip in a step':<30}{'number':>8}{'in the slice':>16}{'between slices':>16}"]
    for kind, sent in report["collectives"].items():
      lines.append(f"  {kind:<28}{sent['count']:>8,}{_bytes(sent['links']):>16}{_bytes(sent['network']):>16}")
    lines.append(f"  {'read and written in memory':<28}{'':>8}{_bytes(report['memory_traffic']):>16}")
  if seconds:
    links = f"{peak['links']} links of {peak['link_bandwidth'] / 1e9:g} GB/s, one way"
    network = peak["network_bandwidth"]
    rates = {
      "compute": f"{peak['flops'] / 1e12:g} TFLOP/s in bfloat16",
      "memory": f"{peak['memory_bandwidth'] / 1e9:g} GB/s",
      "interconnect": links,
      "network": f"{network / 1e9:g} GB/s" if network else "not known",
    }
    lines += ["", "at best (roofline)"]
    for name, value in seconds.items():
      if value is None or value or name != "network":
        lines.append(f"  {name:<22}{'not known' if value is None else f'{1e3 * value:.1f} ms':>12}  at {rates[name]}")
    needs = report["input"]
    lines.append(
      f"  {'step':<22}{1e3 * needs['step']:>9.1f} ms  model FLOPs utilisation {100 * needs['utilisation']:.0f} %, "
      f"{needs['images_per_second'] / count:,.0f} pairs/s on each chip"
    )
    lines += ["", "input for such a step; half the utilisation needs half of it"]
    lines.append(f"  {needs['images_per_second_and_host']:,.0f} images/s on each host")
    if needs["cores_per_host"]:
      has = f" of {needs['cpus_per_host']:g} vCPUs" if needs["cpus_per_host"] else ""
      lines[-1] += (
        f": {needs['cores_per_host']:.1f} cores{has}, at {needs['measured_rate']} images/s and core "
        f"(recipe {needs['measured_of']}, JPEGs of 500x375, docs/results.md)"
      )
    else:
      lines[-1] += f": no rate was measured for recipe {needs['measured_of']}"
  return lines


def _bytes(size: float | None) -> str:
  if size is None:
    return "more than there is"
  for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
    if size >= factor:
      return f"{size / factor:,.2f} {unit}"
  return f"{size:.0f} B"


def _counted(count: int, noun: str) -> str:
  return f"{count} {noun}" + "s" * (count > 1)


def _words(name: str) -> str:
  return name.replace("_", " ")


def _command(_: list[str]) -> int:
  """Prints and writes the report; returns the exit code."""
  given = flags.FLAGS
  if given.json and not Path(given.json).absolute().parent.is_dir():
    raise ValueError(f"--json={given.json}: there is no such folder")  # said now, and not in some minutes
  if given.slices > 1 and not given.topology:
    raise ValueError(f"--slices={given.slices}: of which --topology?")
  over = topology(given.topology, given.slices) if given.topology else None
  report = plan(given.config, over, given.search)
  print("\n".join(table(report)))
  if given.json:
    Path(given.json).write_text(json.dumps(report, indent=2) + "\n")
  return 1 if report["fits"] is False else 0


def main() -> None:
  """Runs the command."""
  define_config()
  flags.DEFINE_string("topology", None, f"TPU topology to compile for: {EXAMPLES} or another.")
  flags.DEFINE_integer("slices", 1, "How many slices of --topology.", lower_bound=1)
  flags.DEFINE_bool("search", True, "Look for the largest batch that fits.")
  flags.DEFINE_string("json", None, "File to write the report to, as one JSON object.")
  run(_command, __doc__, required=("config",))


if __name__ == "__main__":
  main()

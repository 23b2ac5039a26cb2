"""The working directory of a run: its lock, and the record of its starts."""

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
from functools import partial
from importlib import metadata
import os
from pathlib import Path
import socket
import subprocess
import sys
import time
from types import MappingProxyType
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.sharding import Mesh

from declip_jax import __version__
from declip_jax import config as config_lib
from declip_jax.methods import name_of
from declip_jax.runtime import records
from declip_jax.runtime.hosts import first_error
from declip_jax.spelling import counted
from declip_jax.weights.hub import is_address

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def local_path(workdir: str | os.PathLike[str]) -> Path:
  """Returns the path of a working directory.

  Raises:
    ValueError: the path is empty, or that of a file, or an address such as gs://...: object stores cannot append to a
      file, which metrics.jsonl requires; or that of a model on the Hugging Face hub.
  """
  if not os.fspath(workdir):
    raise ValueError("--workdir is empty: expected a directory, such as runs/demo, or . for the current one")
  if "://" in os.fspath(workdir):
    raise ValueError(f"workdir {os.fspath(workdir)!r} is an address: mount it (gcsfuse, NFS) and pass the path")
  if is_address(workdir):
    raise ValueError(f"--workdir={os.fspath(workdir)} is a model on the Hugging Face hub: pass it as --weights")
  if os.path.isfile(workdir):
    raise ValueError(f"--workdir={os.fspath(workdir)} is a file: expected a directory")
  return Path(workdir)


class OtherRunError(ValueError):
  """The working directory belongs to another run, whose files have to stay as they are."""


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[str]:
  """Locks a working directory against a second run, by `run.lock`, until the context or the process ends.

  Process 0 holds the lock for all. Yields a message if the file system does not support locks, otherwise "".

  Raises:
    OtherRunError: another run holds the lock, or the directory is not writable; the same on every host. The message
      names the host, process and time of the other run.
  """
  path, in_use, message = workdir / "run.lock", "", ""
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        file = stack.enter_context(path.open("a+"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}")
        file.flush()
      except BlockingIOError:
        file.seek(0)
        in_use = f"{workdir} is in use by another run: {file.read()}"
      except PermissionError as error:
        in_use = f"{workdir} is not writable: {error}"
      except OSError as error:
        message = f"{path}: {error}; this directory is not protected against a second run"
    if in_use := first_error(in_use):
      raise OtherRunError(in_use)
    yield message


def read_config(workdir: Path) -> dict[str, Any] | None:
  """Returns the fields of `config.json` in a working directory, under their current names.

  Returns None if the file does not exist, or, with a warning, if it is damaged. Each checkpoint has its own copy.
  """
  path = workdir / "config.json"
  try:
    return config_lib.parse_json(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
    logging.warning("%s is damaged and is not used: %s", path, error)
    return None


def record(
  config: str,
  mesh: Mesh,
  workdir: Path,
  samples: Mapping[str, int],
  stamps: Mapping[str, str] = MappingProxyType({}),
  *,
  total_steps: int = 0,
  finished: bool = False,
) -> list[str]:
  """Writes `config.json` into a working directory, and adds a line to `starts.jsonl`.

  The line has time, command, versions, mesh, devices, git revision, length, and size and stamp of each source.

  Args:
    config: config as JSON.
    mesh: devices that it trains on.
    workdir: working directory.
    samples: number of samples of each source.
    stamps: stamp of each source.
    total_steps: number of steps of the whole run.
    finished: whether no steps are left to train; `config.json` is not rewritten then.

  Returns:
    Messages about the fields and the data that have changed since the last start in this directory.
  """
  before, now = read_config(workdir), config_lib.parse_json(config)
  if not finished or before is None:
    records.write(workdir / "config.json", f"{config}\n".encode())
  about = {
    "time": round(time.time(), 3),
    "command": sys.argv,
    "python": sys.version.split()[0],
    "versions": {"declip_jax": __version__} | {name: metadata.version(name) for name in _PACKAGES},
    "git": _git_revision(),
    "mesh": dict(mesh.shape),
    "processes": jax.process_count(),
    "device": mesh.devices.flat[0].device_kind,
    "total_steps": total_steps,
    "samples": dict(samples),
    "stamps": dict(stamps),
  }
  earlier = read_starts(workdir)
  records.add_line(workdir / "starts.jsonl", about)
  changed = _changed_sources(earlier[-1], samples, stamps) if earlier else []
  return [*differences(now if before is None else before, now), *changed]


class Start(NamedTuple):
  """A start of a run, as `starts.jsonl` has it; older versions wrote less.

  Attributes:
    command: program and arguments.
    samples: number of samples of each source.
    stamps: stamp of each source.
    git: git revision of the package.
    total_steps: number of steps of the whole run; 0 if it is not known.
  """

  command: list[str]
  samples: dict[str, int]
  stamps: dict[str, str]
  git: str = "unknown"
  total_steps: int = 0


def read_starts(workdir: Path) -> list[Start]:
  """The starts of a run, the first one first.

  Raises:
    OSError: their file cannot be read.
  """
  return records.read_lines(workdir / "starts.jsonl", _start)


def _start(line: dict[str, Any]) -> Start:
  samples, stamps = dict(line.get("samples", {})), dict(line.get("stamps", {}))
  return Start(
    [*map(str, line.get("command", ()))],
    {name: int(count) for name, count in samples.items()},
    {name: str(stamp) for name, stamp in stamps.items()},
    str(line.get("git", "unknown")),
    int(line.get("total_steps", 0)),
  )


def _changed_sources(before: Start, samples: Mapping[str, int], stamps: Mapping[str, str]) -> Iterator[str]:
  for name, count in samples.items():
    earlier = before.samples.get(name, count)
    if earlier != count:
      yield f"{name} had {counted(earlier, 'sample')} and now has {count:,}: from here on their order is different"
    elif before.stamps.get(name) != stamps.get(name) and name in before.stamps and name in stamps:
      yield (
        f"{name} has as many samples as before, but its files have changed: the samples or their order may be different"
      )


def _git_revision() -> str:
  """The git revision of this package; "unknown" if it has no repository of its own, even inside another one."""
  git = ["git", "-C", str(Path(__file__).parent)]
  call = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=10)
  try:
    call([*git, "ls-files", "--error-unmatch", Path(__file__).name])
    return call([*git, "describe", "--always", "--dirty", "--abbrev=12"]).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return "unknown"


# What determines the arrays of a checkpoint, besides the method.
_OF_MODELS = ("config.model.", "config.data.image_size", "config.optimizer.name")
_NAMED = 3  # differences in a message


def about_other_run(workdir: Path, config: str) -> str:
  """What the run in a working directory has that a config does not ask for, and what to do, in a line.

  Args:
    workdir: working directory, with a checkpoint that does not fit the config.
    config: config as JSON.

  Returns:
    A message with both methods or, if they are the same, with the fields of the model that differ; "" if neither does.
  """
  before, now = read_config(workdir), config_lib.parse_json(config)
  if before is None:
    return ""
  there, here = _method(before), _method(now)
  models = [line for line in differences(before, now) if line.startswith(_OF_MODELS)]
  if there != here:
    what = f"a run of the method {there}, but the config asks for {here}"
  elif models:
    shown = "; ".join(models[:_NAMED]) + (" ..." if len(models) > _NAMED else "")
    what = f"a run of another model than the config asks for ({shown})"
  else:
    return ""
  return (
    f"{workdir} has {what}: choose another --workdir, where --config.init_from.path={workdir} starts from the weights "
    f"of this run, or resume this run with --config={workdir / 'config.json'}"
  )


def _method(fields: Mapping[str, Any]) -> str:
  """The method of a config that older versions may have written."""
  terms = {term for term, own in fields.get("objective", {}).items() if own.get("weight")}
  return name_of(fields.get("data", {}).get("recipe", ""), terms)


_OF_USERS = ("config.evals", "config.stages", "config.trackers")  # what they contain is named by the config


def differences(before: Any, after: Any, name: str = "config") -> list[str]:
  """The fields of a config that differ in another one, with both values, such as "config.seed: 0 -> 1"."""
  if isinstance(before, dict) and isinstance(after, dict):
    # A field that only one of two versions has was not changed by the user; an evaluation, a stage or a tracker was.
    names = sorted({*before, *after} if name in _OF_USERS else before.keys() & after.keys())
    return [line for key in names for line in differences(before.get(key), after.get(key), f"{name}.{key}")]
  return [] if before == after else [f"{name}: {before!r} -> {after!r}"]

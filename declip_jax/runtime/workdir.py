"""A run's working directory: its lock, what it records about itself, and where compiled programs are kept."""

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
from importlib import metadata
import json
import os
from pathlib import Path
import socket
import subprocess
import sys
import time
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from declip_jax.runtime.hosts import agree

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def local_path(workdir: str | os.PathLike[str]) -> Path:
  """The path of a working directory.

  Raises:
    ValueError: it is an address such as gs://...; metrics are appended to, which object stores cannot do.
  """
  if "://" in os.fspath(workdir):
    raise ValueError(f"workdir {os.fspath(workdir)!r} is an address: mount it (gcsfuse, NFS) and give the path")
  return Path(workdir)


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[str]:
  """Keeps a second run out of a working directory, by a lock on its `run.lock` that the system frees with the process.

  Process 0 holds it for all. Yields what should be said: a file system that knows no locks keeps nobody out.

  Raises:
    ValueError: another run has it, the same on every host; names host, process and time.
  """
  path, refused, note = workdir / "run.lock", "", ""
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
        refused = f"{workdir} is in use by another run: {file.read()}"
      except PermissionError as error:
        refused = f"{workdir} cannot be written to: {error}"
      except OSError as error:
        note = f"{path}: {error}; nothing keeps a second run out of this directory"
    if refused := agree(refused):
      raise ValueError(refused)
    yield note


def use_compile_cache(folder: Path) -> None:
  """Keeps what is compiled in a folder, so that a run that starts again is soon at work.

  `JAX_COMPILATION_CACHE_DIR` names another one.
  """
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))


def record(config: ConfigDict, mesh: Mesh, workdir: Path, samples: Mapping[str, int]) -> list[str]:
  """Writes `config.json` into a working directory, and adds a line to `starts.jsonl`.

  The line has time, command, versions, mesh, devices, git revision and `samples`, the size of each source.

  Returns:
    The fields and sizes in which an earlier run in this directory differed, as text.
  """
  config_file, text = workdir / "config.json", config.to_json_best_effort(indent=2, sort_keys=True)
  before = json.loads(config_file.read_text()) if config_file.exists() else json.loads(text)
  config_file.write_text(text + "\n")
  about = {
    "time": round(time.time(), 3),
    "command": sys.argv,
    "python": sys.version.split()[0],
    "versions": {name: metadata.version(name) for name in _PACKAGES},
    "git": _git_revision(),
    "mesh": dict(mesh.shape),
    "processes": jax.process_count(),
    "device": mesh.devices.flat[0].device_kind,
    "samples": dict(samples),
  }
  starts = workdir / "starts.jsonl"
  lines = starts.read_text().splitlines() if starts.exists() else []
  earlier = json.loads(lines[-1]).get("samples", {}) if lines else {}
  with starts.open("a") as file:
    file.write(json.dumps(about) + "\n")
  changed = [
    f"{name} had {earlier[name]:,} samples and has {count:,}: from here on they come in another order"
    for name, count in samples.items()
    if earlier.get(name, count) != count
  ]
  return _differences(before, json.loads(text)) + changed


def _git_revision() -> str:
  command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return "unknown"


def _differences(before: Any, after: Any, name: str = "config") -> list[str]:
  if isinstance(before, dict) and isinstance(after, dict):
    # Fields that one version has and the other has not are no change of the user's; evaluations are.
    names = sorted({*before, *after} if name == "config.evals" else before.keys() & after.keys())
    return [line for key in names for line in _differences(before.get(key), after.get(key), f"{name}.{key}")]
  return [] if before == after else [f"{name}: {before!r} -> {after!r}"]

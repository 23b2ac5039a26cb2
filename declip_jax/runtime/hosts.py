"""Communication between the processes of one run; with a single process nothing is sent.

Every process has to call each of these functions, at the same point.
"""

from collections.abc import Mapping, Sequence
import json
import os
import threading
from typing import Any

from absl import flags
import jax
from jax.experimental import multihost_utils
import numpy as np

from declip_jax.command_line import IO_EXIT_CODE
from declip_jax.reporting.progress import drop_lost_streams, message

_ERROR_BYTES = 400  # length to which an error is truncated before it is sent
_JOIN_SECONDS = 300.0  # time for all processes to start


def join_processes() -> None:
  """Connects this process with the others that the flags `--coordinator` or `--multihost` describe.

  If not all of them join within five minutes, this process ends with exit code 74, since a retry may succeed.

  Raises:
    ValueError: only some of `--coordinator`, `--processes` and `--process` are given, or the number of this process is
      not less than that of all.
  """
  names = ("coordinator", "processes", "process")
  given = {name: flags.FLAGS[name].value for name in names if flags.FLAGS[name].value is not None}
  if given and (missing := [f"--{name}" for name in names if name not in given]):
    raise ValueError(f"{' '.join(f'--{name}={value}' for name, value in given.items())}: needs {' and '.join(missing)}")
  if not given and not flags.FLAGS.multihost:
    return
  if given and given["process"] >= given["processes"]:
    raise ValueError(
      f"--process={given['process']}: expected a number from 0 to {given['processes'] - 1}, one less than --processes"
    )
  # JAX would abort the process after its own timeout, with the stack of its C++ code.
  timer = threading.Timer(_JOIN_SECONDS, _give_up, (given,))
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      *given.values(),
      initialization_timeout=round(_JOIN_SECONDS) + 60,
      heartbeat_timeout_seconds=flags.FLAGS.heartbeat,
    )
  finally:
    timer.cancel()


def _give_up(given: Mapping[str, Any]) -> None:
  flag_texts = " ".join(f"--{name}={value}" for name, value in given.items()) or "--multihost"
  message(
    f"error: {flag_texts}: not all processes of the run have joined within {_JOIN_SECONDS:g} s; start the others, and "
    "check that they have the same coordinator and number of processes"
  )
  drop_lost_streams()
  os._exit(IO_EXIT_CODE)


def check_backend() -> None:
  """Starts JAX's backend.

  Raises:
    ValueError: `JAX_PLATFORMS` names a backend that this installation or machine does not have.
    OSError: another process uses the device.
  """
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # the latter if no plugin of this name is installed
    text = " ".join(str(error).split()) or "no backend of this name is installed"
    if "already in use" in text or "UNAVAILABLE" in text:
      raise OSError(text) from error
    platforms = os.environ.get("JAX_PLATFORMS", "")
    raise ValueError(f"JAX_PLATFORMS={platforms!r} is not available here: {text}") from error


def first_error(error: str) -> str:
  """Returns the first host's error that is not empty, with the number of the host; "" if none has one."""
  if jax.process_count() == 1:
    return error
  mine = np.zeros(_ERROR_BYTES, np.uint8)
  text = error.encode()[:_ERROR_BYTES]
  mine[: len(text)] = np.frombuffer(text, np.uint8)
  gathered = multihost_utils.process_allgather(mine).reshape(-1, _ERROR_BYTES)
  errors = [bytes(host).rstrip(b"\0").decode(errors="replace") for host in gathered]
  return next((f"host {host}: {error}" for host, error in enumerate(errors) if error), "")


def from_first(content: bytes) -> bytes:
  """Returns what the first host passes; what others pass does not matter."""
  mine = content if jax.process_index() == 0 else b""
  return gather_rows(np.frombuffer(mine, np.uint8)).tobytes()


def gather_texts(texts: Sequence[str]) -> list[str]:
  """Joins the texts of all hosts, in the order of the hosts."""
  if jax.process_count() == 1:
    return list(texts)
  lines = "".join(f"{json.dumps(text)}\n" for text in texts).encode()
  return [json.loads(line) for line in gather_rows(np.frombuffer(lines, np.uint8)).tobytes().splitlines()]


def any_host(condition: bool) -> bool:
  """Returns whether the condition is true on any host."""
  return bool(sum_over_hosts(np.int32(condition)))


def barrier() -> None:
  """Waits until every host has called this."""
  sum_over_hosts(np.int32(0))


def sum_over_hosts(values: np.ndarray) -> np.ndarray:
  """Adds up the values of all hosts, element by element."""
  if jax.process_count() == 1:
    return np.asarray(values)
  return multihost_utils.process_allgather(values, tiled=False).sum(axis=0)


def gather_rows(rows: np.ndarray) -> np.ndarray:
  """Joins the rows of all hosts, `[n_host ...]`, to `[n ...]`, in the order of the hosts; their numbers may differ."""
  if jax.process_count() == 1:
    return rows
  counts = multihost_utils.process_allgather(np.int32(len(rows)))
  padded = np.zeros((counts.max(), *rows.shape[1:]), rows.dtype)
  padded[: len(rows)] = rows
  gathered = multihost_utils.process_allgather(padded)
  return np.concatenate([host[:count] for host, count in zip(gathered, counts, strict=True)])


def smallest(value: float) -> float:
  """The smallest of the values that the hosts pass, rounded to float32."""
  if jax.process_count() == 1:
    return value
  return float(multihost_utils.process_allgather(np.float32(value), tiled=False).min())


def check_sizes(sizes: Sequence[tuple[str, int]]) -> None:
  """Checks that all hosts see the same number of samples in each source: otherwise their orders would differ.

  Args:
    sizes: name and number of samples of each source.

  Raises:
    ValueError: on every host; the message names the first source that differs and its size on each host.
  """
  mine = np.array([size for _, size in sizes], np.int64)
  gathered = multihost_utils.process_allgather(mine, tiled=False).reshape(-1, len(mine))
  for (name, _), counts in zip(sizes, gathered.T, strict=True):
    if len(set(counts.tolist())) > 1:
      seen = ", ".join(f"host {host}: {count:,}" for host, count in enumerate(counts))
      raise ValueError(f"{name}: the hosts see different numbers of samples ({seen})")

"""What several processes agree on."""

from absl import flags
import jax
from jax.experimental import multihost_utils
import numpy as np


def join_processes() -> None:
  if flags.FLAGS.coordinator:
    where = (flags.FLAGS.coordinator, flags.FLAGS.processes, flags.FLAGS.process)
    jax.distributed.initialize(*where, heartbeat_timeout_seconds=flags.FLAGS.heartbeat)
  elif flags.FLAGS.multihost:
    jax.distributed.initialize(heartbeat_timeout_seconds=flags.FLAGS.heartbeat)


_MESSAGE_BYTES = 400  # of an error that the hosts tell each other


def agree(reason: str) -> str:
  """The first of the hosts' reasons that is not empty, the same on all of them; every host has to call it."""
  if jax.process_count() == 1:
    return reason
  mine = np.zeros(_MESSAGE_BYTES, np.uint8)
  text = reason.encode()[:_MESSAGE_BYTES]
  mine[: len(text)] = np.frombuffer(text, np.uint8)
  everyones = multihost_utils.process_allgather(mine).reshape(-1, _MESSAGE_BYTES)
  reasons = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in everyones]
  return next((f"host {host}: {reason}" for host, reason in enumerate(reasons) if reason), "")

"""Trackers of a run: TensorBoard, and those in `config.trackers`."""

from collections.abc import Mapping
from functools import partial

from declip_jax.reporting.trackers.background import Background
from declip_jax.reporting.trackers.base import OpenTracker, TrackedRun, Tracker
from declip_jax.reporting.trackers.tensorboard import open_tensorboard

__all__ = ["OpenTracker", "TrackedRun", "Tracker", "open_trackers"]


def open_trackers(others: Mapping[str, OpenTracker], run: TrackedRun) -> list[Tracker]:
  """Opens TensorBoard and other trackers, which are called in threads of their own.

  Args:
    others: what opens each other tracker, by its name in `config.trackers`.
    run: the run.

  Raises:
    OSError: the folder of TensorBoard cannot be written.
  """
  return [open_tensorboard(run), *(Background(name, partial(opens, run)) for name, opens in others.items())]

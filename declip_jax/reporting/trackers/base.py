"""The interface of trackers: where the metrics, pictures and texts of a run go besides its working directory."""

from collections.abc import Callable, Mapping
import dataclasses
from pathlib import Path
from typing import Any
import uuid

from declip_jax.runtime import records


@dataclasses.dataclass(frozen=True)
class TrackedRun:
  """A run as a tracker knows it.

  Attributes:
    id: identity, 32 hexadecimal digits; a resumed run keeps it.
    workdir: working directory; the run is named after it.
    config: fields of the config, of which a user's own functions are names.
    start: step from which the run starts; 0 for a new run.
  """

  id: str
  workdir: Path
  config: Mapping[str, Any]
  start: int

  @property
  def name(self) -> str:
    return self.workdir.resolve().name


class Tracker:
  """What a tracker does with a run; a subclass overrides what it needs.

  After a rollback, or if the run resumes from an earlier checkpoint, steps repeat.
  """

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Records the metrics of a step, by name; one step may have several calls."""

  def picture(self, step: int, name: str, path: Path) -> None:
    """Records a PNG file, such as the curves; a later step may replace the file."""

  def text(self, step: int, name: str, text: str) -> None:
    """Records a text in Markdown."""

  def roll_back(self, step: int) -> None:
    """Learns that the run is back at a step, and that what followed it did not happen."""

  def close(self, finished: bool) -> None:
    """Ends the recording; `finished` is False if the run has stopped early."""


# Opens a tracker for a run.
OpenTracker = Callable[[TrackedRun], Tracker]


def run_id(workdir: Path, start: int) -> str:
  """Returns the identity of a run, which `run_id.txt` in its working directory keeps; a new one at step 0.

  Raises:
    OSError: the file cannot be read or written.
  """
  path = workdir / "run_id.txt"
  if start and path.exists() and (found := path.read_text().strip()):
    return found
  new = uuid.uuid4().hex
  records.write(path, f"{new}\n".encode())
  return new

"""Going back to an earlier checkpoint, and on with other data, after a run has diverged.

Step count, parameters and schedule are those of the checkpoint, so the training is as long as it should be; the input
goes on behind the batches at which it diverged. Each time is a line of `rollbacks.jsonl`, from which a run that is
killed before its next checkpoint knows where its input was.
"""

from collections.abc import Mapping, Sequence
import json
import os
from pathlib import Path
import time
from typing import Any

import jax


class Rollbacks:
  """The times that a run went back.

  Args:
    workdir: of the run.
  """

  def __init__(self, workdir: Path):
    self._path = workdir / "rollbacks.jsonl"
    lines = self._path.read_text().split("\n")[:-1] if self._path.exists() else []  # a torn last line does not count
    self._made: list[dict[str, Any]] = [json.loads(line) for line in lines]

  def __len__(self) -> int:
    return len(self._made)

  def target(self, steps: Sequence[int], healthy: int) -> int | None:
    """Where to go back to: the newest checkpoint up to the step `healthy`, None if there is none at all.

    If that is where the run came from the last time, and so diverged again without any other checkpoint, it is the one
    before, if there is one. If all are newer, it is the oldest: skipped steps have changed no parameters.
    """
    older = [step for step in sorted(steps) if step <= healthy]
    if len(older) > 1 and self._made and self._made[-1]["to"] == older[-1]:
      return older[-2]
    return older[-1] if older else min(steps, default=None)

  def position(self, step: int, data: dict[str, Any]) -> dict[str, Any]:
    """Where the input goes on at the checkpoint of a step, which has `data`: behind what the run went back for."""
    if not self._made or self._made[-1]["to"] != step or self._made[-1]["data"]["next_index"] <= data["next_index"]:
      return data
    return self._made[-1]["data"]

  def record(self, skipped: int, at: int, to: int, data: Mapping[str, Any]) -> None:
    """Notes that after `skipped` steps in a row, the last one `at`, the run went back `to` a step and on at `data`."""
    self._made.append({"time": round(time.time(), 3), "skipped": skipped, "at": at, "to": to, "data": dict(data)})
    if jax.process_index() == 0:
      text = "".join(json.dumps(line) + "\n" for line in self._made)
      temporary = self._path.with_suffix(".jsonl.tmp")
      with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, self._path)

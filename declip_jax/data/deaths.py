"""Samples that kill the process that reads them, recorded in the working directory and skipped after two deaths.

Each process records the names of the samples that its threads read in a small file, which is mapped into memory:
writing it takes microseconds, and it outlives the process. While the process is running, it holds a lock on the file.
If such a file is not locked, the process that started the worker, or the next start of the run, adds the samples in it
to `deaths.HOST.jsonl` and deletes it.

The other threads of a process that dies were reading harmless samples. A sample that was being read when a process died
is therefore read alone the next time: a second death is then due to this sample.
"""

from collections import Counter, deque
from collections.abc import Sequence
import contextlib
import fcntl
import json
import mmap
import os
from pathlib import Path
import tempfile
import threading
import time
from typing import Any

from absl import logging

from declip_jax.data.hangs import Key
from declip_jax.data.sources import BadSample

_DEATHS = "deaths."  # start of the names of the lists, one for each host
_FATAL = 2  # deaths after which a sample is skipped
_SLOTS, _SLOT = 256, 512  # number of threads that a process can record, and bytes for each


class Deaths:
  """The samples that were being read when processes died. A copy in a worker process records its own threads.

  Args:
    workdir: the working directory; None records nothing.
    host: number of this host.
    folder: name of the folder in the working directory for the records of what is being read.
  """

  def __init__(self, workdir: Path | None = None, host: int = 0, folder: str = "reading"):
    self._workdir, self._host, self._folder = workdir, host, folder
    self._counts: Counter[Key] = Counter()
    self.__setstate__({})

  def __getstate__(self) -> dict[str, Any]:
    return {"_workdir": self._workdir, "_host": self._host, "_folder": self._folder, "_counts": self._counts}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._journal: _Journal | None = None
    self._has_journal = self._workdir is not None
    self._lock, self._turns = threading.Lock(), _Turns()

  def check(self, key: Key, place: str) -> None:
    """Raises BadSample if a sample, named `place`, was being read when two processes died."""
    if self._counts and self._counts[key] >= _FATAL:
      raise BadSample("fatal", f"{place}: {self._counts[key]} processes died while reading it")

  def reading(self, names: dict[Key, str]) -> "Record":
    """Records that this thread reads samples, given by key and name, once it is their turn."""
    alone = bool(self._counts) and any(self._counts[key] for key in names)
    return Record(self._opened(), self._turns.take(alone), names)

  def _opened(self) -> "_Journal | None":
    if self._journal is None and self._workdir is not None and self._has_journal:
      with self._lock:
        try:
          self._journal = self._journal or _Journal(self._workdir / self._folder, f"{self._host}.")
        except OSError as error:
          self._has_journal = False
          logging.warning("samples that kill their process cannot be recorded: %s", error)
    return self._journal

  def recover(self) -> list[str]:
    """Records the deaths of processes since the last call, and returns a line about each sample that they read."""
    if self._workdir is None:
      return []
    found = [line.partition(" ")[::2] for path in self._journals() for line in _left_by_dead(path)]
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    lines = [json.dumps({"sample": key, "name": name, "time": now}) + "\n" for key, name in found]
    try:
      if lines:
        with (self._workdir / f"{_DEATHS}{self._host}.jsonl").open("a") as file:
          file.writelines(lines)
    except OSError as error:
      logging.warning("samples that killed their process cannot be recorded: %s", error)
      self._counts.update(key for key, _ in found)
    else:
      lists = [path for path in _files_in(self._workdir) if path.name.startswith(_DEATHS)]
      self._counts = Counter(key for path in lists for key in _keys_in(path))
    return [f"a process died while reading {name}: {self._consequence(key)}" for key, name in dict(found).items()]

  def _consequence(self, key: Key) -> str:
    return "it is skipped from now on" if self._counts[key] >= _FATAL else "it is skipped if that happens again"

  def forget(self) -> None:
    """Deletes the records of what the processes of this host are reading, since they are about to end normally."""
    for path in self._journals():
      path.unlink(missing_ok=True)
    if self._workdir is not None:
      with contextlib.suppress(OSError):
        (self._workdir / self._folder).rmdir()  # if it is empty
    self._journal = None

  def _journals(self) -> list[Path]:
    files = [] if self._workdir is None else _files_in(self._workdir / self._folder)
    return [path for path in files if path.name.startswith(f"{self._host}.")]


class Record:
  """What one thread is reading, in the journal of its process, if that has a free slot."""

  def __init__(self, journal: "_Journal | None", turn: "_Turn", names: dict[Key, str]):
    self._journal, self._turn = journal, turn
    self._slot = journal.free.pop() if journal and journal.free else None
    self.write(names)

  def __enter__(self) -> "Record":
    return self

  def __exit__(self, *_: object) -> None:
    if self._journal is not None and self._slot is not None:
      self._journal.write(self._slot, "")
      self._journal.free.append(self._slot)
    self._turn.give()

  def write(self, names: dict[Key, str]) -> None:
    """Replaces the names of the samples."""
    if self._journal is not None and self._slot is not None:
      self._journal.write(self._slot, "\n".join(f"{key} {name[-200:]}" for key, name in names.items()))

  def leave(self) -> None:
    """Lets other threads read, since this one hangs."""
    self._turn.give()


class _Turns:
  """Lets threads read concurrently, or one of them alone."""

  def __init__(self) -> None:
    self.changed, self.reading = threading.Condition(), set[_Turn]()
    self._waiting = 0

  def take(self, alone: bool) -> "_Turn":
    """Waits until no other thread is reading (`alone`), or until none is reading alone or waiting to do so."""
    turn = _Turn(self, alone)
    with self.changed:
      self._waiting += alone
      while self.reading if alone else self._waiting or any(other.alone for other in self.reading):
        self.changed.wait()
      self._waiting -= alone
      self.reading.add(turn)
    return turn


class _Turn:
  """The right of a thread to read, alone or not, until it is given back."""

  def __init__(self, turns: _Turns, alone: bool):
    self._turns, self.alone = turns, alone

  def give(self) -> None:
    with self._turns.changed:
      self._turns.reading.discard(self)
      self._turns.changed.notify_all()


class _Journal:
  """The file in which a process records what it reads.

  Attributes:
    free: unused slots.
  """

  def __init__(self, folder: Path, prefix: str):
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, _ = tempfile.mkstemp(dir=folder, prefix=prefix)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # until this process ends: the file stays open
    os.truncate(descriptor, _SLOTS * _SLOT)
    self._memory = mmap.mmap(descriptor, _SLOTS * _SLOT)
    self.free = deque(range(_SLOTS))
    _journals.append(self)

  def write(self, slot: int, text: str) -> None:
    data = text.encode("utf-8", "backslashreplace")[: _SLOT - 2]
    self._memory[slot * _SLOT : slot * _SLOT + 2 + len(data)] = len(data).to_bytes(2, "little") + data

  def clear(self) -> None:
    self._memory[:] = bytes(len(self._memory))


_journals: list[_Journal] = []  # of this process


def clear_journals() -> None:
  """Deletes this process's records of what it is reading, since it is about to end for another reason."""
  for journal in _journals:
    journal.clear()


def _files_in(folder: Path) -> Sequence[Path]:
  try:
    return sorted(folder.iterdir())
  except OSError:
    return []


def _left_by_dead(path: Path) -> list[str]:
  """The lines in the journal of a process that died, which is then deleted; none if it is alive."""
  try:
    with path.open("rb") as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      data = file.read(_SLOTS * _SLOT)
    path.unlink()
  except OSError:  # its lock is held
    return []
  slots = [data[start : start + _SLOT] for start in range(0, len(data), _SLOT)]
  texts = [slot[2 : 2 + int.from_bytes(slot[:2], "little")].decode(errors="replace") for slot in slots]
  return [line for text in texts for line in text.split("\n") if line]


def _keys_in(path: Path) -> list[Key]:
  """The samples of a list of deaths; lines that cannot be read are ignored."""
  keys = []
  with contextlib.suppress(OSError):
    for line in path.read_text(errors="replace").splitlines():
      with contextlib.suppress(ValueError, LookupError, TypeError):
        keys.append(str(json.loads(line)["sample"]))
  return keys

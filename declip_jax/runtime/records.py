"""The small files of a run: written completely or not at all, and read as far as possible.

They record the history of a run; its checkpoints do not depend on them. Damage by a power cut, a full disk or an editor
is therefore reported, and does not stop a run.
"""

from collections.abc import Callable, Iterable
import json
from pathlib import Path
from typing import Any, TypeVar

from absl import logging

from declip_jax.data.storage.outputs import write

__all__ = ["add_line", "read_lines", "write", "write_lines"]

T = TypeVar("T")


def write_lines(path: Path, values: Iterable[Any]) -> None:
  """Writes a line of JSON for each value; see `write`."""
  write(path, "".join(f"{json.dumps(value)}\n" for value in values).encode())


def add_line(path: Path, value: Any) -> None:
  """Adds a line of JSON after all that a file contains, even if its last line was cut off; see `write`."""
  before = path.read_bytes() if path.exists() else b""
  end = b"" if before.endswith(b"\n") or not before else b"\n"
  write(path, before + end + f"{json.dumps(value)}\n".encode())


def read_lines(path: Path, parse: Callable[[Any], T]) -> list[T]:
  """Reads the lines of JSON in a file; one warning names the lines that are left out.

  Args:
    path: file; no lines if it does not exist. A last line without a newline is left out: it may not be complete yet.
    parse: converts what a line contains; raises ValueError, LookupError, TypeError or AttributeError if it is invalid.

  Raises:
    OSError: the file cannot be read.
  """
  if not path.exists():
    return []
  found, odd = [], []
  *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
  for number, line in enumerate(lines, 1):
    try:
      found.append(parse(json.loads(line)))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
      odd.append((number, line))
  if odd:
    more = f" and {len(odd) - 1} other lines" if odd[1:] else ""
    logging.warning("%s: line %d%s cannot be used and is left out: %r", path, odd[0][0], more, odd[0][1][:80])
  return found

"""Files of rows with random access, in which a row is a tuple of numbers, texts, bytes, lists and None.

A file is the rows, as msgpack arrays; where each of them starts, and the last ends, as uint64; metadata, as JSON; and
the numbers of rows and of bytes of the metadata.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
import json
from pathlib import Path
import struct
from typing import Any

import msgpack
import numpy as np

Row = Sequence[Any]

_END = struct.Struct("<QQ")


class Rows:
  """A file of rows that is mapped into memory: neither opening it nor a row costs more if it has more rows.

  Attributes:
    about: the metadata.

  Raises:
    ValueError: the contents are not those of such a file; also raised for a damaged row.
  """

  def __init__(self, contents: memoryview):
    end = len(contents) - _END.size
    count, length = _END.unpack_from(contents, end) if end >= 0 else (0, 0)
    stop, start = end - length, end - length - 8 * (count + 1)
    if start < 0:
      raise ValueError("it is cut off")
    self._contents, self._starts = contents, np.frombuffer(contents[start:stop], "<u8")
    self.about: dict[str, Any] = json.loads(bytes(contents[stop:end]))

  def __len__(self) -> int:
    return len(self._starts) - 1

  def __getitem__(self, index: int) -> Row:
    start, stop = self._starts[index : index + 2].tolist()
    return msgpack.unpackb(self._contents[start:stop])


def write(path: Path, rows: Iterable[Row], about: Callable[[], dict[str, Any]]) -> int:
  """Writes rows, and then the metadata that is known only at the end; returns the number of rows.

  Eight bytes per row are kept in memory.
  """
  starts, place = array("Q"), 0
  with path.open("wb") as file:
    for row in rows:
      starts.append(place)
      place += file.write(msgpack.packb(row))
    count = len(starts)
    starts.append(place)
    metadata = json.dumps(about()).encode()
    file.write(np.frombuffer(starts, np.uint64).astype("<u8"))
    file.write(metadata + _END.pack(count, len(metadata)))
  return count

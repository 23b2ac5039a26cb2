"""Damages the last line of a file in the ways of power cuts and editors; reads the files of TensorBoard and W&B."""

from collections.abc import Iterable, Iterator
from pathlib import Path
import struct

from tensorboardX.proto.event_pb2 import Event

GARBAGE = (b"\0", b"\xff", b'"', b"}", b"9")


def damages(content: bytes) -> Iterator[bytes]:
  """Yields contents of which the last line is cut off, or has another character, at each of its bytes."""
  start = content.rstrip(b"\n").rfind(b"\n") + 1
  for place in range(start, len(content)):
    yield content[:place]
    yield content[:place] + GARBAGE[place % len(GARBAGE)] + content[place + 1 :]


def read_events(folder: Path) -> list[Event]:
  """The events of the only file in a folder."""
  (path,) = (path for path in folder.iterdir() if path.is_file())
  data, events, position = path.read_bytes(), [], 0
  while position < len(data):  # a record: length, its checksum, the event, its checksum
    (length,) = struct.unpack_from("<Q", data, position)
    events.append(Event.FromString(data[position + 12 : position + 12 + length]))
    position += length + 16
  return events


def scalars(events: Iterable[Event]) -> list[tuple[int, str, float]]:
  """Step, name and value of each scalar."""
  return [(event.step, one.tag, round(one.simple_value, 3)) for event in events for one in event.summary.value]


def wandb_records(path: Path) -> Iterator[bytes]:
  """The records of W&B's log of a run, whose format is that of LevelDB's logs, after a header of 7 bytes."""
  data, position, parts = path.read_bytes(), 7, b""
  while position + 7 <= len(data):
    if (left := 32768 - position % 32768) < 7:  # the rest of a block, too short for a header
      position += left
      continue
    _, length, kind = struct.unpack_from("<IHB", data, position)  # checksum, length, whole 1 or first 2 to last 4 part
    parts += data[position + 7 : position + 7 + length]
    position += 7 + length
    if kind in (1, 4):
      yield parts
      parts = b""

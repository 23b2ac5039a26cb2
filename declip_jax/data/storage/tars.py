"""Members of tar files, found without reading their contents.

The tar format: POSIX.1-2024, "pax", and the GNU tar manual, "Basic Tar Format", for GNU's own header types.
"""

from collections.abc import Iterator
from functools import partial
import re
from typing import Any, BinaryIO, NamedTuple

_BLOCK = 512
_END = bytes(_BLOCK)
_REGULAR, _EMPTY, _EXTENSIONS = {b"0", b"\0", b"7"}, set(map(str.encode, "123456")), {b"x", b"g", b"L", b"K"}
_MOST = 2**60  # bytes; a larger member is damage
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")  # "LENGTH KEY=VALUE\n", where LENGTH counts all of it


class Member(NamedTuple):
  """A regular file in a tar.

  Attributes:
    key: the path up to the first dot of the file name.
    suffix: the rest of the file name, in lower case.
    start: the offset of its first header, in bytes.
    data, stop: the offsets of its contents, `[data, stop)`, in bytes.
  """

  key: str
  suffix: str
  start: int
  data: int
  stop: int


def members(file: BinaryIO, size: int) -> Iterator[Member]:
  """Yields the regular files of a tar in order, except hidden ones and those without a suffix.

  If a tar ends within the contents of a member, that member is the last one, and its `stop` exceeds `size`.

  Args:
    file: the tar, or a piece of it that starts at a header.
    size: its size in bytes.

  Raises:
    ValueError: a header is missing or cut off, so nothing after it can be read.
  """
  start = offset = 0
  extended = {}
  while (header := _read(file, offset, _BLOCK)) != _END:
    if len(header) < _BLOCK:
      if not header:
        return
      raise ValueError(f"byte {offset}: cut off within a header")
    name, kind, length = _header(header, offset)
    data, extension = offset + _BLOCK, kind in _EXTENSIONS
    length = length if extension else extended.get("size", length)
    if not 0 <= length < _MOST:
      raise ValueError(f"byte {offset}: a member of {length} bytes; is the file damaged?")
    offset = data + -(-length // _BLOCK) * _BLOCK
    if extension:
      if data + length > size:
        raise ValueError(f"byte {data - _BLOCK}: cut off within a header")
      extended |= _extension(kind, _read(file, data, length))
      continue
    key, suffix = _split(extended.get("path", name))
    if key and kind in _REGULAR:
      yield Member(key, suffix, start, data, data + length)
    start = offset
    if extended:
      extended = {}


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
  file.seek(offset)
  return file.read(size)


def _split(path: str) -> tuple[str, str]:
  """`a/b.c.JPG` -> `a/b`, `c.jpg`; empty for a name without a stem or a suffix."""
  folder, slash, file = path.rpartition("/")
  stem, _, suffix = file.partition(".")
  return (folder + slash + stem, suffix.lower()) if stem and suffix else ("", "")


def _header(block: bytes, offset: int) -> tuple[str, bytes, int]:
  """Name, type and size in a header; links, folders and devices have no contents, whatever their size field says."""
  try:
    if block[257:262] != b"ustar" and _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
      raise ValueError  # tars from before 1988 have no magic, only a checksum, which counts itself as spaces
    kind, size = block[156:157], _number(block[124:136])
  except ValueError:
    raise ValueError(f"byte {offset}: no tar header; is the file damaged or compressed?") from None
  name = block[:100].partition(b"\0")[0]
  if block[257:263] == b"ustar\0" and block[345]:
    name = block[345:500].partition(b"\0")[0] + b"/" + name
  return name.decode("utf-8", "backslashreplace"), kind, 0 if kind in _EMPTY else size


def _number(field: bytes) -> int:
  """Parses an octal number, or GNU's base 256 for larger ones."""
  if field[-1] in b"\0 " and field[:-1].isdigit():  # nearly all are, and this takes half the time
    return int(field[:-1], 8)
  if field[0] & 0x80:
    return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
  return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _extension(kind: bytes, body: bytes) -> dict[str, Any]:
  """Path and size that a GNU long name or a PAX header defines for the next member."""
  found = {}
  if kind == b"L":
    found["path"] = _text(body.partition(b"\0")[0])
  while kind == b"x" and (match := _PAX_RECORD.match(body)):
    size, key = int(match[1]), match[2]
    value, body = body[match.end() : size - 1], body[max(size, match.end()) :]
    if key in (b"path", b"size"):
      found[key.decode()] = _text(value) if key == b"path" else int(value)
  return found


_text = partial(str, encoding="utf-8", errors="backslashreplace")  # names must be printable in errors

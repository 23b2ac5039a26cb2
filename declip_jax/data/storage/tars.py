"""Members of tar files, found without reading their contents.

The tar format: POSIX.1-2024, "pax", and the GNU tar manual, "Basic Tar Format", for GNU's own header types.
"""

from collections.abc import Iterator
from functools import partial
import re
from typing import Any, BinaryIO, NamedTuple

_BLOCK = 512
_CHUNK = 2**16
_END = bytes(_BLOCK)
_REGULAR, _EMPTY, _EXTENSIONS = {b"0", b"\0", b"7"}, set(map(str.encode, "123456")), {b"x", b"g", b"L", b"K"}
_SPARSE = b"S"
_MOST = 2**60  # bytes; a larger member is damage
_MOST_EXTENSION = 2**20  # bytes of a long name or a PAX header
_MOST_PADDING = 2**24  # zeros between the end of an archive and the next one
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")  # "LENGTH KEY=VALUE\n", where LENGTH counts all of it


class AfterEnd(ValueError):
  """Something other than another archive follows the end of a tar."""


class Member(NamedTuple):
  """A regular file in a tar.

  Attributes:
    key: the path up to the first dot of the file name.
    suffix: the rest of the file name, in lower case.
    start: the offset of its first header, in bytes.
    data, stop: the offsets of its contents, `[data, stop)`, in bytes.
    sparse: whether its contents are stored without runs of zeros, so that these bytes are not those of the file.
  """

  key: str
  suffix: str
  start: int
  data: int
  stop: int
  sparse: bool = False


def members(file: BinaryIO, size: int) -> Iterator[Member]:
  """Yields the regular files of a tar in order, except hidden ones and those without a suffix.

  If a tar ends within the contents of a member, that member is the last one, and its `stop` exceeds `size`. Archives
  that were joined (`cat a.tar b.tar`) are read one after the other.

  Args:
    file: the tar, or a piece of it that starts at a header.
    size: its size in bytes.

  Raises:
    AfterEnd: something other than another archive follows the end.
    ValueError: a header is missing or cut off, so nothing after it can be read.
  """
  start = offset = 0
  end, extended = -1, {}
  while header := _read(file, offset, _BLOCK):
    if header == _END:
      start = offset = end = _after_zeros(file, offset)
      extended = {}
      continue
    if len(header) < _BLOCK and offset != end:
      raise ValueError(f"byte {offset}: cut off within a header")
    try:
      name, kind, length = _header(header)
    except ValueError:
      if offset == end:
        raise AfterEnd(f"byte {offset}: the data after the end of the tar is not another tar") from None
      raise ValueError(f"byte {offset}: no tar header; is the file damaged or compressed?") from None
    data, extension = offset + _BLOCK, kind in _EXTENSIONS
    length = length if extension else extended.get("size", length)
    if not 0 <= length < _MOST:
      raise ValueError(f"byte {offset}: a member of {length} bytes; is the file damaged?")
    if kind == _SPARSE:
      data = _after_map(file, header, data)
    offset = data + -(-length // _BLOCK) * _BLOCK
    if extension:
      if data + length > size:
        raise ValueError(f"byte {data - _BLOCK}: cut off within a header")
      if length > _MOST_EXTENSION:
        raise ValueError(f"byte {data - _BLOCK}: an extended header of {length} bytes; is the file damaged?")
      extended |= _extension(kind, _read(file, data, length), data - _BLOCK)
      continue
    key, suffix = _split(extended.get("path", name))
    if key and (kind in _REGULAR or kind == _SPARSE):
      yield Member(key, suffix, start, data, data + length, kind == _SPARSE or "sparse" in extended)
    start = offset
    if extended:
      extended = {}


def _after_zeros(file: BinaryIO, offset: int) -> int:
  """The offset of the first block from `offset` that is not all zeros, or of the end of the file."""
  for start in range(offset, offset + _MOST_PADDING, _CHUNK):
    chunk = _read(file, start, _CHUNK)
    zeros = len(chunk) - len(chunk.lstrip(b"\0"))
    if zeros < _CHUNK:
      return start + (zeros // _BLOCK * _BLOCK if zeros < len(chunk) else zeros)
  raise AfterEnd(f"byte {offset}: {_MOST_PADDING} zeros or more follow the end; data after them is not read")


def _after_map(file: BinaryIO, header: bytes, offset: int) -> int:
  """The offset of the contents of a sparse file, after the blocks that continue its map, the first at `offset`."""
  more, start = header[482], offset
  while more:
    block = _read(file, offset, _BLOCK)
    if len(block) < _BLOCK or offset - start > _MOST_EXTENSION:
      raise ValueError(f"byte {start}: the map of a sparse file is cut off or damaged")
    more, offset = block[504], offset + _BLOCK
  return offset


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
  file.seek(offset)
  return file.read(size)


def _split(path: str) -> tuple[str, str]:
  """`a/b.c.JPG` -> `a/b`, `c.jpg`; empty for a name without a stem or a suffix."""
  folder, slash, file = path.rpartition("/")
  stem, _, suffix = file.partition(".")
  return (folder + slash + stem, suffix.lower()) if stem and suffix else ("", "")


def _header(block: bytes) -> tuple[str, bytes, int]:
  """Name, type and size in a header; links, folders and devices have no contents, whatever their size field says.

  Raises:
    ValueError: the block is not a header.
  """
  if len(block) < _BLOCK:
    raise ValueError
  if block[257:262] != b"ustar" and _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
    raise ValueError  # tars from before 1988 have no magic, only a checksum, which counts itself as spaces
  kind, size = block[156:157], _number(block[124:136])
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


def _extension(kind: bytes, body: bytes, offset: int) -> dict[str, Any]:
  """What a GNU long name or a PAX header at `offset` defines for the next member: "path", "size", whether "sparse"."""
  found, place, name = {}, 0, None
  if kind == b"L":
    found["path"] = _text(body.partition(b"\0")[0])
  while kind == b"x" and (match := _PAX_RECORD.match(body, place)):
    key, value = match[2], body[match.end() : place + int(match[1]) - 1]
    place = max(place + int(match[1]), match.end())
    if key == b"path":
      found["path"] = _text(value)
    elif key == b"size":
      found["size"] = _pax_number(value, offset)
    elif key.startswith(b"GNU.sparse."):
      found["sparse"] = True
      name = _text(value) if key == b"GNU.sparse.name" else name  # `path` is then one that GNU tar made up
  return found if name is None else found | {"path": name}


def _pax_number(value: bytes, offset: int) -> int:
  if not value.isdigit() or len(value) > 20:
    raise ValueError(f"byte {offset}: a member of {value[:30]!r} bytes; is the file damaged?")
  return int(value)


_text = partial(str, encoding="utf-8", errors="backslashreplace")  # names must be printable in errors

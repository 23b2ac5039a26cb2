"""Single members of zip files, read at random.

The zip format: APPNOTE.TXT of PKWARE.
"""

import errno
from functools import lru_cache
import struct
import zipfile
import zlib

from declip_jax.data.storage import files, remote

_TAIL = 2**17  # bytes at the end of a zip; they contain the directory of a thousand photos
# The end record, a directory entry, and the header of a member.
_END = struct.Struct("<4s4H2LH")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_HEADER = struct.Struct("<4s5H3L2H")
_EXTRA = 256  # bytes read for the fields after a header, whose length only the header knows
_ZIP64 = 0xFFFFFFFF
_STORED, _DEFLATED = 0, 8


class DamagedMember(ValueError):
  """The contents of a member are damaged."""


def read_member(path: str, member: str) -> bytes:
  """Reads a stored or deflated member of a zip. Nothing is cached: random access rarely hits the same zip twice.

  The entry is found by searching the bytes of the directory. Parsing a thousand entries with zipfile takes 4 ms, about
  as long as decoding the image; zipfile handles unusual zips, and members that seem to be missing.

  Raises:
    DamagedMember: the member's contents are damaged.
    files.TooLarge: more than `files.MAX_BYTES`, before or after inflating.
    FileNotFoundError: the zip has no such member.
    OSError: the zip cannot be read.
    ValueError: the file is not a zip, or the member is compressed in an unknown way.
  """
  found = _find(path, member.encode())
  if found is None:
    return _read_unusual(path, member)
  method, crc, body = found
  try:
    data = _inflated(body, path, member) if method == _DEFLATED else body
  except zlib.error as error:
    raise DamagedMember(f"{path}, {member}: {error}") from None
  if zlib.crc32(data) != crc:
    raise DamagedMember(f"{path}, {member}: wrong checksum")
  return data


def _inflated(body: bytes, path: str, member: str) -> bytes:
  inflate = zlib.decompressobj(-zlib.MAX_WBITS)
  data = inflate.decompress(body, files.MAX_BYTES + 1)
  if len(data) > files.MAX_BYTES:
    raise _too_large(path, member)
  if not inflate.eof:
    raise zlib.error("incomplete or truncated stream")
  return data


def _too_large(path: str, member: str) -> files.TooLarge:
  return files.TooLarge(errno.EFBIG, f"{member}: more than {files.MAX_BYTES:,} bytes", path)


def _find(path: str, name: bytes) -> tuple[int, int, bytes] | None:
  """Method, CRC-32 and compressed bytes of a member; None if the simple search does not find it."""
  size = _size_of_url(path) if remote.is_url(path) else files.stamp(path)[0]
  start = max(0, size - _TAIL)
  tail = files.read(path, start, size - start)
  end = tail.rfind(b"PK\5\6")
  if not 0 <= end <= len(tail) - _END.size:
    return None
  directory = _END.unpack_from(tail, end)[6] - start
  if not 0 <= directory < end:  # longer than the tail, or of zip64
    return None
  place = directory
  while (place := tail.find(name, place + 1, end)) >= 0:
    entry = place - _ENTRY.size
    if entry >= directory and tail[entry : entry + 4] == b"PK\1\2":
      _, _, _, flags, method, _, _, crc, length, _, name_length, *_, offset = _ENTRY.unpack_from(tail, entry)
      if name_length == len(name):
        break
  if place < 0 or method not in (_STORED, _DEFLATED) or flags & 1 or _ZIP64 in (length, offset):
    return None
  data = files.read(path, offset, _HEADER.size + len(name) + _EXTRA + length)
  if len(data) < _HEADER.size or data[:4] != b"PK\3\4":
    return None
  body = _HEADER.size + sum(_HEADER.unpack_from(data)[-2:])
  return (method, crc, data[body : body + length]) if body + length <= len(data) else None


@lru_cache(2**17)
def _size_of_url(url: str) -> int:
  """Cached, which saves a request per photo. 100,000 sizes are small; the directories would take 5 GB."""
  return files.stamp(url)[0]


def _read_unusual(path: str, member: str) -> bytes:
  try:
    with files.open_stream(path) as stream, zipfile.ZipFile(stream) as archive, archive.open(member) as body:
      data = body.read(files.MAX_BYTES + 1)
    if len(data) > files.MAX_BYTES:
      raise _too_large(path, member)
    return data
  except KeyError:
    raise FileNotFoundError(f"{path} has no member {member}") from None
  except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
    raise ValueError(f"{path}, {member}: {error}") from None

"""YFCC15M as SLIP lays it out: a list of photos with title and description, and the photos in zips of a thousand.

The photo with index RRZZZFFF, eight digits, is the member `FFF.jpg` of `images/RR/ZZZ.zip` (Mu et al. 2021; datasets.py
there). An index is the number of a photo's line in yfcc100m_dataset.txt.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
import pickle
import struct
from typing import Any
import zipfile
import zlib

from declip_jax.data.sources import rows
from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.rows import Row
from declip_jax.data.sources.table import captions_of, read_table
from declip_jax.data.storage import files

_COLUMNS = ("index", "title", "description")
_PHOTOS = 10**8
_TAIL = 2**17  # bytes at the end of a zip, in which the directory of a thousand photos lies
# APPNOTE.TXT of the zip format: the record at the end, an entry of the directory, and the header before a member.
_END = struct.Struct("<4s4H2LH")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_HEADER = struct.Struct("<4s5H3L2H")
_EXTRA = 256  # bytes read for fields behind the header whose length only the header tells
_ZIP64 = 0xFFFFFFFF
_STORED, _DEFLATED = 0, 8


class Yfcc(rows.Rows):
  """A list of photos in zips as a `Source`; make it with `open_yfcc`."""

  def _image(self, row: Row) -> bytes:
    digits = f"{row.record:08d}"
    return read_member(self._at(row, f"images/{digits[:2]}/{digits[2:5]}.zip"), f"{digits[5:]}.jpg")


def open_yfcc(location: str) -> Yfcc:
  """Opens "METADATA" or "METADATA?root=FOLDER&encoding=NAME".

  A sample's captions are its title and its description, without those that are blank: the pipeline draws one of them,
  where SLIP draws either of the two even if it is empty. A photo that has neither is left out and counted; one that is
  not in its zip is found missing when it is read. Texts are taken as they are: SLIP cleans them of percent signs, HTML
  and URLs when it makes its list.

  Args:
    location: of a table with columns index, title and description, as `open_table` reads it, or of SLIP's own
      yfcc15m.pkl, a pickled list of (index, title, description), which takes some 6 GB of memory, once; a pickle that
      names any class or function is refused, for to load it may run any code. `root` is the folder that holds images/,
      by default the folder of the list, and `encoding` that of the table if it is not UTF-8.

  Raises:
    FileNotFoundError: no such list, or its photos are not found.
    ValueError: a column is missing, the pickle is refused, or no line is usable.
  """
  name = f"yfcc:{location}"
  place, wanted = rows.parse(location, ("root", "encoding"))
  paths = files.expand(place)

  def all_rows() -> Iterator[Row | BadSample]:
    for number, path in enumerate(paths):
      pickled = path.endswith((".pkl", ".pickle"))
      for line, record in _pickled(path) if pickled else _tabled(path, wanted.get("encoding")):
        try:
          yield _row(number, record)
        except BadSample as error:
          yield BadSample(error.kind, f"{path}:{line}: {error}")

  index = rows.index_rows(name, paths, ["yfcc", wanted.get("encoding"), files.stamps(paths)], all_rows)
  return rows.probed(Yfcc(name, index, rows.root_of(wanted)))


def read_member(path: str, member: str) -> bytes:
  """Reads a member of a zip, stored or deflated; at random, hardly a zip is met twice, so none is kept.

  Its entry is found by a search through the bytes of the directory. To parse all thousand entries, as zipfile does,
  takes 4 ms, about as long as to decode the image; zipfile gets what is unusual, and what seems to be missing.

  Raises:
    BadSample: there is no such member, or it is damaged.
    OSError: the zip cannot be read.
  """
  found = _find(path, member.encode())
  if found is None:
    return _read_unusual(path, member)
  method, crc, body = found
  try:
    data = zlib.decompress(body, -zlib.MAX_WBITS) if method == _DEFLATED else body
  except zlib.error as error:
    raise BadSample("damaged image", f"{path}, {member}: {error}") from None
  if zlib.crc32(data) != crc:
    raise BadSample("damaged image", f"{path}, {member}: its checksum is wrong")
  return data


def _find(path: str, name: bytes) -> tuple[int, int, bytes] | None:
  """Compression, CRC-32 and compressed bytes of a member; None if it cannot be found without further ado."""
  size = _size_of_url(path) if files.is_url(path) else files.stamp(path)[0]
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
  """Kept, which saves a request for each photo: 100,000 zips are few, while their directories would be 5 GB."""
  return files.stamp(url)[0]


def _read_unusual(path: str, member: str) -> bytes:
  try:
    with files.open_stream(path) as stream, zipfile.ZipFile(stream) as archive:
      return archive.read(member)
  except KeyError:
    raise BadSample("missing file", f"{path} has no member {member}") from None
  except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
    raise BadSample("missing file", f"{path}, {member}: {error}") from None


class _PlainUnpickler(pickle.Unpickler):
  """Loads lists, tuples, numbers and texts. All else in a pickle goes through a name, and every name is refused."""

  def find_class(self, module: str, name: str) -> Any:
    raise pickle.UnpicklingError(f"it names {module}.{name}, and to load that may run any code")


def _pickled(path: str) -> Iterator[tuple[int, Any]]:
  """Positions and elements of a pickled list."""
  try:
    with files.open_stream(path) as stream:
      records = _PlainUnpickler(stream).load()
  except OSError:
    raise
  except Exception as error:  # a damaged pickle raises whatever its instructions lead to
    raise ValueError(f"{path}: expected a pickled list of (index, title, description): {error}") from None
  if not isinstance(records, list):
    raise ValueError(f"{path}: expected a list of (index, title, description), got a {type(records).__name__}")
  yield from enumerate(records)


def _tabled(path: str, encoding: str | None) -> Iterator[tuple[int, Any]]:
  """Lines and (index, title, description) of a table."""
  with read_table(path, _COLUMNS, encoding) as (columns, read):
    if not set(_COLUMNS) <= set(columns):
      raise ValueError(f"{path}: expected the columns {', '.join(_COLUMNS)}, there are {columns}")
    for line, fields in read(_COLUMNS):
      yield line, fields if isinstance(fields, str) else tuple(map(fields.get, _COLUMNS))


def _row(number: int, record: Any) -> Row:
  """Makes a row of (index, title, description); a BadSample says what is wrong with it."""
  if isinstance(record, str):
    raise BadSample("damaged record", record)
  if not isinstance(record, tuple | list) or len(record) != len(_COLUMNS):
    raise BadSample("damaged record", f"expected (index, title, description), got {record!r:.80}")
  index, *texts = record
  if not str(index).isdecimal() or int(index) >= _PHOTOS:
    raise BadSample("damaged record", f"expected an index below {_PHOTOS}, got {index!r}")
  captions = _captions(texts)
  if not captions:
    raise BadSample("no caption", f"photo {index} has neither title nor description")
  return Row(number, int(index), None, captions=captions)


def _captions(texts: Iterable[Any]) -> list[str]:
  return [caption for text in texts for caption in captions_of(text)]

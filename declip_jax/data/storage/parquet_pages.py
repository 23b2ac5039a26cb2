"""Headers of the pages of a Parquet file, which tell how much memory a page takes before it is decompressed.

The metadata at the end of a file repeat these sizes, but nothing ensures that they are true. A header is a struct in
Thrift's compact protocol, of the type PageHeader in https://github.com/apache/parquet-format.
"""

import io
from typing import Any, BinaryIO, NamedTuple

from declip_jax.extras import pyarrow as pa

_LARGE = 2**28  # bytes; a page may be larger only if it has at least an eighth of them in the file, as images do
_EXPANSION = 8
_HEADER, _LARGEST_HEADER = 2**9, 2**18  # bytes to read at first, and at most
_FORGOTTEN = 100  # bytes that the metadata of old writers lack, as Arrow assumes
_SIZE, _COMPRESSED_SIZE, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8  # numbers of fields of a header
_DELTA_BYTE_ARRAY = 7  # an encoding in which a value may repeat the beginning of the one before it


class Pages(NamedTuple):
  """What the pages of a column in a row group have.

  Attributes:
    dictionary: bytes of the dictionary, 0 without one; no value in it is longer.
    delta: bytes of the largest page whose values may repeat each other, 0 without one; no value in it is longer.
  """

  dictionary: int
  delta: int


def inspect(stream: BinaryIO, column: Any, most_values: int) -> Pages:
  """Reads the headers of the pages of a column, a `pyarrow.parquet.ColumnChunkMetaData`.

  Raises:
    pa.ArrowInvalid: a page is too large, there are more than `most_values` values or other than the metadata say, or a
      header is damaged.
  """
  place = column.data_page_offset
  if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < place:
    place = column.dictionary_page_offset
  stop = min(place + column.total_compressed_size + _FORGOTTEN, stream.seek(0, io.SEEK_END))
  left, found = column.num_values, Pages(0, 0)
  if place < 0 or left < 0 or column.total_compressed_size < 0:
    raise pa.ArrowInvalid(f"the pages of {column.path_in_schema!r} have a negative place or size")
  if left > most_values:
    raise pa.ArrowInvalid(f"{left:,} values of {column.path_in_schema!r}, expected at most {most_values:,}")
  while left > 0 and place < stop:
    header, place = _header(stream, place)
    size, compressed = _number(header, _SIZE), _number(header, _COMPRESSED_SIZE)
    if size < 0 or compressed < 0 or place + compressed > stop:
      raise pa.ArrowInvalid(f"a page of {column.path_in_schema!r} does not end")
    if size > max(_LARGE, _EXPANSION * compressed):
      limit = f"a page of {column.path_in_schema!r} has {compressed:,} bytes and {size:,} once decompressed"
      raise pa.ArrowInvalid(f"{limit}, expected at most {_LARGE:,}")
    place += compressed
    if _DICTIONARY in header:
      found = found._replace(dictionary=max(found.dictionary, size))
    data = header.get(_DATA) or header.get(_DATA_V2) or {1: 0}
    count = _number(data, 1)
    left -= count
    if left < 0 or count < 0:
      raise pa.ArrowInvalid(f"the pages of {column.path_in_schema!r} have more values than the metadata say")
    if _number(data, 4 if _DATA_V2 in header else 2) == _DELTA_BYTE_ARRAY:
      found = found._replace(delta=max(found.delta, size))
  if left:
    raise pa.ArrowInvalid(f"the pages of {column.path_in_schema!r} lack {left:,} of {column.num_values:,} values")
  return found


def _number(fields: Any, field: int) -> int:
  """A number in a struct, -1 if there is none."""
  value = fields.get(field) if isinstance(fields, dict) else None
  return value if isinstance(value, int) else -1


def _header(stream: BinaryIO, place: int) -> tuple[dict[int, Any], int]:
  """Reads a header; returns its fields by number and the position after it."""
  length = _HEADER
  while True:
    stream.seek(place)
    data = stream.read(length)
    try:
      fields, size = _struct(data, 0)
      return fields, place + size
    except (IndexError, RecursionError):
      if len(data) < length or length >= _LARGEST_HEADER:
        raise pa.ArrowInvalid(f"the header of a page, at byte {place}, is damaged") from None
    length *= 8


def _struct(data: bytes, place: int) -> tuple[dict[int, Any], int]:
  fields, number = dict[int, Any](), 0
  while kind := data[place]:
    step, kind = kind >> 4, kind & 15
    if step:
      number, place = number + step, place + 1
    else:
      zigzag, place = _varint(data, place + 1)
      number = _signed(zigzag)
    fields[number], place = (kind == 1, place) if kind in (1, 2) else _value(data, place, kind)
  return fields, place + 1


def _value(data: bytes, place: int, kind: int) -> tuple[Any, int]:
  """Reads a value, and returns it with the position after it; texts, floats, lists and maps become None."""
  if kind in (1, 2, 3):  # in a list, a truth value takes a byte
    return data[place], place + 1
  if kind in (4, 5, 6):
    zigzag, place = _varint(data, place)
    return _signed(zigzag), place
  if kind == 7:
    return None, place + 8
  if kind == 12:
    return _struct(data, place)
  if kind == 8:
    length, place = _varint(data, place)
    return None, place + length
  if kind in (9, 10):
    size, kinds = data[place] >> 4, (data[place] & 15,)
    size, place = _varint(data, place + 1) if size == 15 else (size, place + 1)
  elif kind == 11:
    size, place = _varint(data, place)
    kinds, place = ((data[place] >> 4, data[place] & 15), place + 1) if size else ((), place)
  else:
    raise IndexError(kind)
  for _ in range(size):
    for inner in kinds:
      _, place = _value(data, place, inner)
  return None, place


def _varint(data: bytes, place: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[place]
    value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
    if byte < 128:
      return value, place
    if shift > 63:
      raise IndexError(shift)


def _signed(zigzag: int) -> int:
  return zigzag >> 1 ^ -(zigzag & 1)

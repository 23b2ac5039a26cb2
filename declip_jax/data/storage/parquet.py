"""Rows of Parquet files, read in bounded memory.

A dictionary stores a value once, however many rows have it, so that a small file may stand for any amount of data. The
columns of a row group with such values are therefore read as indices into their dictionaries, and a row is decoded only
if its values are small enough. Arrow has no indices for JSON and other kinds of text, and a page may also store only
the difference of a value from the one before: of such columns, fewer rows are read at once. Pages whose headers
announce too much are not decompressed at all.
"""

from collections.abc import Iterator, Sequence
import contextlib
import io
from typing import Any, BinaryIO

from declip_jax.data.storage import files, parquet_pages
from declip_jax.data.storage.bounded import LONGEST
from declip_jax.extras import pyarrow as pa
from declip_jax.extras import pyarrow_compute as pc
from declip_jax.extras import pyarrow_parquet as pq

_ROWS = 256  # per batch
_BYTES = 2**28  # of a batch, once decoded
_FEW_VALUES, _VALUES_PER_BYTE = 2**20, 16  # values that a column may have: at least, and for each byte of the file

Row = list[tuple[str, Any]]  # names of columns, of which several may have the same, and values


class Parquet:
  """An open Parquet file.

  Attributes:
    schema: its columns, and the metadata that came with them.

  Raises:
    OSError: it is not such a file, it is damaged, or it would take too much memory; also raised by `rows`.
    ModuleNotFoundError: pyarrow is not installed.
  """

  def __init__(self, stream: BinaryIO):
    with _plain_errors():
      self._open(stream)

  def _open(self, stream: BinaryIO) -> None:
    self._stream, self._file = stream, pq.ParquetFile(stream)
    self._most_values = _FEW_VALUES + _VALUES_PER_BYTE * stream.seek(0, io.SEEK_END)
    self._metadata = self._file.metadata
    columns = [self._metadata.schema.column(number) for number in range(self._metadata.num_columns)]
    # Arrow reads no other types as indices: a number or a decimal in a dictionary takes at most a few bytes.
    self._coded = [
      column.path
      for column in columns
      if column.physical_type == "BYTE_ARRAY" and column.logical_type.type in ("STRING", "NONE")
    ]
    self._indices = pq.ParquetFile(stream, metadata=self._metadata, read_dictionary=self._coded)
    self.schema: "pa.Schema" = self._file.schema_arrow

  def rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
    """Yields names and values of some columns, row by row, or a message for a row whose values are too large."""
    with _plain_errors():
      yield from self._read(columns)

  def _read(self, columns: Sequence[str]) -> Iterator[Row | str]:
    for group in range(self._metadata.num_row_groups):
      about = self._metadata.row_group(group)
      if about.num_rows > self._most_values:
        raise pa.ArrowInvalid(f"{about.num_rows:,} rows, expected at most {self._most_values:,}")
      chunks = [about.column(number) for number in range(about.num_columns)]
      used = {chunk.path_in_schema: chunk for chunk in chunks if _is_used(chunk.path_in_schema, columns)}
      pages = {path: parquet_pages.inspect(self._stream, used[path], self._most_values) for path in used}
      count = min(self._most_rows(used[path], found) for path, found in pages.items()) if pages else _ROWS
      count = min(count, _BYTES // max(1, about.total_byte_size // max(1, about.num_rows))) or 1
      may_grow = any(self._may_grow(group, used[path], found.dictionary) for path, found in pages.items())
      file = self._indices if may_grow else self._file
      for batch in file.iter_batches(count, row_groups=[group], columns=columns):
        yield from _rows(batch)

  def _may_grow(self, group: int, chunk: Any, dictionary: int) -> bool:
    """Whether a dictionary of so many bytes has values that would not fit into memory if all rows had them."""
    path = chunk.path_in_schema
    most = max(_ROWS, chunk.num_values) if "." in path else _ROWS  # a single row may have all values of a list
    if path not in self._coded or dictionary * most <= _BYTES:
      return False
    first = next(self._indices.iter_batches(1, row_groups=[group], columns=[path]), None)
    return first is not None and max(map(_longest, first.columns), default=0) * most > _BYTES

  def _most_rows(self, chunk: Any, pages: parquet_pages.Pages) -> int:
    """How many rows of a column can be decoded at once, if all have the longest value that its pages can have.

    Raises:
      pa.ArrowInvalid: not even one, since it may have a list of these values.
    """
    path = chunk.path_in_schema
    if "BYTE_ARRAY" not in chunk.physical_type:  # but a number
      return _ROWS
    longest = pages.delta if path in self._coded else max(pages)
    size = longest * chunk.num_values if "." in path else longest
    if size > _BYTES and "." in path:
      raise pa.ArrowInvalid(f"lists in {path!r} may repeat a value of {longest:,} bytes; write it without a dictionary")
    return min(_ROWS, _BYTES // max(1, size)) or 1


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
  """Turns Arrow's own errors into OSErrors without a number, so that callers need not know Arrow."""
  try:
    yield
  except pa.ArrowException as error:
    raise OSError(str(error)) from error


def _is_used(path: str, columns: Sequence[str]) -> bool:
  return path in columns or path.partition(".")[0] in columns


def _rows(batch: "pa.RecordBatch") -> Iterator[Row | str]:
  sizes = [_size(column) for column in batch.columns]
  if batch.num_rows > 1 and sum(sizes) > _BYTES:
    for number in range(batch.num_rows):
      yield from _rows(batch.slice(number, 1))
    return
  names = batch.schema.names
  for name, column, size in zip(names, batch.columns, sizes, strict=True):
    most = LONGEST if _is_text(column.type) else files.MAX_BYTES
    if batch.num_rows == 1 and size > most:
      yield f"{size:,} bytes in {name!r}, expected at most {most:,}"
      return
  for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
    yield list(zip(names, values, strict=True))


def _is_text(kind: "pa.DataType") -> bool:
  """Whether a column has texts or lists of them."""
  while pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
    kind = kind.value_type
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _parts(array: "pa.Array") -> "list[pa.Array]":
  """The arrays that a struct, a list or a map consists of; none for other arrays."""
  if pa.types.is_struct(array.type):
    return array.flatten()
  if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
    return [array.flatten()]
  if pa.types.is_map(array.type):
    return [array.keys, array.items]
  return []


def _longest(array: "pa.Array") -> int:
  """Bytes of the longest value in the dictionaries of an array."""
  if pa.types.is_dictionary(array.type):
    return pc.max(pc.binary_length(array.dictionary)).as_py() or 0
  return max(map(_longest, _parts(array)), default=0)


def _size(array: "pa.Array") -> int:
  """Bytes of an array once its dictionaries are replaced by values."""
  if pa.types.is_dictionary(array.type):
    lengths = pc.binary_length(array.dictionary).cast(pa.int64())
    return pc.sum(lengths.take(array.indices)).as_py() or 0
  parts = _parts(array)
  return sum(map(_size, parts)) if parts else array.nbytes

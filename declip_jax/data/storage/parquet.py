"""Rows of Parquet files, read in bounded memory.

A dictionary stores a value once, however many rows have it, so that a small file may stand for any amount of data. The
columns of a row group with such values are therefore read as indices into their dictionaries, and a row is decoded only
if its values are small enough.
"""

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from declip_jax.data.storage import files
from declip_jax.data.storage.bounded import LONGEST

_ROWS = 256  # per batch
_BYTES = 2**28  # of a batch, once decoded

Row = list[tuple[str, Any]]  # names of columns, of which several may have the same, and values


class Parquet:
  """An open Parquet file.

  Attributes:
    schema: its columns, and the metadata that came with them.

  Raises:
    pa.ArrowException, OSError: it is not such a file, or it is damaged; also raised by `rows`.
  """

  def __init__(self, stream: BinaryIO):
    self._file = pq.ParquetFile(stream)
    self._metadata = self._file.metadata
    columns = [self._metadata.schema.column(number) for number in range(self._metadata.num_columns)]
    # Arrow reads no other types as indices: a number or a decimal in a dictionary takes at most a few bytes.
    self._coded = [
      (number, column.path)
      for number, column in enumerate(columns)
      if column.physical_type == "BYTE_ARRAY" and column.logical_type.type in ("STRING", "NONE")
    ]
    paths = [path for _, path in self._coded]
    self._indices = pq.ParquetFile(stream, metadata=self._metadata, read_dictionary=paths)
    self.schema: pa.Schema = self._file.schema_arrow

  def rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
    """Yields names and values of some columns, row by row, or a message for a row whose values are too large."""
    for group in range(self._metadata.num_row_groups):
      file = self._indices if self._may_grow(group, columns) else self._file
      size = self._metadata.row_group(group).total_byte_size // max(1, self._metadata.row_group(group).num_rows)
      for batch in file.iter_batches(min(_ROWS, _BYTES // max(1, size)) or 1, row_groups=[group], columns=columns):
        yield from _rows(batch)

  def _may_grow(self, group: int, columns: Sequence[str]) -> bool:
    """Whether the dictionaries of a row group have values that would not fit into memory if all rows had them."""
    for number, path in self._coded:
      chunk = self._metadata.row_group(group).column(number)
      if path.partition(".")[0] not in columns and path not in columns:
        continue
      most = max(_ROWS, chunk.num_values) if "." in path else _ROWS  # a single row may have all values of a list
      if chunk.total_uncompressed_size * most <= _BYTES:
        continue
      first = next(self._indices.iter_batches(1, row_groups=[group], columns=[path]), None)
      if first is not None and max(map(_longest, first.columns), default=0) * most > _BYTES:
        return True
    return False


def _rows(batch: pa.RecordBatch) -> Iterator[Row | str]:
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


def _is_text(kind: pa.DataType) -> bool:
  """Whether a column has texts or lists of them."""
  while pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
    kind = kind.value_type
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _parts(array: pa.Array) -> list[pa.Array]:
  """The arrays that a struct, a list or a map consists of; none for other arrays."""
  if pa.types.is_struct(array.type):
    return array.flatten()
  if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
    return [array.flatten()]
  if pa.types.is_map(array.type):
    return [array.keys, array.items]
  return []


def _longest(array: pa.Array) -> int:
  """Bytes of the longest value in the dictionaries of an array."""
  if pa.types.is_dictionary(array.type):
    return pc.max(pc.binary_length(array.dictionary)).as_py() or 0
  return max(map(_longest, _parts(array)), default=0)


def _size(array: pa.Array) -> int:
  """Bytes of an array once its dictionaries are replaced by values."""
  if pa.types.is_dictionary(array.type):
    lengths = pc.binary_length(array.dictionary).cast(pa.int64())
    return pc.sum(lengths.take(array.indices)).as_py() or 0
  parts = _parts(array)
  return sum(map(_size, parts)) if parts else array.nbytes

"""Records of TFRecord files, found without reading their data.

A record is the length of its data in bytes, 64 bits, the checksum of these 8 bytes, the data, and their checksum; all
numbers are little-endian. A checksum is a masked CRC-32C (TensorFlow, tensorflow/core/lib/io/record_writer.h and
tensorflow/core/lib/hash/crc32c.h).
"""

from collections.abc import Iterator
from functools import cache
import struct
from typing import BinaryIO

from jaxtyping import UInt32
import numpy as np

from declip_jax.data.storage import files

_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<L")
_HEADER = _LENGTH.size + _CHECKSUM.size
_POLYNOMIAL = 0x82F63B78  # of Castagnoli, with the bits of a byte in reverse
_ONES = 0xFFFFFFFF
_MASK = 0xA282EAD8
_BLOCK = 1024  # bytes whose parts of a checksum are looked up at once
_PIECE = 2**18  # bytes that are looked up in one call, for bounded memory
_GZIP = b"\x1f\x8b"


def spans(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
  """Yields the start and the stop of each record, its length and checksums included, in bytes.

  Args:
    file: the TFRecord file.
    size: its size in bytes.

  Raises:
    ValueError: the file ends within a record, or a length is damaged, so that nothing after it can be found.
  """
  start = 0
  while start < size:
    file.seek(start)
    header = file.read(_HEADER)
    if header.startswith(_GZIP) and not start:
      raise ValueError("byte 0: compressed with gzip, which has to be read from its start; decompress it")
    if len(header) < _HEADER:
      raise ValueError(f"byte {start}: cut off within the length of a record")
    if not _is_intact(header[: _LENGTH.size], header[_LENGTH.size :]):
      hint = "is it damaged or compressed?" if start else "not a TFRecord file, or compressed?"
      raise ValueError(f"byte {start}: the length of a record does not match its checksum; {hint}")
    (length,) = _LENGTH.unpack_from(header)
    stop = start + _HEADER + length + _CHECKSUM.size
    if stop > size:
      raise ValueError(f"byte {start}: cut off within a record of {length:,} bytes")
    yield start, stop
    start = stop


def read(path: str, start: int, stop: int) -> bytes:
  """Reads the data of a record.

  Args:
    path: path or URL of the file.
    start: the start of the record, see `spans`.
    stop: the stop of the record.

  Raises:
    ValueError: the record is damaged, or the file changed since its records were found.
    OSError: the file cannot be read, or the record is larger than `files.MAX_BYTES`.
  """
  record = files.read(path, start, stop - start)
  length = stop - start - _HEADER - _CHECKSUM.size
  if record[: _LENGTH.size] != _LENGTH.pack(length) or len(record) < stop - start:
    raise ValueError("the file changed since it was indexed, open it again")
  data = record[_HEADER : -_CHECKSUM.size]
  if not _is_intact(data, record[-_CHECKSUM.size :]):
    raise ValueError("the data do not match their checksum")
  return data


def masked_checksum(data: bytes) -> int:
  """The masked CRC-32C of bytes."""
  crc = _crc32c(data)
  return ((crc >> 15 | crc << 17) + _MASK) & _ONES


def _is_intact(data: bytes, checksum: bytes) -> bool:
  return checksum == _CHECKSUM.pack(masked_checksum(data))


def _crc32c(data: bytes) -> int:
  """The CRC-32C of bytes. Of long ones many are looked up at once, or it would take as long as decoding an image."""
  tables, first = _tables()
  if len(data) < _BLOCK:
    state, last = _ONES, first[-1]
    for byte in data:
      state = last[(state ^ byte) & 255] ^ state >> 8
    return state ^ _ONES
  # A state is a sum, without carries, of the parts of single bytes. Zeros before the data have no part in it if the
  # first state is 0; that it is all ones is the same as if the first four bytes were inverted.
  padded = np.zeros(-(-len(data) // _BLOCK) * _BLOCK, np.uint8)
  padded[-len(data) :] = np.frombuffer(data, np.uint8)
  padded[len(padded) - len(data) :][:4] ^= 255
  state = 0
  places = np.arange(_BLOCK) * 256
  for piece in (padded[start : start + _PIECE] for start in range(0, len(padded), _PIECE)):
    parts = tables.take(piece.reshape(-1, _BLOCK) + places)
    for part in np.bitwise_xor.reduce(parts, axis=1).tolist():
      state = first[0][state & 255] ^ first[1][state >> 8 & 255] ^ first[2][state >> 16 & 255] ^ first[3][state >> 24]
      state ^= part
  return state ^ _ONES


@cache
def _tables() -> tuple[UInt32[np.ndarray, "n"], list[list[int]]]:
  """The parts of the state after a block that the values 0 to 255 of each of its bytes have.

  Returns:
    All of them, one byte of the block after the other, and those of bytes 0 to 3 and of the last byte as lists.
  """
  last = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    last = last >> 1 ^ (last & 1) * np.uint32(_POLYNOMIAL)
  rows = [last]
  for _ in range(_BLOCK - 1):
    rows.append(rows[-1] >> 8 ^ last[rows[-1] & 255])  # as if one more zero followed
  rows.reverse()
  return np.concatenate(rows), [row.tolist() for row in (*rows[:4], last)]

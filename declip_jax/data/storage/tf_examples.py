"""Features of serialised tf.train.Example messages, in memory that is bounded by the size of the message.

The messages (TensorFlow, tensorflow/core/example/example.proto and feature.proto), in the encoding of Protocol Buffers
(protobuf.dev/programming-guides/encoding):

| message | fields |
|---|---|
| Example | 1: Features |
| Features | 1: any number of entries |
| entry | 1: key, a text; 2: Feature |
| Feature | one of 1: BytesList, 2: FloatList, 3: Int64List |
| a list | 1: its values; numbers may be packed |

Unknown fields are passed over, except in entries. Unlike the libraries of Protocol Buffers, this rejects messages that
define a feature twice, which no writer does.
"""

from collections.abc import Iterator
from typing import NamedTuple

START = b"\n"  # of any message: the tag of Features
_MOST = 100_000  # features of a message, values of a feature
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_VARINT: 0, _FIXED64: 8, _BYTES: 0, _FIXED32: 4}  # bytes; of a varint and of bytes it varies
_LONGEST_VARINT = 10  # bytes
_KINDS = {1: "bytes", 2: "floats", 3: "integers"}


class Feature(NamedTuple):
  """The values of a feature, which `values` reads.

  Attributes:
    kind: "bytes", "floats" or "integers".
    listed: the message with the values.
  """

  kind: str
  listed: memoryview


def features(message: bytes) -> dict[str, Feature]:
  """Returns the features of an Example by key; one without a list is left out.

  Raises:
    ValueError: not an Example, or it has more than 100,000 features.
  """
  found, lists = dict[str, Feature](), list[memoryview]()
  for number, kind, value in _fields(memoryview(message)):
    if number == 1:
      lists.append(_bytes(kind, value, "features"))
  if len(lists) != 1:
    raise ValueError(f"not a tf.train.Example: expected features once, got them {len(lists)} times")
  for number, kind, entry in _fields(lists[0]):
    if number != 1:
      continue
    key, feature = _entry(_bytes(kind, entry, "a feature"))
    if key in found:
      raise ValueError(f"the feature {key[:80]!r} is defined twice")
    if feature is not None:
      found[key] = feature
  return found


def values(feature: Feature) -> list[bytes] | list[int]:
  """Returns the values of a feature of bytes or integers.

  Raises:
    ValueError: they are floats, more than 100,000, or cut off.
  """
  if feature.kind == "floats":
    raise ValueError("expected bytes or integers, got floats")
  found = []
  for number, kind, value in _fields(feature.listed):
    if number != 1:
      continue
    if feature.kind == "bytes":
      found.append(bytes(_bytes(kind, value, "a value")))
    elif kind == _VARINT and isinstance(value, int):
      found.append(_signed(value))
    else:
      found += _unpacked(_bytes(kind, value, "an integer"))
    if len(found) > _MOST:
      raise ValueError(f"more than {_MOST:,} values")
  return found


def _entry(entry: memoryview) -> tuple[str, Feature | None]:
  """The key and the feature of an entry; None for a feature without a list."""
  parts: dict[int, memoryview] = {}
  for number, kind, value in _fields(entry):
    if number not in (1, 2) or number in parts:
      raise ValueError("not a tf.train.Example: expected one key and one value for a feature")
    parts[number] = _bytes(kind, value, "a key or a feature")
  if 1 not in parts:
    raise ValueError("not a tf.train.Example: a feature has no key")
  key = bytes(parts[1]).decode()
  found = None
  for number, kind, value in _fields(parts.get(2, memoryview(b""))):
    if number in _KINDS:
      if found is not None:
        raise ValueError(f"the feature {key[:80]!r} has two lists")
      found = Feature(_KINDS[number], _bytes(kind, value, "a list"))
  return key, found


def _fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
  """Yields number, kind and value of each field of a message."""
  place = count = 0
  while place < len(message):
    count += 1
    if count > _MOST:
      raise ValueError(f"more than {_MOST:,} features or values")
    tag, place = _varint(message, place)
    number, kind = tag >> 3, tag & 7
    if not 0 < number < 2**29 or kind not in _SIZES:
      raise ValueError(f"not a tf.train.Example: no field has the tag {tag}")
    if kind == _VARINT:
      value, place = _varint(message, place)
    else:
      size = _SIZES[kind]
      if kind == _BYTES:
        size, place = _varint(message, place)
      value = message[place : place + size]
      if len(value) < size:
        raise ValueError(f"cut off within a field of {size:,} bytes")
      place += size
    yield number, kind, value


def _varint(message: memoryview, place: int) -> tuple[int, int]:
  """The unsigned number of 64 bits at a place, and the place after it."""
  number = 0
  for position, byte in enumerate(message[place : place + _LONGEST_VARINT]):
    number |= (byte & 127) << 7 * position
    if byte < 128:
      return number % 2**64, place + position + 1
  raise ValueError("cut off within a number, or a number of more than 64 bits")


def _unpacked(packed: memoryview) -> Iterator[int]:
  place = 0
  for _ in range(_MOST + 1):
    if place == len(packed):
      return
    number, place = _varint(packed, place)
    yield _signed(number)


def _signed(number: int) -> int:
  return number - 2**64 if number >= 2**63 else number


def _bytes(kind: int, value: int | memoryview, name: str) -> memoryview:
  if kind != _BYTES or isinstance(value, int):
    raise ValueError(f"not a tf.train.Example: expected bytes for {name}")
  return value

"""Messages of tf.train.Example as TFDS defines them, and TFRecord files as tensorboardX writes them."""

from collections.abc import Iterable
from pathlib import Path

from tensorboardX.record_writer import RecordWriter
from tensorflow_datasets.proto import tf_example_generated_pb2

Values = str | bytes | int | float | list[str] | list[bytes] | list[int] | list[float]


def message(**features: Values) -> bytes:
  """The Example with these features; __ in a key stands for a slash."""
  example = tf_example_generated_pb2.Example()
  for key, values in features.items():
    listed = values if isinstance(values, list) else [values]
    feature = example.features.feature[key.replace("__", "/")]
    if all(isinstance(value, int) for value in listed):
      feature.int64_list.value.extend(listed)
    elif all(isinstance(value, float) for value in listed):
      feature.float_list.value.extend(listed)
    else:
      feature.bytes_list.value.extend(value.encode() if isinstance(value, str) else value for value in listed)
  return example.SerializeToString(deterministic=True)


def parsed(data: bytes) -> dict[str, list[bytes] | list[int] | None]:
  """The features of a message as the library of Protocol Buffers reads them; None for a list of floats.

  Raises:
    google.protobuf.message.DecodeError: it is not a message.
  """
  found = {}
  for key, feature in tf_example_generated_pb2.Example.FromString(data).features.feature.items():
    if kind := feature.WhichOneof("kind"):
      found[key] = None if kind == "float_list" else list(getattr(feature, kind).value)
  return found


def unpacked(key: str, values: Iterable[int]) -> bytes:
  """An Example with a feature of integers that are not packed, as older writers may write them."""
  listed = b"".join(b"\x08" + _varint(value) for value in values)
  feature = _field(3, listed)
  return _field(1, _field(1, _field(1, key.encode()) + _field(2, feature)))


def write(path: Path, messages: Iterable[bytes]) -> Path:
  """Writes a TFRecord file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  writer = RecordWriter(str(path))
  for data in messages:
    writer.write(data)
  writer.close()
  return path


def _field(number: int, value: bytes) -> bytes:
  return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
  value %= 2**64
  found = bytearray()
  while value > 127:
    found.append(value & 127 | 128)
    value >>= 7
  return bytes([*found, value])

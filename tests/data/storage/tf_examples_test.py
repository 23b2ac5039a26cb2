import tracemalloc

from google.protobuf.message import DecodeError
import numpy as np
import pytest
import tf_files

from declip_jax.data.storage import tf_examples

MUTATIONS = 20_000


def read(data: bytes) -> dict[str, list[bytes] | list[int] | None]:
  """As `tf_files.parsed`."""
  found = tf_examples.features(data)
  return {key: None if feature.kind == "floats" else tf_examples.values(feature) for key, feature in found.items()}


MESSAGES = (
  tf_files.message(image=bytes(300), caption="two cats", label=7, box=[0.25, 0.5]),
  tf_files.message(jpg=b"\xff\xd8", captions=["one", "", "dög"], ids=[0, 127, 128, -1, 2**63 - 1, -(2**63)], width=640),
  tf_files.unpacked("label", [5, -3, 300]),
  tf_files.message(),
)


@pytest.mark.parametrize("data", MESSAGES)
def test_equals_the_library_of_protocol_buffers(data):
  # An Example without features may also be empty, which is not one here: no record of a data set is.
  assert read(data or b"\n\0") == tf_files.parsed(data)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
  changed, place = bytearray(data), int(rng.integers(len(data)))
  way, length = rng.integers(6), int(rng.integers(1, 12))
  if way == 0:
    changed[place] ^= 1 << rng.integers(8)
  elif way == 1:
    changed[place] = rng.choice([0, 1, 2, 8, 10, 18, 26, 127, 128, 255])
  elif way == 2:
    del changed[place:]
  elif way == 3:
    del changed[place : place + length]
  elif way == 4:
    changed[place:place] = changed[place // 2 : place // 2 + length]
  else:
    changed[place : place + length] = rng.bytes(length)
  return bytes(changed)


def test_mutated_messages_are_read_as_by_that_library_or_are_errors():
  rng, read_alike = np.random.default_rng(0), 0
  for number in range(MUTATIONS):
    data = mutated(MESSAGES[number % 3], rng)
    try:
      found = read(data)
    except ValueError:
      continue
    try:
      expected = tf_files.parsed(data)
    except DecodeError:
      # The values of floats are not looked at here, and unknown fields only for where they end.
      continue
    assert found == expected, data
    read_alike += 1
  assert read_alike > MUTATIONS / 10


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"no message",
    MESSAGES[0] * 2,
    MESSAGES[0][:-1],
    b"\x0a\xff\xff\xff\xff\x7f",
    b"\x0b",
    b"\x80" * 11,
    b"\n\2\x0a\5",
  ],
)
def test_what_is_not_an_example_is_an_error(data):
  with pytest.raises(ValueError, match=r"not a tf\.train\.Example|cut off"):
    tf_examples.features(data)


def test_a_feature_that_is_defined_twice_is_an_error():
  inner = tf_files.unpacked("label", [5])[2:]
  with pytest.raises(ValueError, match="'label' is defined twice"):
    tf_examples.features(b"\n" + bytes([2 * len(inner)]) + 2 * inner)


def test_hostile_messages_are_not_read_to_their_end(monkeypatch):
  monkeypatch.setattr(tf_examples, "_MOST", 1000)
  count = 100_000
  messages = [
    tf_files.message(captions=[b""] * count),
    tf_files.message(label=[1] * count),
    tf_files.unpacked("label", [0] * count),
    tf_files.message(label=1) + b"\x10\0" * count,  # unknown fields
  ]
  tracemalloc.start()
  for message in messages:
    with pytest.raises(ValueError, match="more than 1,000 (features|values)"):
      read(message)
  assert tracemalloc.get_traced_memory()[1] < 2**20
  tracemalloc.stop()

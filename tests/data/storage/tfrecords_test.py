import io

import numpy as np
import pytest
from tensorboardX.record_writer import masked_crc32c
import tf_files

from declip_jax.data.storage import tfrecords

RECORDS = [b"first", b"", bytes(range(256)) * 9, b"last"]


def test_checksums_equal_those_of_another_implementation():
  rng = np.random.default_rng(0)
  for size in (0, 1, 3, 4, 1023, 1024, 1025, 5000, 2**18 - 1, 2**18, 2**18 + 1025):
    data = rng.bytes(size)
    assert tfrecords.masked_checksum(data) == masked_crc32c(data)


def test_records_are_found_and_read(tmp_path):
  path = tf_files.write(tmp_path / "a.tfrecord", RECORDS)
  whole = path.read_bytes()
  spans = list(tfrecords.spans(io.BytesIO(whole), len(whole)))
  assert [stop for _, stop in spans] == [*(start for start, _ in spans[1:]), len(whole)]
  assert [tfrecords.read(str(path), *span) for span in spans] == RECORDS
  # Each bit of a record is covered by a checksum.
  start, stop = spans[-1]
  for place in range(start, stop):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    if place not in range(start + 8, start + 12):  # the checksum of the length, which is known
      with pytest.raises(ValueError, match="checksum|changed since"):
        tfrecords.read(str(path), start, stop)


def test_damage_ends_the_records_and_is_named(tmp_path):
  whole = tf_files.write(tmp_path / "a.tfrecord", RECORDS).read_bytes()
  last = list(tfrecords.spans(io.BytesIO(whole), len(whole)))[-1][0]
  for kept in range(last + 1, len(whole)):
    found = []
    with pytest.raises(ValueError, match=f"^byte {last}: cut off"):
      found.extend(tfrecords.spans(io.BytesIO(whole[:kept]), kept))
  for place in range(last, last + 12):
    changed, found = bytearray(whole), []
    changed[place] ^= 1
    with pytest.raises(ValueError, match=f"^byte {last}: the length"):
      found.extend(tfrecords.spans(io.BytesIO(changed), len(changed)))
    assert len(found) == len(RECORDS) - 1

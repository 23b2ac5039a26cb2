import io
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_jax.data.storage import parquet_pages
from declip_jax.data.storage.parquet_pages import Pages, inspect

TEXTS = [f"text {number}" for number in range(2000)]


def pages(**how: object) -> Pages:
  """What the pages of a column of `TEXTS` have if they are written in some way."""
  file = io.BytesIO()
  pq.write_table(pa.table({"text": TEXTS}), file, data_page_size=1000, write_batch_size=100, **how)
  return inspect(file, pq.ParquetFile(file).metadata.row_group(0).column(0), 2000)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_sizes_of_dictionaries_and_of_differences(version: str, compression: str) -> None:
  how = {"data_page_version": version, "compression": compression}
  assert pages(**how) == Pages(sum(4 + len(text) for text in TEXTS), 0)
  assert pages(**how, use_dictionary=False) == Pages(0, 0)
  found = pages(**how, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
  assert found.dictionary == 0
  assert 200 < found.delta < 5000


def column(**fields: object) -> SimpleNamespace:
  about = {"data_page_offset": 0, "has_dictionary_page": False, "total_compressed_size": 100, "num_values": 9}
  return SimpleNamespace(**about, path_in_schema="text", **fields)


@pytest.mark.parametrize(
  "header",
  [
    b"",
    b"\x00",  # without sizes
    b"\x15\x00\x18\x02ab\x15\x02\x00",  # a text as size
    b"\x15\x00\x15\x02\x1c\x00\x00",  # a struct as compressed size
    b"\x15\x00\x15\x01\x15\x00\x00",  # a negative size
    b"\x15\x00\x15\x02\x15\x02\x28\x01a\x00",  # a text as header of the data
    b"\x15\x00\x15\x02\x15\x02\x2c\x15\x40\x00\x00",  # 32 values of 9
    b"\x15\x00\x15\x02\x15\xff\xff\x03\x2c\x15\x02\x00\x00",  # longer than the column
    b"\x19\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a list of very many structs
    b"\x15\x00\x15" + b"\xff" * 40,  # a number without end
    b"\x1c" * 3000,  # structs within structs
    b"\x15\x02" * 2**19,  # fields without end
    b"\x1f\x00",  # an unknown type
  ],
)
def test_damaged_headers_are_errors(header: bytes) -> None:
  with pytest.raises(pa.ArrowInvalid, match="page"):
    inspect(io.BytesIO(header), column(), 9)


def test_every_damage_of_a_byte_is_an_error_or_harmless() -> None:
  file = io.BytesIO()
  pq.write_table(pa.table({"text": TEXTS[:20]}), file, compression="none")
  chunk, data = pq.ParquetFile(file).metadata.row_group(0).column(0), file.getvalue()
  stop = chunk.dictionary_page_offset + chunk.total_compressed_size
  for place in range(chunk.dictionary_page_offset, stop):
    for byte in (0, 1, 0x7F, 0x80, 0xFF):
      damaged = io.BytesIO(data[:place] + bytes([byte]) + data[place + 1 :])
      try:
        found = inspect(damaged, chunk, 20)
      except pa.ArrowInvalid:
        continue
      assert 0 <= max(found) <= parquet_pages._LARGE


@pytest.mark.parametrize("field", ["data_page_offset", "num_values", "total_compressed_size"])
def test_negative_numbers_in_the_metadata_are_an_error(field: str) -> None:
  about = column()
  setattr(about, field, -5)
  with pytest.raises(pa.ArrowInvalid, match="negative"):
    inspect(io.BytesIO(b"0" * 500), about, 9)


def test_more_values_than_expected_are_an_error() -> None:
  with pytest.raises(pa.ArrowInvalid, match="9 values of 'text', expected at most 8"):
    inspect(io.BytesIO(), column(), 8)

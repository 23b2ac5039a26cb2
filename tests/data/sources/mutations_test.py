"""20,000 mutations of lists of samples: the records next to a mutated one keep their values, or the error is clear."""

from collections.abc import Callable
import contextlib
import gzip
import io
import json
import os
from pathlib import Path
import pickle
import resource
import shutil
import time
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_jax.data.sources import BadSample, Example, open_source

pytestmark = pytest.mark.slow

RECORDS = 12
SECONDS, MEMORY = 1.0, 2**28  # for each mutation; bytes above those before all of them
MUTATIONS = 2500  # of each of eight forms
ODD = [
  b'"',
  b"'",
  b"\\",
  b",",
  b"\t",
  b"\n",
  b"\r",
  b"\r\n",
  b"\0",
  b"{",
  b"}",
  b"[",
  b"]",
  b":",
  b"\xff",
  b"\xef\xbb\xbf",
]
ODD += [b'""', b"\\u0000", b"\\ud800", b"9" * 5000, b"-1", b"1e999", b"NaN", b"null", b"[" * 100_000, b'"' * 10_000]
ODD += [b"x" * 600_000, b'{"":' * 50_000, b"../", b"/dev/zero", b"https://a.b/", b"\xe2\x80\xa8", b"," * 70_000]


def caption(number: int) -> str:
  return f'picture {number} of a 27" screen, "new"' if number % 3 else f"picture {number} of a dög"


def name(number: int) -> str:
  return f"image{number:02d}.jpg"


def csv_lines() -> list[bytes]:
  quoted = (caption(number).replace('"', '""') for number in range(RECORDS))
  lines = [f'{name(number)},"{text}",{number}' for number, text in enumerate(quoted)]
  return [line.encode() + b"\n" for line in ["image,caption,label", *lines]]


def tsv_lines() -> list[bytes]:
  lines = [f"{name(number)}\t{caption(number)}" for number in range(RECORDS)]
  return [line.encode() + b"\n" for line in ["filepath\ttitle", *lines]]


def record(number: int) -> bytes:
  fields = {"image": name(number), "caption": [caption(number)], "label": number, "box": {"x": [1, 2.5, None]}}
  return json.dumps(fields).encode()


def json_lines() -> list[bytes]:
  return [b"\n", *(record(number) + b"\n" for number in range(RECORDS))]


def json_array() -> list[bytes]:
  return [b"[\n", *(record(number) + b",\n" for number in range(RECORDS - 1)), record(RECORDS - 1) + b"]"]


def coco() -> list[bytes]:
  images = [{"id": number, "file_name": name(number)} for number in range(RECORDS)]
  notes = [{"image_id": number, "caption": caption(number)} for number in range(RECORDS)]
  return [json.dumps({"images": images, "annotations": notes}).encode()]


def parquet() -> list[bytes]:
  rows = [{"image": name(number), "caption": caption(number), "label": number} for number in range(RECORDS)]
  file = io.BytesIO()
  pq.write_table(pa.Table.from_pylist(rows), file)
  return [file.getvalue()]


def pickled() -> list[bytes]:
  return [pickle.dumps([(number, caption(number), None) for number in range(RECORDS)])]


def compressed() -> list[bytes]:
  return [gzip.compress(b"".join(csv_lines()))]


# The name of a file in each form, its parts, and whether the parts after the first are independent records.
FORMS: dict[str, tuple[str, Callable[[], list[bytes]], bool]] = {
  "csv": ("table:t.csv", csv_lines, True),
  "tsv": ("table:t.tsv", tsv_lines, True),
  "jsonl": ("table:t.jsonl", json_lines, True),
  "array": ("table:t.json", json_array, False),
  "gzip": ("table:t.csv.gz", compressed, False),
  "parquet": ("table:t.parquet", parquet, False),
  "coco": ("coco:t.json", coco, False),
  "yfcc": ("yfcc:t.pkl", pickled, False),
}


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
  """One to three changes: of a byte, an insertion, a deletion, a repetition or a cut."""
  for _ in range(rng.integers(1, 4)):
    first, last = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    match rng.integers(7):
      case 0:
        data = data[:first] + bytes([rng.integers(256)]) + data[first + 1 :]
      case 1 | 2:
        data = data[:first] + ODD[rng.integers(len(ODD))] + data[first:]
      case 3:
        data = data[:first] + data[min(last, first + 20) :]
      case 4:
        data = data[:last] + data[first:last] + data[last:]
      case 5:
        data = data[:first] + rng.bytes(rng.integers(1, 20)) + data[first:]
      case 6:
        data = data[:last]
  return data


def is_well_formed(example: Example) -> bool:
  texts = all(
    isinstance(text, str) and text == text.strip() and text and "\0" not in text for text in example["captions"]
  )
  return texts and isinstance(example["id"], str) and -1 <= example["label"] < 2**31


def outcome(spec: str) -> list[Example] | str:
  """The samples of a source that have an image, or the error with which it does not open."""
  try:
    source = open_source(spec)
  except (ValueError, OSError) as error:
    return str(error)
  found = []
  for index in range(len(source)):
    with contextlib.suppress(BadSample):
      found.append(source[index])
  return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
  """The images of the records, in files and in a zip."""
  caplog.set_level("ERROR")
  monkeypatch.setattr(os, "fsync", lambda descriptor: None)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "images" / "00").mkdir(parents=True)
  with zipfile.ZipFile(tmp_path / "images" / "00" / "000.zip", "w") as archive:
    for number in range(RECORDS):
      (tmp_path / name(number)).write_bytes(name(number).encode())
      archive.writestr(f"{number:03d}.jpg", name(number))
  return tmp_path


def mutated(parts: list[bytes], independent: bool, rng: np.random.Generator) -> tuple[bytes, int]:
  """A file with a mutation, and the number of the only part that it changes; -1 if others may change."""
  if not independent:
    return mutate(b"".join(parts), rng), -1
  changed = int(rng.integers(1, len(parts)))
  part = mutate(parts[changed], rng)
  part += b"" if part.endswith(b"\n") else b"\n"  # otherwise the next record changes too
  return b"".join([*parts[:changed], part, *parts[changed + 1 :]]), changed


@pytest.mark.parametrize("form", FORMS)
def test_mutated_lists_have_right_values_or_clear_errors(form: str, folder: Path) -> None:
  spec, make, independent = FORMS[form]
  path, parts = Path(spec.partition(":")[2]), make()
  before, opened = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
  for seed in range(MUTATIONS):
    data, changed = mutated(parts, independent, np.random.default_rng(seed))
    path.write_bytes(data)
    start = time.process_time()
    found = outcome(spec)
    assert time.process_time() - start < SECONDS, seed
    if isinstance(found, str):
      assert str(path) in found, seed
      assert "\n" not in found, seed
    else:
      opened += 1
      assert all(map(is_well_formed, found)), seed
      captions = {example["image"]: example["captions"] for example in found}
      for number in range(RECORDS) if changed >= 0 else ():
        assert number + 1 == changed or captions[name(number).encode()] == (caption(number),), (seed, number)
    shutil.rmtree(folder / ".declip_jax", ignore_errors=True)
  assert opened or form == "gzip"  # which has a checksum
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY

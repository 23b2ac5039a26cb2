"""Indexes with bits flipped, and pieces overwritten, moved, added or cut off: the right samples, within bounds."""

from collections.abc import Callable
import io
import os
from pathlib import Path
import resource
import tarfile
import time

from array_record.python import array_record_module
import numpy as np
from PIL import Image
import pytest
import tf_files

from declip_jax.data.sources import Source, open_source
from declip_jax.data.sources.arrayrecord import WRITER_OPTIONS, pack
from declip_jax.data.sources.base import Example

pytestmark = pytest.mark.slow
SAMPLES, MUTATIONS = 6, 5_000  # of each of four kinds of index: 20,000 in all
SECONDS, MEMORY = 1.0, 256 * 2**20  # bounds of one opening, and of all of them together


def picture(number: int) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
  return file.getvalue()


def webdataset(folder: Path) -> str:
  with tarfile.open(folder / "0.tar", "w") as tar:
    for number in range(SAMPLES):
      for suffix, content in (("png", picture(number)), ("txt", f"caption {number}".encode())):
        member = tarfile.TarInfo(f"{number}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
  return f"webdataset:{folder}/0.tar"


def table(folder: Path) -> str:
  for number in range(SAMPLES):
    (folder / f"{number}.png").write_bytes(picture(number))
  rows = [f"{number}.png,caption {number},{number % 3}" for number in range(SAMPLES)]
  (folder / "t.csv").write_text("\n".join(["image,caption,label", *rows]))
  return f"table:{folder}/t.csv"


def arrayrecord(folder: Path) -> str:
  writer = array_record_module.ArrayRecordWriter(str(folder / "a.array_record"), WRITER_OPTIONS)
  for number in range(SAMPLES):
    writer.write(pack(Example(image=picture(number), captions=(f"caption {number}",), label=number, id=str(number))))
  writer.close()
  return f"arrayrecord:{folder}/a.array_record"


def tfrecord(folder: Path) -> str:
  numbers = range(SAMPLES)
  messages = [tf_files.message(image=picture(number), caption=f"caption {number}", label=number) for number in numbers]
  return f"tfrecord:{tf_files.write(folder / 'a.tfrecord', messages)}"


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
  changed, place = bytearray(content), int(rng.integers(len(content)))
  length = int(rng.integers(1, 64))
  way = rng.integers(7)
  if way == 0:
    changed[place] ^= 1 << rng.integers(8)
  elif way == 1:
    changed[place : place + length] = rng.bytes(length)
  elif way == 2:
    changed[place : place + 8] = int(rng.choice([2**31 - 1, 2**62, 2**63 - 1])).to_bytes(8, "little")
  elif way == 3:
    del changed[place:]
  elif way == 4:
    del changed[place : place + length]
  elif way == 5:
    changed[place:place] = changed[place // 2 : place // 2 + length]
  else:
    changed[place : place + length] = bytes(length)
  return bytes(changed)


def contents(source: Source) -> list[tuple[bytes, tuple[str, ...], int]]:
  return [
    (bytes(example["image"]), example["captions"], example["label"])
    for example in map(source.__getitem__, range(len(source)))
  ]


@pytest.mark.parametrize("write", [webdataset, table, arrayrecord, tfrecord])
def test_no_damage_of_an_index_gives_other_samples(
  write: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(os, "fsync", lambda descriptor: None)
  spec, rng = write(tmp_path), np.random.default_rng(0)
  expected = contents(open_source(spec))
  (index,) = (tmp_path / ".declip_jax").iterdir()
  whole = index.read_bytes()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  for number in range(MUTATIONS):
    index.write_bytes(mutated(whole, rng))
    started = time.process_time()
    assert contents(open_source(spec)) == expected, number
    assert time.process_time() - started < SECONDS, number
    assert index.read_bytes() == whole, number
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY

"""10,000 damaged samples, in every way we could think of, among good ones, through all sources that read files."""

from collections import Counter
from collections.abc import Callable, Iterator
import hashlib
import io
import json
from pathlib import Path
import tarfile
import zipfile

import cv2
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_jax.data import convert, pipeline
from declip_jax.data.make_views import MakeViews, Rendering
from declip_jax.data.mixture import Mixture
from declip_jax.data.recipes import RECIPES
from declip_jax.data.sources import BAD, BadSample, Source, open_source
from declip_jax.data.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

SAMPLES = 2000  # of each of eight sources; some 10,000 of the 16,000 are damaged or odd
VIEWS = MakeViews(RECIPES["declip"], Tokenizer(24), Rendering(32))


def picture(rng: np.random.Generator) -> np.ndarray:
  height, width = rng.integers(1, 90, 2)
  return cv2.resize(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (int(width), int(height)))


def encoded(rng: np.random.Generator) -> bytes:
  """An image in one of many formats, most of them JPEG."""
  image, file = Image.fromarray(picture(rng)), io.BytesIO()
  kind = rng.choice(
    ["jpeg"] * 9 + ["gray", "cmyk", "png", "palette", "deep", "alpha", "gif", "webp", "bmp", "progressive"]
  )
  if kind in ("jpeg", "gray", "cmyk", "progressive"):
    mode = {"gray": "L", "cmyk": "CMYK"}.get(kind, "RGB")
    exif = Image.Exif()
    exif[274] = int(rng.integers(1, 9))
    image.convert(mode).save(
      file, "JPEG", quality=int(rng.integers(20, 98)), progressive=kind == "progressive", exif=exif
    )
  elif kind == "deep":
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(file, "PNG")
  elif kind == "gif":
    image.save(file, "GIF", save_all=True, append_images=[Image.fromarray(picture(rng)).resize(image.size)])
  else:
    mode = {"palette": "P", "alpha": "RGBA"}.get(kind, "RGB")
    image.convert(mode).save(file, {"webp": "WEBP", "bmp": "BMP"}.get(kind, "PNG"))
  return file.getvalue()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
  way = rng.integers(9)
  cut = int(rng.integers(len(data)))
  if way == 0:
    return b""
  if way == 1:
    return data[:cut]
  if way == 2:
    return data[cut:]
  if way == 3:
    return rng.bytes(int(rng.integers(1, 2000)))
  if way == 4:
    return bytes(len(data))
  if way == 5:
    return b"<html>404 not found</html>"
  if way == 6:
    return data + rng.bytes(50)
  changed = bytearray(data)
  for place in rng.integers(len(data), size=int(rng.integers(1, 30))):
    changed[place] = rng.integers(256)
  return bytes(changed)


def caption(rng: np.random.Generator, number: int) -> str:
  odd = [
    "",
    " \t",
    "word " * 10_000,
    "x" * 30_000,
    "\N{DOG FACE}" * 40,
    "\N{HEBREW LETTER ALEF} \u202e\N{ARABIC LETTER BEH}",
  ]
  odd += [
    "a\r\nb",
    '"',
    "'; drop table",
    "{}",
    "[1]",
    "<|endoftext|>",
    "&amp;&#0;",
    "a,b\tc;d|e",
    "\x07\x1b[0m",
    "\ufeffa",
  ]
  return str(rng.choice(odd)) if rng.random() < 0.45 else f"photo number {number} of a red dog"


def samples(seed: int) -> Iterator[tuple[str, bytes, str]]:
  """Name, image and caption of each sample."""
  rng = np.random.default_rng(seed)
  for number in range(SAMPLES):
    image = encoded(rng)
    yield f"{number:05d}", damaged(image, rng) if rng.random() < 0.3 else image, caption(rng, number)


def write_images(folder: Path, seed: int) -> list[tuple[str, str]]:
  """Files of images and, for one in fifty, none; names and captions."""
  folder.mkdir()
  listed = []
  for name, image, text in samples(seed):
    if int(name) % 50:
      (folder / f"{name}.jpg").write_bytes(image)
    listed.append((f"{name}.jpg", text))
  return listed


def webdataset(folder: Path, cut: bool = True) -> str:
  rng = np.random.default_rng(10)
  for part in range(5):
    with tarfile.open(folder / f"{part}.tar", "w") as tar:
      for name, image, text in samples(1):
        if int(name) % 5 != part:
          continue
        fields = {"jpg": image, "txt": text.encode("utf-8", "replace"), "json": json.dumps({"caption": text}).encode()}
        fields["cls"] = b"3" if rng.random() < 0.9 else damaged(b"3 ", rng)
        for suffix in fields:
          if rng.random() < 0.95:
            info = tarfile.TarInfo(f"{name}.{suffix}")
            info.size = len(fields[suffix])
            tar.addfile(info, io.BytesIO(fields[suffix]))
  if cut:
    whole = (folder / "3.tar").read_bytes()
    (folder / "3.tar").write_bytes(whole[: len(whole) * 2 // 3])
  return f"webdataset:{folder}/*.tar"


def arrayrecord(folder: Path) -> str:
  (folder / "shards").mkdir()
  spec = webdataset(folder / "shards", cut=False)
  convert.convert(spec, folder / "records", shards=4, workers=1)
  file = next((folder / "records").glob("data-00002*"))
  data = bytearray(file.read_bytes())
  for place in np.random.default_rng(2).integers(len(data) // 4, len(data) // 2, 20):
    data[place] ^= 0xFF
  file.write_bytes(data)
  return f"arrayrecord:{folder}/records/*.array_record"


def csv_table(folder: Path) -> str:
  rng = np.random.default_rng(30)
  lines = ["filepath;title"]
  for name, text in write_images(folder / "images", 3):
    line = f"{name};{text}"
    lines.append("\0" * 3 + line if rng.random() < 0.02 else line[: len(name) // 2] if rng.random() < 0.02 else line)
  (folder / "list.csv").write_text("\n".join(lines), encoding="utf-8", errors="replace")
  return f"table:{folder}/list.csv?root={folder}/images"


def json_lines(folder: Path) -> str:
  rng = np.random.default_rng(40)
  lines = []
  for number, (name, text) in enumerate(write_images(folder / "images", 4)):
    record = {"filename": name, "caption": [text, f"another of {name}"] if number % 3 else text, "label": number % 5}
    line = json.dumps({key: value for key, value in record.items() if rng.random() > 0.02})
    lines.append(line[: int(rng.integers(len(line)))] if rng.random() < 0.05 else line)
  (folder / "meta.jsonl").write_text("\n".join(lines))
  return f"table:{folder}/meta.jsonl?root={folder}/images"


def parquet(folder: Path) -> str:
  rows = [{"image": {"bytes": image, "path": name}, "text": text} for name, image, text in samples(5)]
  pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
  return f"table:{folder}/data.parquet"


def coco(folder: Path) -> str:
  listed = write_images(folder / "train2017", 6)
  images = [{"id": number, "file_name": name} for number, (name, _) in enumerate(listed)]
  notes = [{"image_id": number, "caption": text} for number, (_, text) in enumerate(listed)]
  (folder / "captions_train2017.json").write_text(json.dumps({"images": images, "annotations": notes + notes[:100]}))
  return f"coco:{folder}/captions_train2017.json"


def yfcc(folder: Path) -> str:
  rng, lines = np.random.default_rng(70), ["index\ttitle\tdescription"]
  (folder / "images" / "00").mkdir(parents=True)
  zips = [zipfile.ZipFile(folder / "images" / "00" / f"{part:03d}.zip", "w") for part in (0, 1)]
  for name, image, text in samples(7):
    if rng.random() > 0.02:
      zips[int(name[1])].writestr(f"{name[2:]}.jpg", image, zipfile.ZIP_DEFLATED if rng.random() < 0.5 else None)
    lines.append(f"{int(name)}\t{text}\tof {name}".replace("\r", "").replace("\n", ""))
  for file in zips:
    file.close()
  (folder / "list.tsv").write_text("\n".join(lines), encoding="utf-8", errors="replace")
  return f"yfcc:{folder}/list.tsv"


def folder_of_pairs(folder: Path) -> str:
  for name, text in write_images(folder / "all", 8):
    if int(name[:5]) % 11:
      (folder / "all" / f"{name[:5]}.txt").write_text(text, encoding="utf-8", errors="replace")
  return f"folder:{folder}/all"


KINDS = (webdataset, arrayrecord, csv_table, json_lines, parquet, coco, yfcc, folder_of_pairs)


def judge(source: Source, mixture: Mixture) -> list[str | None]:
  """The damage of each sample; the only legal results are a sample or a BadSample."""
  kinds = []
  for index in range(len(source)):
    try:
      row = VIEWS(mixture.read((0, index)), np.random.default_rng(index))
      assert row["image"].shape == (2, 32, 32, 3)
      assert (row["text"] == 49407).any(axis=1).all()
      kinds.append(None)
    except BadSample as error:
      kinds.append(error.kind)
  return kinds


def digest(rows: Iterator[dict[str, np.ndarray]]) -> str:
  hashed = hashlib.sha256()
  for row in rows:
    for name in sorted(row):
      hashed.update(np.ascontiguousarray(row[name]).tobytes())
  return hashed.hexdigest()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damaged_samples_are_counted_and_the_stream_continues(kind: Callable[[Path], str], tmp_path: Path) -> None:
  spec = kind(tmp_path)
  source = open_source(spec)
  mixture = Mixture((source,))
  assert len(source) > SAMPLES // 2
  kinds = judge(source, mixture)
  bad = Counter(filter(None, kinds))
  assert set(bad) <= set(BAD)
  assert 0.02 < bad.total() / len(source) < 0.6
  # A pass over the source reads each of its samples once; each bad one is replaced by another.
  rows = pipeline.training_samples(mixture, VIEWS, seed=1)
  passed = np.array([rows[index]["bad_counts"] for index in range(len(source))])
  assert passed.any(axis=1).sum() == bad.total()
  assert {name for name, count in zip(BAD, passed.sum(axis=0), strict=True) if count} == set(bad)


@pytest.mark.parametrize("workers", [1, 3])
def test_surviving_stream_does_not_depend_on_workers(workers: int, tmp_path: Path) -> None:
  """Four kinds of source mixed, each with its damage."""
  specs = []
  for kind in (webdataset, json_lines, yfcc, parquet):
    (tmp_path / kind.__name__).mkdir()
    specs.append(kind(tmp_path / kind.__name__))
  mixture = Mixture(tuple(map(open_source, specs)), (0.4, 0.3, 0.2, 0.1))
  rows = pipeline.training_samples(mixture, VIEWS, seed=3)
  digests = []
  for count in (0, workers):
    stream = pipeline.TrainStream(rows, 50, workers=count, threads=2)
    digests.append(digest(next(stream) for _ in range(12)))
    stream.close()
  assert digests[0] == digests[1]

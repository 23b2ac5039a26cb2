"""Data sets in CLIP_benchmark's layout, with splits test, train and val, from any sources of images."""

from collections.abc import Sequence
import io
from pathlib import Path
import tarfile
from typing import NamedTuple

import numpy as np

from declip_jax.data.sources import Source, open_source
from declip_jax.evals.data_files import Splits

TEMPLATES = ("a photo of a {c}.", "a blurry photo of a {c}.", "a photo of the small {c}.", "a {c}.")
_SHARDS = 2  # its loader needs one for each of its processes
_FORMATS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}  # by the first bytes of a file


class Folder(NamedTuple):
  """A data set on disk.

  Attributes:
    name: its name.
    path: its folder.
    classnames: names of its classes; empty for retrieval.
    splits: numbers of images by split.
  """

  name: str
  path: Path
  classnames: tuple[str, ...]
  splits: dict[str, int]

  @property
  def tasks(self) -> tuple[str, ...]:
    """CLIP_benchmark's names of what is evaluated on it."""
    return ("zeroshot_classification", "linear_probe") if self.classnames else ("zeroshot_retrieval",)

  def line(self) -> str:
    """Its line in a data file of ours."""
    return f"own/{self.name} = " + " | ".join(f"clip_benchmark:{self.path}?split={split}" for split in self.splits)


def write_folder(name: str, splits: Splits, path: Path, test: int, train: int) -> Folder:
  """Writes random images of a data set.

  Args:
    name: its name.
    splits: its sources; of `train`, a fifth becomes the validation split.
    path: folder to make.
    test, train: largest numbers of images.
  """
  source = open_source(splits.test)
  parts = {"test": (source, _draw(source, test))}
  if source.classnames and splits.train:
    source = open_source(splits.train)
    rows = _draw(source, train)
    parts |= {"train": (source, rows[len(rows) // 5 :]), "val": (source, rows[: len(rows) // 5])}
  path.mkdir(parents=True)
  if source.classnames:
    (path / "classnames.txt").write_text("\n".join(source.classnames))
    (path / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
  else:
    (path / "dataset_type.txt").write_text("retrieval")
  for split, (source, rows) in parts.items():
    (path / split).mkdir()
    (path / split / "nshards.txt").write_text(str(_SHARDS))
    for number, part in enumerate(np.array_split(rows, _SHARDS)):
      _write_shard(path / split / f"{number}.tar", source, part.tolist())
  return Folder(name, path, tuple(source.classnames), {split: len(rows) for split, (_, rows) in parts.items()})


def _draw(source: Source, most: int) -> np.ndarray:
  """Random rows that have a label, or, in data without classes, a caption."""
  rows, found = np.random.default_rng(0).permutation(len(source)), []
  for row in rows.tolist():
    example = source[row]
    if example["label"] >= 0 if source.classnames else example["captions"]:
      found.append(row)
    if len(found) == most:
      break
  return np.array(found)


def _write_shard(path: Path, source: Source, rows: Sequence[int]) -> None:
  with tarfile.open(path, "w") as tar:
    for row in rows:
      example = source[row]
      image = bytes(example["image"])
      captions = "\n".join(text.replace("\n", " ") for text in example["captions"])
      label = {"cls": str(example["label"])} if source.classnames else {"txt": captions}
      for suffix, data in {_FORMATS[image[:2]]: image, **{name: text.encode() for name, text in label.items()}}.items():
        member = tarfile.TarInfo(f"{row:07}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

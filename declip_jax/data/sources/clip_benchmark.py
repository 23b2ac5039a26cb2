"""Data sets in the layout of CLIP_benchmark (its `webdataset_builder.py`), which its hub and DataComp use too.

```
ROOT/SPLIT/nshards.txt                      number of shards
ROOT/SPLIT/0.tar, 1.tar, ...                samples: an image, and one of
    .cls                                    a class
    .npy                                    zeros and ones, one per class, if dataset_type.txt says multilabel
    .txt                                    a caption per line, if it says retrieval; a line break in one is written \\n
ROOT/dataset_type.txt                       retrieval or multilabel; there is none for a single label
ROOT/classnames.txt                         line i is class i
ROOT/zeroshot_classification_templates.txt  a prompt per line, with {c} for the name of a class
```

With a .cls, a .npy has the metadata of WILDS and of fairness data, whose columns `&group=` names. No folder is listed,
so ROOT may be at any URL.
"""

from collections.abc import Iterator
import contextlib
from functools import cached_property
import io
import math
from pathlib import Path
from typing import Any

from absl import logging
import numpy as np

from declip_jax.data.sources import lists
from declip_jax.data.sources.base import BadSample, Example
from declip_jax.data.sources.webdataset import Fields, WebDataset, index_shards
from declip_jax.data.storage import files, indexes, layouts, texts
from declip_jax.data.storage.bounded import short
from declip_jax.spelling import counted

TYPES = ("classification", "multilabel", "retrieval")
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}  # of .npy
_HUB = "https://huggingface.co/datasets/"
_SPLIT = "test"
_CHECKED = 8  # samples whose labels are compared with classnames.txt
_MOST_SHARDS = 100_000  # each is one request to a server


class ClipBenchmark(WebDataset):
  """A split as a `Source`; make it with `open_clip_benchmark`.

  A sample whose .cls or .npy is missing or does not fit is a `BadSample`.

  Args:
    name: the spec that opened it.
    index: the index of its shards.
    root: its folder or URL.
    kind: one of `TYPES`.
    groups: names of the columns of metadata.
  """

  def __init__(self, name: str, index: Path, root: str, kind: str, groups: tuple[str, ...]):
    super().__init__(name, index, Fields(by_line=kind == "retrieval"))
    self._root, self._kind, self._groups = root, kind, groups

  @cached_property
  def stamp(self) -> str:
    """Changes with the shards, with what is read from them, and with the names of classes."""
    return indexes.digest([self._index.stem, self._kind, self._groups, self.classnames])

  @cached_property
  def classnames(self) -> tuple[str, ...]:
    """The lines of classnames.txt, blank or not; empty without that file, and for retrieval."""
    return layouts.names_in(f"{self._root}/{layouts.CLASSNAMES}") if self._kind != "retrieval" else ()

  @cached_property
  def templates(self) -> tuple[str, ...]:
    """Its prompt templates, with `{}` for the name of a class; empty if it has none."""
    return layouts.templates_in(f"{self._root}/{layouts.TEMPLATES}")

  def check(self) -> None:
    """Logs what users should know about the shards.

    Raises:
      ValueError: classnames.txt does not fit the labels; see also `WebDataset.check`.
    """
    super().check()
    classes = len(self.classnames)
    if self._kind == "multilabel" and classes:
      found = set(self._label_counts())
      if found and classes not in found:
        raise ValueError(
          f"{self.name}: its .npy have labels for {', '.join(map(str, sorted(found)))} classes, but classnames.txt "
          f"has {counted(classes, 'name')}"
        )

  def _label_counts(self) -> Iterator[int]:
    """The number of labels of some samples, from first to last; of those that cannot be read, none."""
    for index in np.linspace(0, len(self) - 1, min(_CHECKED, len(self))).astype(int).tolist():
      with contextlib.suppress(BadSample):
        place, contents = self.contents(index)
        yield len(_array(contents, place))

  def _example(self, place: str, contents: dict[str, bytes]) -> Example:
    example = super()._example(place, contents)
    if self._kind == "retrieval":
      captions = tuple(" ".join(text.replace("\\n", "\n").split()) for text in example["captions"])
      return {**example, "captions": captions}
    if self._kind == "classification" and "cls" not in contents:
      raise BadSample("damaged record", f"{place}: no .cls")
    if self._kind == "multilabel":
      return {**example, "labels": _labels(_array(contents, place), len(self.classnames), place)}
    if self._groups:
      return {**example, "groups": _grouped(_array(contents, place), self._groups, place)}
    return example

  def __getstate__(self) -> dict[str, Any]:
    return super().__getstate__() | {"_root": self._root, "_kind": self._kind, "_groups": self._groups}


def open_clip_benchmark(location: str) -> ClipBenchmark:
  """Opens "ROOT?split=test&group=region,year", of which `split`, by default test, and `group` are optional.

  Args:
    location: a folder or URL; a page of the hub, https://huggingface.co/datasets/USER/NAME/tree/main, is that of its
      files. `group` names the columns of the metadata in .npy, in order, up to the last one needed.

  Raises:
    FileNotFoundError: there is no nshards.txt or a shard is missing.
    ValueError: a file of the layout is wrong, or no sample is usable.
  """
  place, wanted = lists.parse(location, ("split", "group"), "ROOT")
  name, root = f"clip_benchmark:{location}", _files_of(lists.absolute(place))
  folder = f"{root}/{wanted.get('split', _SPLIT)}"
  kind = _kind(f"{root}/dataset_type.txt")
  groups = tuple(part.strip() for part in wanted["group"].split(",")) if wanted.get("group") else ()
  shards = _shards(folder, name)
  source = ClipBenchmark(name, index_shards(shards, name), root, kind, groups)
  source.check()
  if groups and kind != "classification":
    raise ValueError(f"{name}: group={wanted['group']}, but {kind} data have no metadata")
  if kind == "classification" and not groups and "npy" in source.about["suffixes"]:
    logging.warning(
      "%s: its .npy have metadata, which are not read; name their columns, as in &group=region,year", name
    )
  return source


def _files_of(root: str) -> str:
  """The URL of the files of a repository on the hub, for that of its page."""
  if not root.startswith(_HUB):
    return root
  user, repository, *rest = root.removeprefix(_HUB).split("/")
  if rest[:1] in (["tree"], ["raw"], ["blob"]):
    rest[0] = "resolve"
  return "/".join([f"{_HUB}{user}/{repository}", *(rest or ["resolve", "main"])])


def _kind(path: str) -> str:
  if not files.exists(path):
    return TYPES[0]
  kind = texts.decode(files.read(path), path).strip().lower()
  if kind not in TYPES:
    raise ValueError(f"{path}: {kind!r}: expected one of {', '.join(TYPES)}")
  return kind


def _shards(folder: str, name: str) -> list[str]:
  place = f"{folder}/{layouts.NSHARDS}"
  if not files.exists(place):
    raise FileNotFoundError(
      f"{name}: no {place}, which the layout of CLIP_benchmark needs; choose a split with ?split="
    )
  text = texts.decode(files.read(place, limit=2**16), place).strip()
  count = int(text) if text.isdecimal() and len(text) <= len(str(_MOST_SHARDS)) else 0
  if not 0 < count <= _MOST_SHARDS:
    raise ValueError(f"{place}: {short(text)}: expected the number of shards, at most {_MOST_SHARDS:,}")
  return [f"{folder}/{number}.tar" for number in range(count)]


def _array(contents: dict[str, bytes], place: str) -> np.ndarray:
  """The numbers in the .npy of a sample, in one row; no code in it is run, and memory is that of the file."""
  if "npy" not in contents:
    raise BadSample("damaged record", f"{place}: no .npy")
  file = io.BytesIO(contents["npy"])
  try:
    header = _HEADERS[np.lib.format.read_magic(file)]
    shape, _, kind = header(file)
    if kind.kind not in "biuf":
      raise ValueError(f"expected numbers, got {kind}")
    found = np.frombuffer(file.read(), kind, math.prod(shape))
  except Exception as error:  # the parser of headers may raise anything
    raise BadSample("damaged record", f"{place}: bad .npy: {lists.one_line(error)}") from None
  if not np.isfinite(found).all():
    raise BadSample("damaged record", f"{place}: bad .npy {found[:8]}: expected finite numbers")
  return found


def _labels(found: np.ndarray, classes: int, place: str) -> np.ndarray:
  """1 for a class that is present, -1 for one that is absent."""
  if (classes and len(found) != classes) or not np.isin(found, (0, 1)).all():
    raise BadSample("damaged record", f"{place}: bad .npy {found[:8]}: expected {classes or 'any number of'} 0 and 1")
  return np.where(found > 0, 1, -1).astype(np.int8)


def _grouped(found: np.ndarray, groups: tuple[str, ...], place: str) -> dict[str, int]:
  if len(found) < len(groups) or (found[: len(groups)] % 1).any():
    expected = f"whole numbers for {', '.join(groups)}"
    raise BadSample("damaged record", f"{place}: bad .npy {found[:8]}: expected {expected}")
  return {name: int(value) for name, value in zip(groups, found, strict=False)}

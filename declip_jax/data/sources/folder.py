"""Folders of images: a folder for each class, as for ImageNet, or a text beside each image."""

from collections.abc import Iterator
from functools import cached_property
import hashlib
import os
from typing import NamedTuple

from absl import logging

from declip_jax.data.sources import lists
from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.lists import Entry
from declip_jax.data.storage import files, patterns, remote

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class _Files(NamedTuple):
  """What lies in one of the folders: its path relative to the whole, images in order, and texts."""

  path: str
  images: list[str]
  texts: set[str]


class Folder(lists.ListSource):
  """A folder of images as a `Source`; make it with `open_folder`."""

  @cached_property
  def classnames(self) -> tuple[str, ...]:
    """Line i of classnames.txt within the folder, else the name of the folder of class i; empty without classes."""
    names = tuple(self._about["classnames"])
    return files.classnames(self._about["files"][0]) or names if names else ()

  def _captions(self, row: Entry) -> tuple[str, ...]:
    """The lines of the text beside an image: a row has the name of that text for its caption."""
    texts = (_decoded(path, files.read(path)) for path in (self._at(row, name) for name in row.captions))
    return tuple(line.strip() for text in texts for line in text.splitlines() if line.strip())


def open_folder(location: str) -> Folder:
  """Opens a folder of images, at any depth.

  If texts lie beside images, NAME.txt by NAME.jpg, each line of theirs that is not blank is a caption (while a text in
  a WebDataset is one caption), and there are no classes. Otherwise the folders at the top are the classes, in
  alphabetical order as in torchvision, which refuses one without an image too: were it passed over, those behind it
  would have other numbers than in another split. A classnames.txt among them may give better names, line i for class i.
  If there are no folders with images either, there are images alone. Hidden files are passed over. Links are followed,
  but for those that lead back to a folder that they lie in.

  The folder is listed each time it is opened, and its index is named by the names of its files, so it follows them.
  What a text says is read with its image.

  Raises:
    FileNotFoundError: no such folder, or no image in it.
    OSError: a folder in it cannot be listed.
    ValueError: its folders are called "train" and "val" rather than as classes, one of them holds no image, or
      classnames.txt has too few lines.
  """
  name = f"folder:{location}"
  place, _ = lists.parse(location, ())
  folder = lists.absolute(place)
  digest, tops, classes, captioned = hashlib.sha256(), set(), set(), False
  for found in _listing(folder):
    digest.update(repr((found.path, found.images, sorted(found.texts))).encode())
    captioned = captioned or any(_text_of(image) in found.texts for image in found.images)
    top = found.path.partition("/")[0]
    tops |= {top} - {""}
    classes |= {top} - {""} if found.images else set()
  if classes and classes <= _SPLITS and not captioned:
    raise ValueError(f"{name}: {', '.join(sorted(classes))} are no classes; open {place.rstrip('/')}/{min(classes)}")
  if classes and classes < tops and not captioned:
    empty = sorted(tops - classes)
    few = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
    raise ValueError(f"{name}: no image in {few}, but each folder is a class; remove those that are none")
  numbers = {} if captioned else {top: number for number, top in enumerate(sorted(classes))}
  index = lists.index_list(name, [f"{folder}/"], ["folder", digest.hexdigest()], lambda: _rows(folder, numbers))
  return lists.probed(Folder(name, index))


def _rows(folder: str, classes: dict[str, int]) -> Iterator[Entry | BadSample]:
  for found in _listing(folder):
    top = found.path.partition("/")[0]
    for image in found.images:
      path = f"{found.path}/{image}".lstrip("/")
      text = _text_of(image)
      if not classes:
        yield Entry(0, -1, path, captions=[f"{found.path}/{text}".lstrip("/")] if text in found.texts else [])
      elif top:
        yield Entry(0, -1, path, label=classes[top], label_name=top)
      else:
        yield BadSample("damaged record", f"{folder}/{path} is in no folder of a class")


def _listing(folder: str) -> Iterator[_Files]:
  """Folder after folder, in the same order each time."""
  empty = True
  for path, names in _remote_folders(folder) if remote.is_url(folder) else _local_folders(folder):
    visible = [name for name in names if not name.startswith(".")]
    images = sorted(name for name in visible if name.lower().endswith(files.IMAGE_SUFFIXES))
    empty = empty and not images
    yield _Files(path, images, {name for name in visible if name.endswith(".txt")})
  if empty:
    raise FileNotFoundError(f"{folder}: no such folder, or no image in it, {' '.join(files.IMAGE_SUFFIXES)}")


def _local_folders(
  folder: str, path: str = "", above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, list[str]]]:
  """Folder after folder; os.walk passes over those that it cannot list, and goes round in a cycle of links."""
  stat = os.stat(f"{folder}/{path}")
  if (stat.st_dev, stat.st_ino) in above:
    return
  names, folders = [], []
  with os.scandir(f"{folder}/{path}") as entries:
    for entry in entries:
      (folders if entry.is_dir() else names).append(entry.name)  # a link to a folder too, as in subsets of ImageNet
  yield path, names
  for name in sorted(folders):
    if not name.startswith("."):
      inner = f"{path}/{name}" if path else name
      yield from _local_folders(folder, inner, above | {(stat.st_dev, stat.st_ino)})


def _remote_folders(folder: str) -> Iterator[tuple[str, list[str]]]:
  inside: dict[str, list[str]] = {}
  for url in patterns.expand(f"{folder}/**"):
    path, _, name = _within(url).removeprefix(_within(folder)).strip("/").rpartition("/")
    if not any(part.startswith(".") for part in path.split("/")):
      inside.setdefault(path, []).append(name)
  yield from inside.items()


def _within(url: str) -> str:
  """A URL without its protocol, which may be followed by two slashes or three."""
  return url.partition("://")[2].strip("/")


def _text_of(image: str) -> str:
  return f"{os.path.splitext(image)[0]}.txt"


def _decoded(path: str, text: bytes) -> str:
  encoding = lists.encoding_of(text)
  try:
    return text.decode(encoding)
  except UnicodeDecodeError as error:
    logging.log_first_n(logging.WARNING, "%s is not UTF-8, nor may others be: %s", 1, path, error)
    return text.decode(encoding, "replace")

"""Folders of images: one folder per class, as in ImageNet, or a text next to each image."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
import errno
from functools import cached_property, partial
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from declip_jax.data.sources import lists
from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.lists import Entry
from declip_jax.data.storage import files, layouts, patterns, remote, texts
from declip_jax.data.storage.reach import NotAllowedError, Reach
from declip_jax.spelling import counted

_STRAY = 0.1  # share of images with a text below which folders are classes nevertheless
_SUFFIXES = 20  # of files that are left out, those of most files


# The device and inode of a folder, and those of the folders above it.
_Above = tuple[tuple[int, int], "_Above"] | None


class _Files(NamedTuple):
  """The files in one folder.

  Attributes:
    path: the path of the folder, relative to the top.
    images: names of the images, in order.
    texts: names of the texts, by their names with the suffix in lower case.
    others: names of all other files.
    refused: for each link to a folder that is not followed, the reason.
  """

  path: str
  images: list[str]
  texts: dict[str, str]
  others: list[str]
  refused: list[str]


class Folder(lists.ListSource):
  """A folder of images as a `Source`; make it with `open_folder`.

  Args:
    name: the spec that opened the folder.
    index: the index, see `index_list`.
    left_out: number of files that are neither images nor belong to one, by suffix.
    reach: where its links may lead.
  """

  def __init__(self, name: str, index: Path, left_out: dict[str, int], reach: Reach):
    super().__init__(name, index, reach)
    self._left_out = left_out

  @property
  def left_out(self) -> dict[str, int]:
    """Numbers of files that are neither images nor belong to one, by suffix."""
    return self._left_out

  def __getstate__(self) -> dict[str, Any]:
    return super().__getstate__() | {"_left_out": self._left_out}

  @cached_property
  def classnames(self) -> tuple[str, ...]:
    """The names that classnames.txt gives to the folders, else their own; empty without classes."""
    folders = self._about["classnames"]
    return layouts.classnames_of_folders(self._about["files"][0], folders) if folders else ()

  def _paths(self, entry: Entry) -> Sequence[str]:
    return [entry.path or "", *entry.captions]

  def _captions(self, entry: Entry) -> tuple[str, ...]:
    """The lines of the text next to an image; the caption in the entry is the name of that text."""
    paths = [self._reach.resolve(name, self._folder(entry)) for name in entry.captions]
    return tuple(line for path in paths for line in texts.lines(texts.decode(files.read(path), path)) if line)


def open_folder(location: str) -> Folder:
  """Opens a folder of images, at any depth: "PATH", or "PATH?allow=outside&group=NAME,NAME".

  If there are texts next to images, NAME.txt or NAME.jpg.txt for NAME.jpg (see `files.CAPTION_SUFFIXES`), each of their
  lines that is not blank is a caption (in a WebDataset the whole text is one caption), and there are no classes.
  Otherwise the folders at the top are the classes, in alphabetical order as in torchvision; one without an image is an
  error, as in torchvision, since skipping it would change the numbers of the classes after it. They are the classes,
  too, if there are several and fewer than a tenth of the images have a text. A classnames.txt next to them, or above
  the folder of a split, may give better names, see `layouts.classnames_of_folders`. If there are no folders with images
  either, the samples are images alone. Hidden files are skipped; files with other suffixes are left out and counted.
  Links are followed, except for those that lead back to a folder above them. One that leads outside of the folder is
  not allowed, and counts as one bad sample, unless the location says "?allow=outside".

  "&group=NAME,NAME" names the folders between that of the class and the image, from the top, such as group=video for
  juggling/v_03/frame_17.jpg: they group images for evaluations. An image that has no such folder is in no group.

  The folder is listed each time it is opened, and the name of its index depends on its file names. Texts are read
  together with their images. The stamp also depends on sizes and times of some files, see `ListSource.stamp`, so that
  images that were replaced under the same names are noticed unless they are few.

  Raises:
    FileNotFoundError: the folder does not exist or has no image.
    NotADirectoryError: the path is that of a file.
    OSError: a folder in it cannot be listed.
    ValueError: its folders have names of splits, such as "train", one of them has no image or is a link that is not
      followed, or classnames.txt does not name each of them; or groups are named, but there are no such folders.
  """
  name = f"folder:{location}"
  place, wanted = lists.parse(location, ("allow", "group"))
  groups = tuple(part.strip() for part in wanted["group"].split(",")) if wanted.get("group") else ()
  folder, reach = lists.absolute(place), Reach.of(wanted)
  if not remote.is_url(folder):
    _check_folder(folder, name)
  digest, tops, classes, left_out = hashlib.sha256(), set(), set(), Counter()
  images, used_texts, refused, depth = 0, Counter(), list[str](), 0
  for found in _listing(folder, reach):
    digest.update(repr((found.path, found.images, sorted(found.texts.values()), found.refused)).encode())
    used = {text for image in found.images for text in _texts_of(image, found)}
    images += len(found.images)
    used_texts += files.suffixes(sorted(used))
    left_out += files.suffixes([*found.others, *sorted(set(found.texts.values()) - used)])
    top = found.path.partition("/")[0]
    refused += found.refused if not top else ()
    tops |= {top} - {""}
    classes |= {top} - {""} if found.images else set()
    depth = max(depth, found.path.count("/") if found.images else 0)
  captioned = bool(used_texts)
  if captioned and len(classes) > 1 and used_texts.total() < _STRAY * images:
    captioned, left_out = False, left_out + used_texts
    few = f"{used_texts.total()} of {counted(images, 'image')} have a text"
    logging.warning("%s: only %s; these texts are left out, and the folders are the classes", name, few)
  if classes and all(map(layouts.is_split, classes)) and not captioned:
    first = min(classes, key=lambda split: (layouts.split_of(split) != "train", split))
    raise ValueError(f"{name}: {', '.join(sorted(classes))} are splits, not classes; open {place.rstrip('/')}/{first}")
  if classes and refused and not captioned:
    raise ValueError(f"{name}: each folder is a class, but {refused[0]}")
  if classes and classes < tops and not captioned:
    empty = sorted(tops - classes)
    few = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
    raise ValueError(f"{name}: no image in {few}, but each folder is a class; remove those that are not")
  numbers = {} if captioned else {top: number for number, top in enumerate(sorted(classes))}
  if groups and (not numbers or depth < len(groups)):
    has = f"at most {depth} folders between a class and an image" if numbers else "no classes"
    raise ValueError(f"{name}: group={wanted['group']}, but it has {has}")
  entries = partial(_entries, folder, reach, numbers, len(groups))
  stamp = ["folder", digest.hexdigest(), *groups]
  index = lists.index_list(name, [f"{folder}/"], stamp, entries, marks=lists.MarkNames(groups=groups))
  if numbers and files.exists(f"{folder}/classnames.txt"):
    left_out -= Counter([".txt"])
  return lists.checked(Folder(name, index, dict(left_out.most_common(_SUFFIXES)), reach))


def has_captions(names: Iterable[str]) -> bool:
  """Whether some of the names of files in a folder are those of an image and its text."""
  found = _files("", names)
  return any(_texts_of(image, found) for image in found.images)


def _entries(folder: str, reach: Reach, classes: dict[str, int], groups: int) -> Iterator[Entry | BadSample]:
  """The images, with the names of `groups` folders below that of their class."""
  for found in _listing(folder, reach):
    top, *below = found.path.split("/")
    own = [*below[:groups], *[None] * (groups - len(below))]
    yield from (BadSample("not allowed", reason) for reason in found.refused)
    for image in found.images:
      path = f"{found.path}/{image}".lstrip("/")
      if not classes:
        yield Entry(0, -1, path, captions=[f"{found.path}/{text}".lstrip("/") for text in _texts_of(image, found)])
      elif top:
        yield Entry(0, -1, path, label=classes[top], label_name=top, groups=own)
      else:
        yield BadSample("damaged record", f"{folder}/{path} is not in the folder of a class")


def _listing(folder: str, reach: Reach) -> Iterator[_Files]:
  """Yields folder after folder, always in the same order."""
  empty, others, refused = True, Counter(), list[str]()
  for path, names, reasons in _remote_folders(folder) if remote.is_url(folder) else _local_folders(folder, reach):
    found = _files(path, names)._replace(refused=reasons)
    refused += reasons
    empty = empty and not found.images
    others += files.suffixes(found.others)
    yield found
  if empty:
    instead = f"; {refused[0]}" if refused else f"; found {files.in_words(others)}" if others else ""
    raise FileNotFoundError(f"{folder}: no image ({' '.join(files.IMAGE_SUFFIXES)}) in it{instead}")


def _files(path: str, names: Iterable[str]) -> _Files:
  visible = [name for name in names if not name.startswith(".")]
  images = sorted(name for name in visible if name.lower().endswith(files.IMAGE_SUFFIXES))
  beside = _by_lower_suffix(visible)
  return _Files(path, images, beside, sorted(set(visible).difference(images, beside.values())), [])


def _check_folder(folder: str, name: str) -> None:
  try:
    os.scandir(folder).close()
  except FileNotFoundError:
    raise FileNotFoundError(f"{name}: no such folder") from None
  except NotADirectoryError:
    raise NotADirectoryError(f"{name}: a file, not a folder") from None


_Level = tuple[str, list[str], list[str]]  # a folder, the names in it, and why links to folders are not followed


def _local_folders(top: str, reach: Reach) -> Iterator[_Level]:
  """Yields folder after folder; os.walk would skip folders that it cannot list and follow cycles of links."""
  pending: list[tuple[str, _Above]] = [("", None)]
  while pending:
    path, above = pending.pop()
    try:
      stat = os.stat(f"{top}/{path}")
    except OSError as error:
      if error.errno != errno.ENAMETOOLONG:
        raise
      logging.warning("left out, since the system allows no path of this length: %s/%s", top, path)
      continue
    here = (stat.st_dev, stat.st_ino)
    if _is_above(here, above):
      continue
    names, folders, refused = [], [], []
    with os.scandir(f"{top}/{path}") as entries:
      for entry in entries:
        try:
          is_folder = entry.is_dir()
        except OSError as error:  # a link that leads to itself
          if error.errno != errno.ELOOP:
            raise
          logging.warning("left out, since its links lead in a circle: %s", entry.path)
          continue
        if not is_folder:
          names.append(entry.name)
        elif not entry.name.startswith("."):
          inside = f"{path}/{entry.name}" if path else entry.name
          reason = _refusal(inside, top, reach) if entry.is_symlink() else None
          folders.append(inside) if reason is None else refused.append(reason)
    yield path, names, sorted(refused)
    pending += [(inside, (here, above)) for inside in sorted(folders, reverse=True)]  # the last is popped first


def _refusal(path: str, top: str, reach: Reach) -> str | None:
  """Why a link to a folder is not followed; None if it is."""
  try:
    reach.resolve(path, top)
  except NotAllowedError as error:
    return str(error)
  return None


def _is_above(folder: tuple[int, int], above: _Above) -> bool:
  while above is not None:
    other, above = above
    if other == folder:
      return True
  return False


def _remote_folders(folder: str) -> Iterator[_Level]:
  inside: dict[str, list[str]] = {}
  for url in patterns.expand(f"{folder}/**"):
    path, _, name = _within(url).removeprefix(_within(folder)).strip("/").rpartition("/")
    if not any(level.startswith(".") for level in path.split("/")):
      inside.setdefault(path, []).append(name)
  yield from ((path, names, []) for path, names in inside.items())


def _within(url: str) -> str:
  """A URL without its protocol, which two or three slashes may follow."""
  return url.partition("://")[2].strip("/")


def _texts_of(image: str, found: _Files) -> list[str]:
  """The name of the text next to an image, none if there is none."""
  stems = (os.path.splitext(image)[0], image)
  names = (stem + suffix for suffix in files.CAPTION_SUFFIXES for stem in stems)
  return [found.texts[name] for name in names if name in found.texts][:1]


def _by_lower_suffix(names: Iterable[str]) -> dict[str, str]:
  """Names of texts, by their names with the suffix in lower case; of two that are then equal, the one in lower case."""
  stems = [(*os.path.splitext(name), name) for name in sorted(names)]
  return {stem + suffix.lower(): name for stem, suffix, name in stems if suffix.lower() in files.CAPTION_SUFFIXES}

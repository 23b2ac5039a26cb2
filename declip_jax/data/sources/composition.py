"""SugarCrepe and Winoground as sources for evaluation: each image has two captions, the right one and the wrong one."""

from collections.abc import Callable, Iterator, Mapping
import os
from typing import Any

from declip_jax.data.sources import lists
from declip_jax.data.sources.lists import Entry
from declip_jax.data.storage import files, texts
from declip_jax.data.storage.bounded import parse_json
from declip_jax.data.storage.reach import Reach


def open_sugarcrepe(location: str) -> lists.ListSource:
  """Opens "FILE.json?root=FOLDER", one of SugarCrepe's seven files and the images of COCO val2017.

  A sample is an image with the right caption and then the wrong one. The files are those of RAIVNLab/sugar-crepe, such
  as add_att.json.

  Raises:
    FileNotFoundError: the images are not found.
    ValueError: the file is not one of SugarCrepe; the message names the entry and what it lacks.
  """
  return _open("sugarcrepe", location, _sugarcrepe_entries)


def open_winoground(location: str) -> lists.ListSource:
  """Opens "examples.jsonl?root=FOLDER", the file and the unpacked images of facebook/winoground.

  Samples 2 i and 2 i + 1 are the two images of example i, each with its own caption and then that of the other.

  Args:
    location: the file; without `root`, images are in the folder "images" beside it.

  Raises:
    FileNotFoundError: the images are not found.
    ValueError: the file is not that of Winoground; the message names the line and what it lacks.
  """
  return _open("winoground", location, _winoground_entries, folder="images")


def _open(
  kind: str, location: str, read_entries: Callable[[str, str], Iterator[Entry]], folder: str = ""
) -> lists.ListSource:
  name = f"{kind}:{location}"
  path, wanted = lists.parse(location, lists.REACH)
  reach = Reach.of(wanted)
  if reach.root is None:
    reach = reach._replace(root=f"{lists.folder_of(lists.absolute(path))}/{folder}".rstrip("/"))
  content = texts.decode(files.read(path), path)
  index = lists.index_list(name, [path], [kind, files.stamps([path])], lambda: read_entries(path, content))
  return lists.checked(lists.ListSource(name, index, reach))


def _sugarcrepe_entries(path: str, content: str) -> Iterator[Entry]:
  try:
    examples = parse_json(content)
  except ValueError as error:
    raise ValueError(f"{path}: not JSON: {error}") from None
  if not isinstance(examples, dict):
    raise ValueError(f"{path}: expected an object with one entry per example, as in SugarCrepe's add_att.json")
  for number, example in examples.items():
    image, *captions = _fields(example, ("filename", "caption", "negative_caption"), f"{path}: entry {number!r}")
    yield Entry(0, -1, image, captions=captions)


def _winoground_entries(path: str, content: str) -> Iterator[Entry]:
  for number, line in enumerate(content.splitlines(), start=1):
    place = f"{path}: line {number}"
    try:
      example = parse_json(line)
    except ValueError as error:
      raise ValueError(f"{place}: not JSON: {error}") from None
    *images, first, second = _fields(example, ("image_0", "image_1", "caption_0", "caption_1"), place)
    for image, captions in zip(images, ((first, second), (second, first)), strict=True):
      yield Entry(0, -1, image if os.path.splitext(image)[1] else f"{image}.png", captions=captions)


def _fields(example: Any, names: tuple[str, ...], place: str) -> list[str]:
  """The texts of these fields; a record without one of them would pair the others wrongly."""
  found = example if isinstance(example, Mapping) else {}
  for name in names:
    if not isinstance(found.get(name), str) or not found[name].strip():
      raise ValueError(f"{place}: expected a text as {name}, got {found.get(name)!r:.80}; its fields: {list(found)}")
  return [found[name].strip() for name in names]

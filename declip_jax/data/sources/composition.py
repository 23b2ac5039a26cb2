"""SugarCrepe, Winoground and WinoGAViL as sources for evaluation.

Each image of SugarCrepe and Winoground has two captions, the right one and the wrong one. Each image of WinoGAViL has
the cue of its instance as its caption, and says whether it belongs to the cue.
"""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
import os
from typing import Any

from declip_jax.data.sources import lists, table
from declip_jax.data.sources.lists import Entry, MarkNames
from declip_jax.data.storage import files, texts
from declip_jax.data.storage.bounded import parse_json, short
from declip_jax.data.storage.reach import Reach
from declip_jax.data.text.cleaning import has_text

# Groupings of WinoGAViL's images: the number of their instance, and how many candidates it has.
INSTANCE, CANDIDATES = "instance", "candidates"
_LONGEST_LIST, _MOST_NAMES = 2**14, 1000  # characters and names; those of WinoGAViL have 139 and 12 at most


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


def open_winogavil(location: str) -> lists.ListSource:
  """Opens "FILE?root=FOLDER", the instances and the unpacked images of nlphuji/winogavil (Bitton et al. 2022).

  A sample is a candidate of an instance, in the order of the file, so an image that is a candidate of several instances
  is read and encoded once for each of them. Its caption is the cue, its label 1 if it is one of the associations and
  else 0. Its groups are the number of the instance and the number of its candidates, so that an evaluation knows which
  instances lack an image. Candidate NAME is the image FOLDER/NAME.jpg.

  Args:
    location: winogavil_dataset.csv, or a table in another form that `table` reads, such as the JSON lines that
      datasets.to_json writes. Its columns candidates and associations are lists, or lists in a text as JSON or Python
      write them. Without `root`, images are in the folder "winogavil_images" beside it.

  Raises:
    FileNotFoundError: the images are not found.
    ValueError: the file is not that of WinoGAViL, or a record is wrong: a field is missing, a name occurs twice, there
      is no association, or one is not a candidate; the message names the record.
  """
  marks = MarkNames(groups=(INSTANCE, CANDIDATES))
  return _open("winogavil", location, _winogavil_entries, folder="winogavil_images", marks=marks)


def _open(
  kind: str,
  location: str,
  read_entries: Callable[[str], Iterator[Entry]],
  folder: str = "",
  marks: MarkNames = lists.NO_MARKS,
) -> lists.ListSource:
  name = f"{kind}:{location}"
  path, wanted = lists.parse(location, lists.REACH)
  reach = Reach.of(wanted)
  if reach.root is None:
    reach = reach._replace(root=f"{lists.folder_of(lists.absolute(path))}/{folder}".rstrip("/"))
  index = lists.index_list(name, [path], [kind, files.stamps([path])], lambda: read_entries(path), marks=marks)
  return lists.checked(lists.ListSource(name, index, reach))


def _sugarcrepe_entries(path: str) -> Iterator[Entry]:
  try:
    examples = parse_json(texts.decode(files.read(path), path))
  except ValueError as error:
    raise ValueError(f"{path}: not JSON: {error}") from None
  if not isinstance(examples, dict):
    raise ValueError(f"{path}: expected an object with one entry per example, as in SugarCrepe's add_att.json")
  for number, example in examples.items():
    image, *captions = _fields(example, ("filename", "caption", "negative_caption"), f"{path}: entry {number!r}")
    yield Entry(0, -1, image, captions=captions)


def _winoground_entries(path: str) -> Iterator[Entry]:
  for number, line in enumerate(texts.decode(files.read(path), path).splitlines(), start=1):
    place = f"{path}: line {number}"
    try:
      example = parse_json(line)
    except ValueError as error:
      raise ValueError(f"{place}: not JSON: {error}") from None
    *images, first, second = _fields(example, ("image_0", "image_1", "caption_0", "caption_1"), place)
    for image, captions in zip(images, ((first, second), (second, first)), strict=True):
      yield Entry(0, -1, image if os.path.splitext(image)[1] else f"{image}.png", captions=captions)


def _winogavil_entries(path: str) -> Iterator[Entry]:
  columns = ("candidates", "cue", "associations")
  with table.read_table(path, columns) as instances:
    if missing := [name for name in columns if name not in instances.columns]:
      raise ValueError(f"{path}: no column {missing[0]}; its columns: {short(instances.columns)}")
    for instance, (number, fields) in enumerate(instances.read(columns)):
      place = f"{path}: record {number}"
      if isinstance(fields, str):  # without it, the score would be that of other data
        raise ValueError(f"{place}: {fields}")
      (cue,) = _fields(fields, ("cue",), place)
      if not has_text(cue):
        raise ValueError(f"{place}: expected a text as cue, got {short(cue)}")
      candidates, associations = (
        _names(fields.get(name), f"{place}: {name}") for name in ("candidates", "associations")
      )
      if others := [name for name in associations if name not in candidates]:
        raise ValueError(f"{place}: association {short(others[0])} is not one of its candidates, {short(candidates)}")
      groups = (instance, len(candidates))
      for name in candidates:
        image = name if name.lower().endswith(".jpg") else f"{name}.jpg"
        yield Entry(0, -1, image, captions=[cue], label=int(name in associations), groups=groups)


def _names(value: Any, place: str) -> Sequence[str]:
  """The distinct names in a list, or in a text that is one."""
  found = _parsed(value, place) if isinstance(value, str) else value
  if not isinstance(found, list | tuple) or not all(isinstance(name, str) and name.strip() for name in found):
    raise ValueError(f"{place}: expected a list of names of images, got {short(value)}")
  if not 0 < len(found) <= _MOST_NAMES:
    raise ValueError(f"{place}: {len(found):,} names, expected 1 to {_MOST_NAMES:,}")
  if repeated := [name for name in found if found.count(name) > 1]:
    raise ValueError(f"{place}: {short(repeated[0])} occurs {found.count(repeated[0])} times, expected once")
  return found


def _parsed(text: str, place: str) -> Any:
  """The value that a text describes as JSON or Python write it."""
  if len(text) > _LONGEST_LIST:
    raise ValueError(f"{place}: {len(text):,} characters, expected a list of at most {_LONGEST_LIST:,}")
  try:
    return parse_json(text)
  except ValueError:
    pass
  try:
    return ast.literal_eval(text.strip())
  except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
    return None


def _fields(example: Any, names: tuple[str, ...], place: str) -> list[str]:
  """The texts of these fields; a record without one of them would pair the others wrongly."""
  found = example if isinstance(example, Mapping) else {}
  for name in names:
    if not isinstance(found.get(name), str) or not found[name].strip():
      raise ValueError(f"{place}: expected a text as {name}, got {found.get(name)!r:.80}; its fields: {list(found)}")
  return [found[name].strip() for name in names]

"""YFCC15M in the layout of SLIP: a list of photos with title and description, and zips of a thousand photos each.

The photo with index RRZZZFFF, eight digits, is the member `FFF.jpg` of `images/RR/ZZZ.zip` (Mu et al. 2021,
datasets.py). An index is the line number of a photo in yfcc100m_dataset.txt.
"""

from collections.abc import Iterable, Iterator
import pickle
from typing import Any, BinaryIO

from declip_jax.data.sources import lists
from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.lists import Entry
from declip_jax.data.sources.table import read_table
from declip_jax.data.sources.values import captions_of, is_missing
from declip_jax.data.storage import files, patterns, zips
from declip_jax.data.storage.bounded import LONGEST, short
from declip_jax.data.storage.reach import Reach
from declip_jax.data.storage.unpickler import Unpickler, shown

_COLUMNS = ("index", "title", "description")
_PHOTOS = 10**8
_EXPANSION = 4  # a pickle stores a text once, wherever it is repeated; the largest ratio of its texts to its bytes
_MOST_INSTRUCTIONS = 2**40  # of a pickle, with their arguments; a record takes 14, and all records are needed
# Instructions of the first protocol of pickle for the same data as those of later ones.
_PROTOCOL_0 = (
  pickle.GET,
  pickle.FLOAT,
  pickle.INT,
  pickle.LIST,
  pickle.LONG,
  pickle.PUT,
  pickle.STRING,
  pickle.UNICODE,
)


class Yfcc(lists.ListSource):
  """A list of photos in zips as a `Source`; make it with `open_yfcc`."""

  def _image(self, entry: Entry) -> bytes:
    digits = f"{entry.record:08d}"
    try:
      return zips.read_member(f"{self._folder(entry)}/images/{digits[:2]}/{digits[2:5]}.zip", f"{digits[5:]}.jpg")
    except zips.DamagedMember as error:
      raise BadSample("damaged image", str(error)) from None


def open_yfcc(location: str) -> Yfcc:
  """Opens "METADATA" or "METADATA?root=FOLDER&encoding=NAME".

  The captions of a sample are its title and its description, if not blank: the pipeline draws one of them, while SLIP
  draws one of the two even if it is empty. Photos with neither are skipped and counted; photos missing from their zip
  are bad samples when they are read. Texts are not cleaned: SLIP removes percent signs, HTML and URLs when it makes its
  list.

  Args:
    location: a table with columns index, title and description, see `open_table`, or SLIP's own yfcc15m.pkl, a pickled
      list of (index, title, description), which takes some 6 GB of memory and a few minutes, once. Nothing in a pickle
      is executed: one that names any class or function is rejected. `root` is the folder that contains images/, by
      default the folder of the list; `encoding` is that of the table if it is not UTF-8.

  Raises:
    FileNotFoundError: the list or its photos are not found.
    ValueError: a column is missing, the pickle is rejected, or no line is usable.
  """
  name = f"yfcc:{location}"
  place, wanted = lists.parse(location, ("root", "encoding"))
  paths = patterns.expand(place)

  def read_entries() -> Iterator[Entry | BadSample]:
    for number, path in enumerate(paths):
      pickled = path.endswith((".pkl", ".pickle"))
      most, length = _EXPANSION * max(files.stamp(path)[0], LONGEST), 0
      for line, record in _pickled(path) if pickled else _tabled(path, wanted.get("encoding")):
        try:
          entry = _entry(number, record)
        except BadSample as error:
          yield BadSample(error.kind, f"{path}:{line}: {error}")
          continue
        length += sum(map(len, entry.captions))
        if pickled and length > most:
          raise ValueError(
            f"{path}:{line}: texts of more than {most:,} characters, {_EXPANSION} times those of the file"
          )
        yield entry

  index = lists.index_list(name, paths, ["yfcc", wanted.get("encoding"), files.stamps(paths)], read_entries)
  return lists.checked(Yfcc(name, index, Reach.of(wanted)))


class _PlainUnpickler(Unpickler):
  """Loads lists, tuples, numbers and texts. Anything else in a pickle requires a name, and every name is rejected."""

  def __init__(self, file: BinaryIO):
    super().__init__(file, most_instructions=_MOST_INSTRUCTIONS)
    self.memo = _Memo()

  def find_class(self, module: str, name: str) -> Any:
    raise ValueError(f"it names {shown(module)}.{shown(name)}, and loading that could run any code")

  dispatch = type(Unpickler.dispatch)(
    Unpickler.dispatch | {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _PROTOCOL_0}
  )


class _Memo(list[Any]):
  """The memo of a pickle, which numbers its entries without gaps; a dict would take several times the memory."""

  def __setitem__(self, number: Any, value: Any) -> None:
    if number == len(self):
      self.append(value)
    else:
      super().__setitem__(number, value)


def _pickled(path: str) -> Iterator[tuple[int, Any]]:
  """Yields positions and elements of a pickled list."""
  try:
    with files.open_stream(path) as stream:
      records = _PlainUnpickler(stream).load()
  except ValueError as error:
    raise ValueError(f"{path}: expected a pickled list of (index, title, description): {error}") from None
  if not isinstance(records, list):
    raise ValueError(f"{path}: expected a list of (index, title, description), got a {type(records).__name__}")
  yield from enumerate(records)


def _tabled(path: str, encoding: str | None) -> Iterator[tuple[int, Any]]:
  """Yields line numbers and (index, title, description) of a table."""
  with read_table(path, _COLUMNS, encoding) as table:
    if not set(_COLUMNS) <= set(table.columns):
      raise ValueError(f"{path}: expected the columns {', '.join(_COLUMNS)}; the columns are {table.columns}")
    for line, fields in table.read(_COLUMNS):
      yield line, fields if isinstance(fields, str) else tuple(map(fields.get, _COLUMNS))


def _entry(number: int, record: Any) -> Entry:
  """Makes an entry from (index, title, description); raises BadSample if it is wrong."""
  if isinstance(record, str):
    raise BadSample("damaged record", record)
  if not isinstance(record, tuple | list) or len(record) != len(_COLUMNS):
    raise BadSample("damaged record", f"expected (index, title, description), got {short(record)}")
  index, *texts = record
  if isinstance(index, str) and index.isdecimal() and len(index) <= len(str(_PHOTOS)):
    index = int(index)
  if not isinstance(index, int) or not 0 <= index < _PHOTOS:
    raise BadSample("damaged record", f"expected an index below {_PHOTOS}, got {short(index)}")
  # A pickle of a few bytes can repeat a long text, or a list of lists of it.
  if wrong := [text for text in texts if not isinstance(text, str) and not is_missing(text)]:
    raise BadSample("damaged record", f"expected texts, got {short(wrong[0])}")
  if sum(len(text) for text in texts if isinstance(text, str)) > LONGEST:
    raise BadSample("damaged record", f"title and description of more than {LONGEST:,} characters")
  captions = _captions(texts)
  if not captions:
    raise BadSample("no caption", f"photo {index} has neither title nor description")
  return Entry(number, index, None, captions=captions)


def _captions(texts: Iterable[Any]) -> list[str]:
  return [caption for text in texts for caption in captions_of(text)]

"""Matches the classes of a source with those of a data set by their names, since their orders differ.

The same data set has its classes in different orders in different places: 36 of the 37 Oxford pets have another number
in CLIP's list than in TFDS and CLIP_benchmark. Matched by number, a model would score at chance.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
import re

from jaxtyping import Int
import numpy as np

from declip_jax.evals.catalogue import DataSet, data_set

_SHOWN = 8  # names on each side of a message
_PREFIX = re.compile(r"^(?:\d{3}\.(?=\D)|/[a-z]/)")  # 001.Black_footed_Albatross in CUB, /a/abbey in SUN
_WRAPPERS = ("heldout", "kept")  # kinds of sources with another source inside


def canonical(name: str) -> str:
  """A name of a class in lower case, with spaces for `_`, `-` and `/`, without the "001." or "/a/" of a list."""
  return " ".join(re.split(r"[\s_/-]+", _PREFIX.sub("", name).lower())).strip()


def align(data: DataSet, classnames: Sequence[str], spec: str) -> Int[np.ndarray, "classes"]:
  """Returns the class of `data` for each class of a source.

  Names are equal if they are `canonical`ly, or if one is another name of the class, such as its WordNet id. Classes
  with the same name are matched in their order. If the names are numbers, or there are none, the order is that of the
  data set for this kind of source. A data set with a parent, such as ImageNet-R, also accepts a source with the classes
  of its parent; those that it lacks become -1, as do `others`.

  Args:
    data: a data set with classes.
    classnames: the names of the source's classes; () if it has none.
    spec: the spec of the source, for its kind and for messages.

  Raises:
    ValueError: the names do not map one to one; the message lists what is left on both sides.
  """
  if not data.classes:
    raise ValueError(f"{data.key} has no classes of its own: use those of its source, see DataSet.with_classes")
  own = _match(data, classnames)
  if own is not None:
    return own
  if (numbers := _numbers(classnames)) is not None and (not numbers or len(numbers) == len(data.classes)):
    return _by_number(data, numbers, spec)
  if data.parent and (above := _match(data_set(data.parent), classnames)) is not None:
    return _within_parent(data, above)
  if data.parent and numbers is not None and len(numbers) == len(data_set(data.parent).classes):
    return _within_parent(data, _by_number(data_set(data.parent), numbers, spec))
  raise ValueError(_left_over(data, classnames, spec))


def _match(data: DataSet, classnames: Sequence[str]) -> Int[np.ndarray, "classes"] | None:
  """The classes by name; None if they do not map one to one."""
  known, places = _known(data), _places(data)
  ignored, counts = set(map(canonical, data.others)), Counter[str]()
  found = []
  for name in map(canonical, classnames):
    name = known.get(name, name)
    numbers = places.get(name, ())
    if counts[name] < len(numbers):
      found.append(numbers[counts[name]])
    elif name in ignored:
      found.append(-1)
    else:
      return None
    counts[name] += 1
  complete = sorted(number for number in found if number >= 0) == [*range(len(data.classes))]
  return np.array(found, np.int32) if complete else None


def _known(data: DataSet) -> dict[str, str]:
  """Other names of classes, to the `canonical` name in the catalogue."""
  names = dict(zip(map(canonical, data.folders), data.classes, strict=False))
  for of in (data.synonyms, *data.names.values()):
    names |= {canonical(one): name for same, name in zip(of, data.classes, strict=False) for one in same}
  names |= {canonical(alias): name for alias, name in data.aliases.items()}
  own = set(map(canonical, data.classes))
  return {alias: canonical(name) for alias, name in names.items() if alias not in own}


def _places(data: DataSet) -> dict[str, list[int]]:
  """Numbers of the classes with a canonical name, more than one if several have the same."""
  places: dict[str, list[int]] = {}
  for number, name in enumerate(map(canonical, data.classes)):
    places.setdefault(name, []).append(number)
  return places


def _numbers(classnames: Sequence[str]) -> list[int] | None:
  """The numbers that all names are, counted from 0; None if some are not, or the numbers have gaps."""
  if not all(name.isdecimal() for name in classnames):
    return None
  numbers = [int(name) for name in classnames]
  first = min(numbers, default=0)
  return [number - first for number in numbers] if sorted(numbers) == [*range(first, first + len(numbers))] else None


def _by_number(data: DataSet, numbers: Sequence[int], spec: str) -> Int[np.ndarray, "classes"]:
  kind = _kind(spec)
  order = data.orders.get(kind, data.orders.get("*"))
  if order is None:
    raise ValueError(
      f"{spec}: its classes have no names, and the order of the {len(data.classes)} classes of {data.key} in {kind}: "
      "is not known; put a classnames.txt, with one name per line, next to its first file"
    )
  return np.array([order[number] for number in numbers] or order, np.int32)


def _within_parent(data: DataSet, above: Int[np.ndarray, "classes"]) -> Int[np.ndarray, "classes"]:
  own = {number: place for place, numbers in enumerate(data.parent_ids) for number in numbers}
  return np.array([own.get(number, -1) for number in above.tolist()], np.int32)


def _kind(spec: str) -> str:
  kind, _, rest = spec.partition(":")
  while kind in _WRAPPERS:
    _, _, rest = rest.partition(":")
    kind, _, rest = rest.partition(":")
  return kind


def _left_over(data: DataSet, classnames: Sequence[str], spec: str) -> str:
  known: Mapping[str, str] = _known(data)
  theirs = Counter(known.get(name, name) for name in map(canonical, classnames))
  ours = Counter(map(canonical, data.classes))
  ignored = Counter({name: theirs[name] for name in map(canonical, data.others)})
  return (
    f"{spec}: the names of its {len(classnames)} classes do not map one to one onto the {len(data.classes)} of "
    f"{data.key}; only in the source: {_few(theirs - ours - ignored)}; only in {data.key}: {_few(ours - theirs)}"
  )


def _few(names: Counter[str]) -> str:
  listed = [f"{name!r}" for name in names.elements()]
  more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
  return ", ".join(listed[:_SHOWN]) + more or "none"

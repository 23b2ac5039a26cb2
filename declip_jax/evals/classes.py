"""Matches the classes of a source or a model with those of a data set by their names, since their orders differ.

The same data set has its classes in different orders in different places: 36 of the 37 Oxford pets have another number
in CLIP's list than in TFDS and CLIP_benchmark. Matched by number, a model would score at chance.
"""

from collections import Counter
from collections.abc import Sequence
import re

from jaxtyping import Int
import numpy as np

from declip_jax.evals.catalogue import DataSet, data_set

_SHOWN = 8  # names on each side of a message
_PREFIX = re.compile(r"^(?:\d{3}\.(?=\D)|/[a-z]/)")  # 001.Black_footed_Albatross in CUB, /a/abbey in SUN
_WORDNET_ID = re.compile(r"n\d{8}")
_WRAPPERS = ("heldout", "kept", "border")  # kinds of sources with another source inside


def canonical(name: str) -> str:
  """A name of a class in lower case, with spaces for `_`, `-` and `/`, without the "001." or "/a/" of a list."""
  return " ".join(re.split(r"[\s_/-]+", _PREFIX.sub("", name).lower())).strip()


def align(data: DataSet, classnames: Sequence[str], spec: str) -> Int[np.ndarray, "classes"]:
  """Returns the class of `data` for each class of a source.

  Names are equal if they are `canonical`ly, or if one is another name of the class, such as its WordNet id. Of names
  that are canonically equal, such as "A" and "a", those that are equal as they stand are matched first, and classes
  with the same name in their order. If the names are numbers, or there are none, the order is that of the
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
  raise ValueError(_left_over(data, classnames, spec, "its", "the source"))


def align_model(data: DataSet, classnames: Sequence[str], place: str) -> tuple[tuple[int, ...], ...]:
  """Returns for each class of `data` the classes of a model that it comprises.

  Names are matched as in `align`, except that numbers are names like others. The model may have more classes. Several
  of them are one class of `data` if the model has all classes of its parent, such as ImageNet's for ObjectNet.

  Args:
    data: a data set with classes.
    classnames: the names of the model's classes.
    place: start of messages.

  Raises:
    ValueError: a class of `data` has none, or which it has is not clear; the message lists what is left on both sides.
  """
  found, merges = _match(data, classnames), any(len(numbers) > 1 for numbers in data.parent_ids)
  if found is None and data.parent and (above := _match_some(data_set(data.parent), classnames)) is not None:
    found = _within_parent(data, above)
  if found is None and not merges:  # a folder that is called by one of several WordNet ids does not stand for all
    found = _match_some(data, classnames)
  if found is None:
    of = data_set(data.parent) if merges else data
    raise ValueError(_left_over(of, classnames, place, "the model's", "the model"))
  return tuple(tuple(np.flatnonzero(found == number).tolist()) for number in range(len(data.classes)))


def _match_some(data: DataSet, classnames: Sequence[str]) -> Int[np.ndarray, "classes"] | None:
  """The classes by name, where other names than those of the data set are left out."""
  known, found = _known(data), np.full(len(classnames), -1, np.int32)
  places = [place for place, name in enumerate(map(canonical, classnames)) if name in known]
  if (own := _match(data, [classnames[place] for place in places])) is None:
    return None
  found[places] = own
  return found


def names_for_prompts(classnames: Sequence[str]) -> tuple[tuple[str, ...], str]:
  """Returns names of classes with ImageNet's names in place of its WordNet ids, and a remark if any name is an id.

  Args:
    classnames: names of classes, such as those of folders.
  """
  ids = [name for name in classnames if _WORDNET_ID.fullmatch(name)]
  if not ids:
    return tuple(classnames), ""
  imagenet = data_set("imagenet")
  known = dict(zip(imagenet.folders, imagenet.classes, strict=True))
  names = tuple(known.get(name, name) for name in classnames)
  if unknown := [name for name in ids if name not in known]:
    several = f"{len(unknown)} class names are WordNet ids" if len(unknown) > 1 else "a class name is a WordNet id"
    remark = f"{several} that ImageNet does not have, such as {unknown[0]}: prompts have the id for a name"
    return names, f"{remark}; a classnames.txt next to the data gives names"
  return names, f"prompts have ImageNet's names in place of WordNet ids, such as {known[ids[0]]!r} for {ids[0]}"


def _match(data: DataSet, classnames: Sequence[str]) -> Int[np.ndarray, "classes"] | None:
  """The classes by name; None if they do not map one to one."""
  known, ignored = _known(data), set(map(canonical, data.others))
  places: dict[tuple[int, ...], list[int]] = {}  # of the source's classes, by the numbers of the classes they may be
  for place, name in enumerate(map(canonical, classnames)):
    if name in known:
      places.setdefault(known[name], []).append(place)
    elif name not in ignored:
      return None
  found, free = np.full(len(classnames), -1, np.int32), set(range(len(data.classes)))
  for numbers, theirs in sorted(places.items(), key=lambda item: len(item[0])):
    ours = [number for number in numbers if number in free]
    pairs = _pairs([classnames[place] for place in theirs], [data.classes[number] for number in ours])
    if pairs is None:
      return None
    for their, our in pairs:
      found[theirs[their]] = ours[our]
    free -= set(ours)
  return None if free else found


def _pairs(theirs: Sequence[str], ours: Sequence[str]) -> list[tuple[int, int]] | None:
  """Matches names that are canonically equal by their places: first those that are equal; None if that is not clear."""
  if len(theirs) != len(ours):
    return None
  equal = [name for name in dict.fromkeys(theirs) if theirs.count(name) == ours.count(name)]
  pairs = [pair for name in equal for pair in zip(_places(name, theirs), _places(name, ours), strict=True)]
  rest = [[place for place, name in enumerate(names) if name not in equal] for names in (theirs, ours)]
  if any(len({names[place] for place in places}) > 1 for names, places in zip((theirs, ours), rest, strict=True)):
    return None
  return [*pairs, *zip(*rest, strict=True)]


def _places(name: str, names: Sequence[str]) -> list[int]:
  return [place for place, other in enumerate(names) if other == name]


def _known(data: DataSet) -> dict[str, tuple[int, ...]]:
  """The numbers of the classes with a `canonical` name, which several may share, and those with another such name."""
  own: dict[str, tuple[int, ...]] = {}
  for number, name in enumerate(map(canonical, data.classes)):
    own[name] = (*own.get(name, ()), number)
  others = {canonical(name): (number,) for number, name in enumerate(data.folders)}
  for of in (data.synonyms, *data.names.values()):
    others |= {canonical(one): (number,) for number, same in enumerate(of) for one in same}
  others |= {canonical(alias): own[canonical(name)] for alias, name in data.aliases.items()}
  return {**others, **own}


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


def _left_over(data: DataSet, classnames: Sequence[str], place: str, whose: str, side: str) -> str:
  """The message on names that do not map one to one; `whose` and `side` say in words whose names they are."""
  known, names = _known(data), list(map(canonical, data.classes))
  theirs = Counter(names[known[name][0]] if name in known else name for name in map(canonical, classnames))
  ours = Counter(names)
  ignored = Counter({name: theirs[name] for name in map(canonical, data.others)})
  foreign, missing = theirs - ours - ignored, ours - theirs
  if not foreign and not missing:
    alike = Counter(
      name for name, own in zip(names, data.classes, strict=True) if ours[name] > 1 and own not in classnames
    )
    return f"{place}: which of {whose} classes are those of {data.key} with the names {_few(alike)} is not clear"
  return (
    f"{place}: the names of {whose} {len(classnames)} classes do not map one to one onto the {len(data.classes)} of "
    f"{data.key}; only in {side}: {_few(foreign)}; only in {data.key}: {_few(missing)}"
  )


def _few(names: Counter[str]) -> str:
  listed = [f"{name!r}" for name in names.elements()]
  more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
  return ", ".join(listed[:_SHOWN]) + more or "none"

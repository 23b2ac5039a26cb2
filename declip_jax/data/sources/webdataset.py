"""WebDataset tar shards with random access, without extracting them.

A sample consists of consecutive members whose paths agree up to the first dot of the file name, webdataset's own rule.
A repeated suffix starts another sample (webdataset rejects such a shard). The index has one byte span per sample, see
`shard_indexes`. Reading a sample takes one `pread`; its tar headers are parsed again in that buffer, so the index need
not store names, sizes and fields. Members that are not used, such as a .npy of features, are read along with it.

Remote shards (gs://, s3://, https://) are read in ranges, one request per sample. To index them, requests of 1 MiB
follow the headers: larger members are skipped, smaller ones are read with their neighbours, since a request of their
own would take longer than their transfer. Indexing costs some 10 us per sample on one core.

| field | members, of which the first that exists counts |
|---|---|
| image | `files.IMAGE_SUFFIXES`: .jpg .jpeg .png .webp and more |
| captions | a list in .json ("captions", "caption", "text"); else .txt, .caption, .jpg.txt; else a text in .json |
| label | .cls, a whole number |

Others are named as in `?image=seg.png&caption=alt_text`, see `open_webdataset`. A .json without these three keys counts
if exactly one of its keys is a common name of captions, see `lists.CAPTION_NAMES`. The whole .txt is one caption. In
CLIP_benchmark's layout each of its lines is one, and `clip_benchmark` reads the rest of it too: several labels,
metadata, prompts.
"""

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
import contextlib
from functools import cached_property, partial
import io
from pathlib import Path
import re
from typing import Any, BinaryIO, NamedTuple

from absl import logging
from jaxtyping import Int64
import numpy as np

from declip_jax.data.sources import lists, values
from declip_jax.data.sources.base import BadSample, Example, OfFiles, bad_sample
from declip_jax.data.storage import files, indexes, layouts, patterns, shard_indexes, tars, texts
from declip_jax.data.storage.bounded import parse_json
from declip_jax.spelling import counted

_IMAGES = tuple(suffix.removeprefix(".") for suffix in files.IMAGE_SUFFIXES)
_CAPTION_KEYS = ("captions", "caption", "text")  # in .json; img2dataset writes "caption"
_INDEX_FORMAT = 4  # part of the hash: raise it when the index or the rules for usable samples change
_SHOWN = 8  # suffixes that a message lists
_PROBES = 100  # samples among which a message looks for a .json
_COUNTED = 100  # suffixes that are counted in a shard; dots in the names of images make any number
_TEXTS = tuple(suffix.removeprefix(".") for suffix in files.CAPTION_SUFFIXES)
_TEXTS += tuple(f"{image}.{text}" for text in _TEXTS for image in _IMAGES)
_LONGEST_LABEL = 20  # bytes of a .cls
_LABEL = re.compile(rb"\s*-?\d+\s*")


class Fields(NamedTuple):
  """Where the image and the captions of a sample are.

  Attributes:
    images: suffixes of members, of which the first that exists is the image.
    captions: suffixes of members, or keys of the .json, whose captions count together; None for those of the table.
    by_line: whether each line of a text is a caption.
  """

  images: tuple[str, ...] = _IMAGES
  captions: tuple[str, ...] | None = None
  by_line: bool = False


class WebDataset(OfFiles):
  """Tar shards as a `Source`; make it with `open_webdataset`."""

  def __init__(self, name: str, index: Path, fields: Fields):
    super().__init__(name)
    self._index, self._fields = index, fields

  @cached_property
  def _opened(self) -> tuple[Int64[np.ndarray, "n 3"], dict[str, Any]]:
    return shard_indexes.read(self._index)

  @property
  def about(self) -> dict[str, Any]:
    """What the index says about the shards: their paths, numbers of suffixes, the range of labels, remarks."""
    return self._opened[1]

  @cached_property
  def stamp(self) -> str:
    """Changes with the shards and with the names of classes."""
    return f"{self._index.stem}-{indexes.digest(self.classnames)}"

  @property
  def _first_file(self) -> str:
    return self._opened[1]["shards"][0]

  @property
  def skipped(self) -> dict[str, int]:
    """Numbers of samples without an image and of damaged shards, by kind, counted when the shards were indexed."""
    return dict(self._opened[1]["skipped"])

  def __len__(self) -> int:
    return len(self._opened[0])

  def __getitem__(self, index: int) -> Example:
    """Reads one sample, which may have no caption and no class.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: the shard cannot be read or changed since it was indexed, or the .json or .cls cannot be parsed.
    """
    return self._example(*self.contents(index))

  def _example(self, place: str, contents: dict[str, bytes]) -> Example:
    """The example of a sample with the name `place`, from its members by suffix."""
    label = _label(contents.get("cls", b"-1"), len(self.classnames), place)
    image = next(contents[suffix] for suffix in self._fields.images if suffix in contents)
    captions = _captions(contents, place, self._fields)
    return Example(image=image, captions=captions, label=label, id=place)

  def contents(self, index: int) -> tuple[str, dict[str, bytes]]:
    """The name of a sample, for messages, and the contents of its members by suffix, an image among them.

    Raises:
      IndexError, BadSample: as in `__getitem__`.
    """
    self._check(index)
    spans, about = self._opened
    shard, start, stop = spans[index].tolist()
    path = about["shards"][shard]
    place = f"{path}, sample at byte {start}"
    try:
      buffer = files.read(path, start, stop - start)
      members = list(tars.members(io.BytesIO(buffer), len(buffer)))
    except OSError as error:
      raise bad_sample(error, place) from error
    except ValueError as error:  # no tar header
      raise BadSample("damaged record", f"{place}: {error}; the shard changed since it was indexed") from None
    contents = {member.suffix: buffer[member.data : member.stop] for member in members}
    is_sample = contents.keys() & {*self._fields.images} and len({member.key for member in members}) == 1
    if len(buffer) < stop - start or not is_sample:
      raise BadSample("damaged record", f"{place}: the shard changed since it was indexed, open it again")
    return f"{path.rpartition('/')[2]}:{members[0].key}", contents

  def check(self) -> None:
    """Logs what users should know about the shards.

    Raises:
      ValueError: the labels count from 1, while the lines of classnames.txt count from 0.
    """
    classes = len(self.classnames)
    if classes > 1 and self.about["labels"] == [1, classes]:
      raise ValueError(
        f"{self.name}: the labels in .cls are 1 to {classes}, but the first of the {classes} lines of classnames.txt "
        "names class 0; subtract 1 from the labels, or add a line before it"
      )
    for remark in (*self.about["remarks"], *layouts.remarks_on(self.classnames)):
      logging.warning("%s: %s", self.name, remark)

  def __getstate__(self) -> dict[str, Any]:
    return {"name": self.name, "_index": self._index, "_fields": self._fields, "stamp": self.stamp}


def open_webdataset(location: str) -> WebDataset:
  """Opens "PATTERN" or "PATTERN?image=SUFFIX&caption=NAME,NAME"; indexes exactly these shards if they have no index.

  Samples without an image are skipped and counted in `skipped`. If a shard is cut off or damaged, the samples before
  the damage remain, except for the last one if a member of it may be missing; the shard is named in the log and counted
  once, like one without any sample. Samples without a caption remain, since self-supervision and classification need
  none.

  Args:
    location: the .tar files, see `patterns.expand`: `train-*.tar`, `gs://bucket/train-{0000..0012}.tar`. `image` is the
      suffix of the member that is the image, such as `jpg` or `left.png`, or several, of which the first that exists
      counts. `caption` names suffixes of members, such as `txt`, or keys of the .json, whose captions count together;
      "caption=" means none.

  Raises:
    FileNotFoundError: a pattern matches no file, or a shard of a range is missing.
    ValueError: no sample is usable, for example because the shards are not plain tars, a caption is neither the suffix
      of a member nor a key of a .json, or the labels count from 1 while the lines of classnames.txt count from 0.
  """
  place, wanted = lists.parse(location, ("image", "caption"))
  shards = patterns.expand(place)
  fields = Fields(by_line=layouts.captions_by_line(shards[0]))
  if wanted.get("image"):
    fields = fields._replace(images=tuple(_suffix(name) for name in wanted["image"].split(",")))
  index = index_shards(shards, location, fields.images)
  source = WebDataset(f"webdataset:{location}", index, fields)
  if "caption" in wanted:
    source = WebDataset(source.name, index, fields._replace(captions=_chosen(source, wanted["caption"])))
  source.check()
  for remark in _remarks_on_fields(source, shards[0]):
    logging.warning("%s: %s", source.name, remark)
  return source


def index_shards(shards: list[str], location: str, images: tuple[str, ...] = _IMAGES) -> Path:
  """Returns the index of shards, and builds it if it does not exist.

  Args:
    shards: paths or URLs of the shards.
    location: for messages.
    images: suffixes of the members that are images.

  Raises:
    FileNotFoundError: a shard is missing.
    ValueError: no sample is usable.
  """
  version = _INDEX_FORMAT if images == _IMAGES else [_INDEX_FORMAT, images]
  scan = partial(_scan, images=images)
  summarize = partial(_summary, shards=shards, location=location, images=images)
  return shard_indexes.find_or_build(shards, version, scan, summarize, location)


def _suffix(name: str) -> str:
  return name.strip().lower().removeprefix(".")


def _chosen(source: WebDataset, wanted: str) -> tuple[str, ...]:
  """The suffixes and keys of .json that a location names for the captions.

  Raises:
    ValueError: one is neither the suffix of a member nor a key in the first samples.
  """
  suffixes, keys, chosen = source.about["suffixes"], dict[str, None](), []
  names = [name.strip() for name in wanted.split(",")] if wanted else []
  for index in range(min(len(source), _PROBES)) if "json" in suffixes else ():
    if all(_suffix(name) in suffixes or name in keys for name in names):
      break
    with contextlib.suppress(ValueError):
      place, contents = source.contents(index)
      keys |= dict.fromkeys(_parsed(contents.get("json", b"{}"), place))
  for name in names:
    if _suffix(name) not in suffixes and name not in keys:
      raise ValueError(
        f"{source.name}: caption={name}: expected the suffix of a member, {_shown(Counter(suffixes))}, or a key of the "
        f".json: {', '.join(map(repr, keys)) or 'none found'}"
      )
    chosen.append(_suffix(name) if _suffix(name) in suffixes else name)
  return tuple(chosen)


def _remarks_on_fields(source: WebDataset, shard: str) -> Iterator[str]:
  """A remark on labels that only `clip_benchmark` reads, or on what the samples have instead of captions."""
  suffixes, fields = source.about["suffixes"], source._fields
  if "npy" in suffixes and (place := layouts.clip_benchmark(shard)):
    yield f"the .npy of its samples are not read; open clip_benchmark:{place}, which reads this layout"
    return
  if not suffixes.keys() - {*fields.images} or suffixes.keys() & {*_TEXTS, "cls"} or fields.captions is not None:
    return
  keys = ""
  for index in range(min(len(source), _PROBES)) if "json" in suffixes else ():
    with contextlib.suppress(ValueError):
      place, contents = source.contents(index)
      if "json" in contents:
        if source[index]["captions"]:
          return
        keys = f"; the .json of {place} has the keys {', '.join(map(repr, _parsed(contents['json'], place)))}"
        break
  wanted = f"{', '.join(files.CAPTION_SUFFIXES)}, or from {', '.join(map(repr, _CAPTION_KEYS))} in .json"
  found = f"no captions found, its samples have {_shown(Counter(suffixes))}{keys}"
  yield f"{found}; captions are read from {wanted}; name another suffix or key with ?caption=NAME"


def _summary(scans: list[list[Any]], shards: list[str], location: str, images: tuple[str, ...]) -> dict[str, Any]:
  """What the index says about the shards, from what was found in each.

  Raises:
    ValueError: no sample is usable.
  """
  found = [_Scan(*scan) for scan in scans]
  skipped = _sum(scan.skipped for scan in found)
  for scan in found:
    if scan.damage:
      logging.warning("%s; the samples before it are used: %d", scan.damage, scan.spans)
  if not any(scan.spans for scan in found):
    seen = _shown(_sum(scan.without_image for scan in found))
    others = f"; samples without an image have {seen}" if seen else ""
    damage = next((f"; {scan.damage}" for scan in found if scan.damage), "")
    expected = " ".join(f".{suffix}" for suffix in images)
    legal = f"; expected {expected} after the first dot of a name" if others or not damage else ""
    kinds = ", ".join(f"{number} {kind}" for kind, number in skipped.items()) or "nothing"
    raise ValueError(f"{location}: no usable sample (shards: {len(shards)}, skipped: {kinds}){damage}{others}{legal}")
  labels = [label for scan in found for label in scan.labels]
  return {
    "shards": shards,
    "skipped": skipped,
    "remarks": [*_remarks(found)],
    "labels": labels and [min(labels), max(labels)],
    "suffixes": _sum(scan.suffixes for scan in found),
  }


class _Scan(NamedTuple):
  """The samples of one shard.

  Attributes:
    spans: start and stop of the usable samples, in bytes; in a piece of the index only their number.
    skipped: numbers of the other samples and of damage, by kind of `BAD`.
    suffixes: numbers of the suffixes in usable samples.
    without_image: numbers of the suffixes in samples without an image.
    labels: the least and the largest number in a .cls, none if there is none.
    apart: number of keys whose image is in one place of the shard and whose other members are in another.
    sparse: number of samples with a member whose runs of zeros are not stored; they are not used.
    damage: the damage that ends the shard early, with its position; empty if there is none.
  """

  spans: Int64[np.ndarray, "m 2"] | int
  skipped: Counter[str]
  suffixes: Counter[str]
  without_image: Counter[str]
  labels: list[int]
  apart: int
  sparse: int
  damage: str


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
  total = Counter()
  for count in counts:
    total.update(count)
  return total


def _shown(suffixes: Counter[str]) -> str:
  return ", ".join(f".{suffix}" for suffix, _ in suffixes.most_common(_SHOWN))


def _ends_like_image(suffix: str) -> bool:
  return f".{suffix}".endswith(files.IMAGE_SUFFIXES)


def _remarks(scans: list[_Scan]) -> Iterator[str]:
  """What users should know about samples that are not used or lack members."""
  if without := _sum(scan.without_image for scan in scans):
    dots = "; a suffix starts at the first dot of a file's name" if any(map(_ends_like_image, without)) else ""
    yield f"samples without an image have {_shown(without)}{dots}"
  if apart := sum(scan.apart for scan in scans):
    yield f"members of {counted(apart, 'sample')} are elsewhere in their shard; sort the files of each shard by name"
  if sparse := sum(scan.sparse for scan in scans):
    yield f"not used: {counted(sparse, 'sample')} with sparse files; make the shards without tar's --sparse"


def _scan(path: str, size: int, images: tuple[str, ...]) -> _Scan:
  spans, skipped, damage, apart, sparse = [], Counter(), "", 0, 0
  suffixes, keys = {True: Counter(), False: Counter()}, {True: set(), False: set()}  # with and without an image
  labels = []
  with files.open_stream(path) as file:
    try:
      for sample in _samples(_with_labels(tars.members(file, size), file, labels)):
        if sample[-1].stop > size:
          raise ValueError(f"byte {sample[-1].start}: cut off within this member")
        has_image = any(member.suffix in images for member in sample)
        if any(member.sparse for member in sample):
          skipped["damaged record"] += 1
          sparse += 1
        elif has_image:
          spans.append((sample[0].start, sample[-1].stop))
        else:
          skipped["missing file"] += 1
        _count(suffixes[has_image], sample)
        keys[has_image].add(sample[0].key)
        apart += sample[0].key in keys[not has_image]
      if not spans and not skipped:
        raise ValueError(f"no sample in its {size} bytes")
    except ValueError as error:
      skipped["damaged record"] += 1
      damage = f"{path}, {error}"
  usable = np.array(spans, np.int64).reshape(-1, 2)
  return _Scan(usable, skipped, suffixes[True], suffixes[False], labels, apart, sparse, damage)


def _count(suffixes: Counter[str], sample: list[tars.Member]) -> None:
  suffixes.update(member.suffix for member in sample if member.suffix in suffixes or len(suffixes) < _COUNTED)


def _with_labels(members: Iterable[tars.Member], file: BinaryIO, labels: list[int]) -> Iterator[tars.Member]:
  """Yields the members and keeps the least and the largest label of the .cls among them in `labels`."""
  for member in members:
    if member.suffix == "cls" and member.stop - member.data <= _LONGEST_LABEL:
      file.seek(member.data)
      text = file.read(member.stop - member.data)
      label = _number(text)
      found = labels if label is None else [*labels, label]
      labels[:] = [min(found), max(found)] if found else []
    yield member


def _samples(members: Iterable[tars.Member]) -> Iterator[list[tars.Member]]:
  """Groups consecutive members with the same key, each suffix once; drops a group that damage may have cut off."""
  sample: list[tars.Member] = []
  key, suffixes = "", set()
  after_end = None
  try:
    for member in members:
      if member.key != key or member.suffix in suffixes:
        if sample:
          yield sample
        sample, key, suffixes = [], member.key, set()
      sample.append(member)
      suffixes.add(member.suffix)
  except tars.AfterEnd as error:
    after_end = error
  if sample:
    yield sample
  if after_end is not None:
    raise after_end


def _captions(contents: dict[str, bytes], place: str, fields: Fields) -> tuple[str, ...]:
  def in_text(suffix: str) -> tuple[str, ...]:
    text = texts.decode(contents[suffix], place)
    return _strip(texts.lines(text) if fields.by_line else [text])

  if fields.captions is not None:
    try:
      about = _parsed(contents["json"], place) if "json" in contents else {}
      listed = [in_text(key) if key in contents else values.captions_of(about.get(key)) for key in fields.captions]
    except ValueError as error:  # also of a value that is no caption
      raise BadSample("damaged record", f"{place}: bad .json: {error}") from None
    return tuple(caption for captions in listed for caption in captions)
  written = next(filter(None, (in_text(suffix) for suffix in _TEXTS if suffix in contents)), ())
  try:
    listed, other = _described(contents["json"], place) if "json" in contents else ((), ())
  except ValueError as error:
    if not written and "cls" not in contents:
      raise BadSample("damaged record", f"{place}: bad .json: {error}") from None
    return written
  return listed or written or other


def _described(text: bytes, place: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The captions in a list of a .json, which count before a .txt, and those that count after it.

  Raises:
    ValueError: the text is not JSON.
  """
  parsed = parse_json(texts.decode(text, place))
  if not isinstance(parsed, dict):  # a list of captions, or a caption
    return (_captions_of(parsed), ()) if isinstance(parsed, list) else ((), _captions_of(parsed))
  found = [parsed[key] for key in _CAPTION_KEYS if key in parsed]
  listed = _captions_of(next((value for value in found if isinstance(value, list | dict)), []))
  if found:
    return listed, tuple(one for value in found if isinstance(value, str) for one in _captions_of(value))[:1]
  try:
    keys = lists.choose("caption", None, list(parsed), lists.CAPTION_NAMES, place, several=True)
  except ValueError:  # any of several
    keys = ()
  return listed, tuple(one for key in keys for one in _captions_of(parsed[key]))


def _captions_of(value: Any) -> tuple[str, ...]:
  """The captions in a value of a .json, as tables read it; none if it has another type."""
  with contextlib.suppress(BadSample):
    return tuple(values.captions_of(value))
  return ()


def _parsed(text: bytes, place: str) -> dict[str, Any]:
  """The object in a .json, empty if there is another value.

  Raises:
    ValueError: the text is not JSON.
  """
  parsed = parse_json(texts.decode(text, place))
  return parsed if isinstance(parsed, dict) else {}


def _strip(captions: Iterable[str]) -> tuple[str, ...]:
  return tuple(text.strip() for text in captions if not values.is_missing(text))


def _number(text: bytes) -> int | None:
  """The number in a .cls, which may start with a byte order mark; None if it is something else."""
  text = text.removeprefix(codecs.BOM_UTF8)
  return int(text) if len(text) <= _LONGEST_LABEL and _LABEL.fullmatch(text) else None


def _label(text: bytes, classes: int, place: str) -> int:
  label = _number(text)
  if label is None or label < -1:
    raise BadSample("damaged record", f"{place}: bad .cls {text[:40]!r}: expected a whole number from -1 up")
  if classes and label >= classes:
    legal = f"-1 to {classes - 1}, the last line of classnames.txt"
    raise BadSample("no label", f"{place}: bad .cls {text[:40]!r}: expected {legal}")
  return label

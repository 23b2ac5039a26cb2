"""WebDataset tar shards with random access, without extracting them.

A sample consists of consecutive members whose paths agree up to the first dot of the file name, webdataset's own rule.
A repeated suffix starts another sample (webdataset rejects such a shard). The index has one byte span per sample,
`[n 3]` int64 of (shard, start, stop). Reading a sample takes one `pread`; its tar headers are parsed again in that
buffer, so the index need not store names, sizes and fields. Members that are not used, such as a .npy of features,
are read along with it.

The index of a set of shards is one memory-mapped .npy file, see `indexes.find_or_build`. Its name depends on the paths,
sizes and times of change of the shards, so it is never older than they are, and any number of processes and hosts can
share it. One file for the whole set rather than one per shard means one mapping per worker and one path per pickle,
however many shards there are; their names follow the spans in the same file, as JSON.

Remote shards (gs://, s3://, https://) are read in ranges, one request per sample. To index them, requests of 1 MiB
follow the headers: larger members are skipped, smaller ones are read with their neighbours, since a request of their
own would take longer than their transfer.

Indexing costs some 10 us per sample on one core, and large sets are indexed by one process per core. The results of
groups of 16 shards are kept next to the index, so that an interrupted build continues when the set is opened again
within a day, and hosts that share the folder share the work. They are deleted once the index exists.

| field | members, of which the first that exists counts |
|---|---|
| image | `files.IMAGE_SUFFIXES`: .jpg .jpeg .png .webp and more |
| captions | a list in .json ("captions", "caption", "text"); else .txt, .caption, .jpg.txt; else a text in .json |
| label | .cls, a whole number |

A .json without these three keys counts if exactly one of its keys is a common name of captions, see
`lists.CAPTION_NAMES`. The whole .txt is one caption. In CLIP_benchmark's layout each of its lines is one, and
`clip_benchmark` reads the rest of it too: several labels, metadata, prompts.
"""

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
import contextlib
import errno
from functools import cached_property, partial
import io
import json
from pathlib import Path
import re
import shutil
from typing import Any, BinaryIO, NamedTuple

from absl import logging
from jaxtyping import Int64
import numpy as np

from declip_jax.data.sources import lists, values
from declip_jax.data.sources.base import BadSample, Example, bad_sample
from declip_jax.data.storage import files, indexes, jobs, layouts, patterns, tars, texts
from declip_jax.data.storage.bounded import parse_json
from declip_jax.reporting import progress

_IMAGES = tuple(suffix.removeprefix(".") for suffix in files.IMAGE_SUFFIXES)
_CAPTION_KEYS = ("captions", "caption", "text")  # in .json; img2dataset writes "caption"
_INDEX_FORMAT = 4  # part of the hash: raise it when the index or the rules for usable samples change
_GROUP = 16  # shards per job; as many threads scan them, which hides the latency of disks and servers
_ALONE = 2**32  # bytes of shards, some seconds of work; for more it is faster to start other processes
_SHOWN = 8  # suffixes that a message lists
_PROBES = 100  # samples among which a message looks for a .json
_COUNTED = 100  # suffixes that are counted in a shard; dots in the names of images make any number
_TEXTS = tuple(suffix.removeprefix(".") for suffix in files.CAPTION_SUFFIXES)
_TEXTS += tuple(f"{image}.{text}" for text in _TEXTS for image in _IMAGES)
_LONGEST_LABEL = 20  # bytes of a .cls
_LABEL = re.compile(rb"\s*-?\d+\s*")


class WebDataset:
  """Tar shards as a `Source`; make it with `open_webdataset`."""

  def __init__(self, name: str, index: Path, captions_by_line: bool = False):
    self.name = name
    self._index, self._captions_by_line = index, captions_by_line

  @cached_property
  def _opened(self) -> tuple[Int64[np.ndarray, "n 3"], dict[str, Any]]:
    """The spans, mapped but without the slow indexing of np.memmap, and the JSON that follows them in the file."""
    try:
      spans = np.load(self._index, mmap_mode="r")
      rest = indexes.contents(self._index)[spans.offset + spans.nbytes :]
      return np.asarray(spans), json.loads(bytes(rest))
    except (ValueError, EOFError) as error:
      raise ValueError(f"{self._index}: damaged index ({error}); delete it to build it again") from error

  @property
  def about(self) -> dict[str, Any]:
    """What the index says about the shards: their paths, numbers of suffixes, the range of labels, remarks."""
    return self._opened[1]

  @cached_property
  def stamp(self) -> str:
    """Changes with the shards and with the names of classes."""
    return f"{self._index.stem}-{indexes.digest(self.classnames)}"

  @cached_property
  def classnames(self) -> tuple[str, ...]:
    """Line i of classnames.txt, see `layouts.find`, is class i; empty without that file."""
    return layouts.classnames(self._opened[1]["shards"][0])

  @cached_property
  def templates(self) -> tuple[str, ...]:
    """Prompt templates next to the data, see `layouts.templates`; empty without that file."""
    return layouts.templates(self._opened[1]["shards"][0])

  @property
  def skipped(self) -> dict[str, int]:
    """Numbers of samples without an image and of damaged shards, by kind, counted when the shards were indexed."""
    return dict(self._opened[1]["skipped"])

  @property
  def left_out(self) -> dict[str, int]:
    return {}

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
    image = next(contents[suffix] for suffix in _IMAGES if suffix in contents)
    captions = _captions(contents, place, self._captions_by_line)
    return Example(image=image, captions=captions, label=label, id=place)

  def contents(self, index: int) -> tuple[str, dict[str, bytes]]:
    """The name of a sample, for messages, and the contents of its members by suffix, an image among them.

    Raises:
      IndexError, BadSample: as in `__getitem__`.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name}: no sample {index}, there are {len(self)}")
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
    if len(buffer) < stop - start or not contents.keys() & _IMAGES or len({member.key for member in members}) > 1:
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
    return {"name": self.name, "_index": self._index, "_captions_by_line": self._captions_by_line, "stamp": self.stamp}

  def __repr__(self) -> str:
    return f"WebDataset({self.name!r})"


def open_webdataset(location: str) -> WebDataset:
  """Opens a set of shards and indexes them first if exactly these files have no index.

  Samples without an image are skipped and counted in `skipped`. If a shard is cut off or damaged, the samples before
  the damage remain, except for the last one if a member of it may be missing; the shard is named in the log and counted
  once, like one without any sample. Samples without a caption remain, since self-supervision and classification need
  none.

  Args:
    location: the .tar files, see `patterns.expand`: `train-*.tar`, `gs://bucket/train-{0000..0012}.tar`.

  Raises:
    FileNotFoundError: a pattern matches no file, or a shard of a range is missing.
    ValueError: no sample is usable, for example because the shards are not plain tars, or the labels count from 1 while
      the lines of classnames.txt count from 0.
  """
  shards = patterns.expand(location)
  index = index_shards(shards, location)
  source = WebDataset(f"webdataset:{location}", index, layouts.captions_by_line(shards[0]))
  source.check()
  for remark in _remarks_on_fields(source, shards[0]):
    logging.warning("%s: %s", source.name, remark)
  return source


def index_shards(shards: list[str], location: str) -> Path:
  """Returns the index of shards, and builds it if it does not exist.

  Args:
    shards: paths or URLs of the shards.
    location: for messages.

  Raises:
    FileNotFoundError: a shard is missing.
    ValueError: no sample is usable.
  """
  stamps = files.stamps(shards)
  stamp = [_INDEX_FORMAT, list(zip(shards, stamps, strict=True))]
  sizes = [size for size, _ in stamps]
  build = partial(_build, key=indexes.key(stamp), shards=shards, sizes=sizes, location=location)
  index = indexes.find_or_build(stamp, shards[0], build, ".npy")
  shutil.rmtree(_pieces_folder(index.parent, index.stem), ignore_errors=True)
  return index


def _remarks_on_fields(source: WebDataset, shard: str) -> Iterator[str]:
  """A remark on labels that only `clip_benchmark` reads, or on what the samples have instead of captions."""
  suffixes = source.about["suffixes"]
  if "npy" in suffixes and (place := layouts.clip_benchmark(shard)):
    yield f"the .npy of its samples are not read; open clip_benchmark:{place}, which reads this layout"
    return
  if not suffixes.keys() - {*_IMAGES} or suffixes.keys() & {*_TEXTS, "cls"}:
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
  yield f"no captions found, its samples have {_shown(Counter(suffixes))}{keys}; captions are read from {wanted}"


def _pieces_folder(folder: Path, key: str) -> Path:
  """The folder for the pieces of an index; its name starts with a dot, so that it is deleted once it is old."""
  return folder / f".{key}.parts"


def _build(path: Path, key: str, shards: list[str], sizes: list[int], location: str) -> None:
  """Writes the index: the spans `[n 3]` of the usable samples, then JSON.

  Args:
    path: the file to write. The index will be next to it; if it exists already, another process was faster.
    key: the stem of the index's name.
    shards: paths of the shards.
    sizes: sizes of the shards in bytes.
    location: for messages.
  """
  folder, index = _pieces_folder(path.parent, key), path.with_name(f"{key}.npy")
  numbered = list(zip(range(len(shards)), shards, sizes, strict=True))
  groups = [numbered[start : start + _GROUP] for start in range(0, len(shards), _GROUP)]
  todo = [jobs.Job(folder / f"{number:06d}", group, len(group)) for number, group in enumerate(groups)]
  for job in todo:  # of an interrupted build
    if job.path.is_file() and not indexes.is_usable(job.path, indexes.digest(job.argument), shards[0]):
      job.path.unlink(missing_ok=True)
  processes = jobs.cores() if len(groups) > 1 and sum(sizes) >= _ALONE else 1
  try:
    with progress.Bar(f"indexing {location}", len(shards), "shards") as bar:
      jobs.make_files(write_piece, todo, processes if processes > 1 else 0, index.is_file, bar.set, interval=0.5)
    _join([job.path for job in todo], path, shards, location)
  except (OSError, ValueError) as error:
    if isinstance(error, ValueError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
      shutil.rmtree(folder, ignore_errors=True)  # these shards have no index, or another folder will have it
    raise
  finally:
    with contextlib.suppress(OSError):
      folder.rmdir()  # if it is empty


def write_piece(path: Path, shards: list[tuple[int, str, int]], advance: jobs.Advance) -> None:
  """Writes the piece of an index for some consecutive shards: a line of JSON, then their raw spans `[m 3]`.

  Args:
    path: the file to write.
    shards: number, path and size of each shard.
    advance: called after each shard.
  """

  def scan(shard: tuple[int, str, int]) -> _Scan:
    found = _scan(*shard[1:])
    advance(1)
    return found

  with ThreadPoolExecutor(len(shards)) as pool:
    scans = list(pool.map(scan, shards))
  about = [scan._replace(spans=len(scan.spans)) for scan in scans]
  with path.open("wb") as file:
    file.write(json.dumps(about).encode() + b"\n")
    for (number, *_), scan in zip(shards, scans, strict=True):
      file.write(np.insert(scan.spans, 0, number, axis=1).tobytes())
  indexes.seal(path, indexes.digest(shards))


def _join(pieces: list[Path], path: Path, shards: list[str], location: str) -> None:
  """Writes the index from its pieces, one after the other."""
  scans = []
  for piece in pieces:
    scans += [_Scan(*scan) for scan in json.loads(_read_piece(piece)[0])]
  count, skipped = sum(scan.spans for scan in scans), _sum(scan.skipped for scan in scans)
  for scan in scans:
    if scan.damage:
      logging.warning("%s; the samples before it are used: %d", scan.damage, scan.spans)
  if not count:
    seen = _shown(_sum(scan.without_image for scan in scans))
    found = f"; samples without an image have {seen}" if seen else ""
    damage = next((f"; {scan.damage}" for scan in scans if scan.damage), "")
    legal = f"; expected {' '.join(files.IMAGE_SUFFIXES)} after the first dot of a name" if found or not damage else ""
    kinds = ", ".join(f"{number} {kind}" for kind, number in skipped.items()) or "nothing"
    raise ValueError(f"{location}: no usable sample (shards: {len(shards)}, skipped: {kinds}){damage}{found}{legal}")
  index = np.lib.format.open_memmap(path, "w+", np.int64, (count, 3))
  start = 0
  for piece in pieces:
    spans = np.frombuffer(_read_piece(piece)[1], np.int64).reshape(-1, 3)
    index[start : start + len(spans)] = spans
    start += len(spans)
  index.flush()
  with path.open("ab") as file:
    labels = [label for scan in scans for label in scan.labels]
    about = {
      "shards": shards,
      "skipped": skipped,
      "remarks": [*_remarks(scans)],
      "labels": labels and [min(labels), max(labels)],
    }
    file.write(json.dumps(about | {"suffixes": _sum(scan.suffixes for scan in scans)}).encode())


def _read_piece(piece: Path) -> tuple[bytes, bytes]:
  line, _, spans = bytes(indexes.contents(piece)).partition(b"\n")
  return line, spans


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
    yield f"{apart} samples lack members that are elsewhere in their shard; sort the files of each shard by name"
  if sparse := sum(scan.sparse for scan in scans):
    yield f"{sparse} samples with sparse files are not used; make the shards without tar's --sparse"


def _scan(path: str, size: int) -> _Scan:
  spans, skipped, damage, apart, sparse = [], Counter(), "", 0, 0
  suffixes, keys = {True: Counter(), False: Counter()}, {True: set(), False: set()}  # with and without an image
  labels = []
  with files.open_stream(path) as file:
    try:
      for sample in _samples(_with_labels(tars.members(file, size), file, labels)):
        if sample[-1].stop > size:
          raise ValueError(f"byte {sample[-1].start}: cut off within this member")
        has_image = any(member.suffix in _IMAGES for member in sample)
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


def _captions(contents: dict[str, bytes], place: str, by_line: bool) -> tuple[str, ...]:
  found = (texts.decode(contents[suffix], place) for suffix in _TEXTS if suffix in contents)
  written = next(filter(None, (_strip(texts.lines(text) if by_line else [text]) for text in found)), ())
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

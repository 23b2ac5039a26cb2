"""WebDataset tar shards with random access, read where they lie.

A sample is a run of neighbouring members whose paths agree up to the first dot of the file name, webdataset's own rule.
Where a suffix comes a second time in such a run, another sample begins (webdataset refuses the shard).
The index keeps one byte span per sample, `[n 3]` int64 of (shard, start, stop). Reading a sample is one `pread`, and
its tar headers are parsed again in that buffer, so names, sizes and fields take no room in the index. Members that are
not used (a .npy of features, say) are read along with it.

The index of a set of shards is one memory-mapped .npy file, see `indexes.find_or_build`. Its name depends on the paths,
sizes and times of change of the shards, so it is never older than they are, and any number of processes and hosts share
it. One file for the whole set rather than one per shard means one mapping per worker and one path per pickle, however
many shards there are; their names follow the spans in the same file, as JSON.

Shards behind a URL (gs://, s3://, https://) are read in ranges, a request per sample. To index them, requests of 1 MiB
walk from header to header: larger members are skipped, smaller ones pass with their neighbours, for a request of their
own would take longer than their transfer.

Indexing takes some 10 us of a core for each sample, and large sets are indexed by a process for each core. Groups of 16
shards leave `parts` beside the index, so a build that was interrupted goes on when the set is opened again within a
day, and hosts that share the folder share the work. They are deleted when the index is there.

| field | members, the first that is there |
|---|---|
| image | `files.IMAGE_SUFFIXES`: .jpg .jpeg .png .webp and more |
| captions | a list in .json ("captions", "caption", "text"); else .txt; else a string in .json |
| label | .cls, a whole number |
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import errno
from functools import cached_property, partial
import io
import json
from pathlib import Path
import re
import shutil
import sys
from typing import Any, NamedTuple

from absl import logging
from jaxtyping import Int64
import numpy as np

from declip_jax.data.sources.base import BadSample, Example
from declip_jax.data.storage import files, indexes, jobs, patterns, tars

_IMAGES = tuple(suffix.removeprefix(".") for suffix in files.IMAGE_SUFFIXES)
_CAPTION_KEYS = ("captions", "caption", "text")  # of the .json; img2dataset writes "caption"
_INDEX_FORMAT = 3  # part of the hash: raise it when the index or the rules for usable samples change
_GROUP = 16  # shards of a part; as many threads scan them, which hides the latency of disks and servers
_ALONE = 2**32  # bytes of shards, some seconds of work; from there on it pays to start other processes
_PROGRESS = 10.0  # seconds between its lines
_SHOWN = 8  # suffixes that an error lists


class WebDataset:
  """Tar shards as a `Source`; make it with `open_webdataset`."""

  def __init__(self, name: str, index: Path):
    self.name = name
    self._index = index

  @cached_property
  def _opened(self) -> tuple[Int64[np.ndarray, "n 3"], dict[str, Any]]:
    """The spans, still mapped but without the slow indexing of np.memmap, and what follows them in the file."""
    try:
      spans = np.load(self._index, mmap_mode="r")
      with self._index.open("rb") as file:
        file.seek(spans.offset + spans.nbytes)
        return np.asarray(spans), json.load(file)
    except (ValueError, EOFError) as error:
      raise ValueError(f"{self._index}: a damaged index ({error}): delete it, and it is built anew") from error

  @property
  def stamp(self) -> str:
    """Changes when the shards do."""
    return self._index.stem

  @cached_property
  def classnames(self) -> tuple[str, ...]:
    """Line i of classnames.txt beside the first shard is class i; empty without that file."""
    return files.classnames(self._opened[1]["shards"][0])

  @property
  def skipped(self) -> dict[str, int]:
    """Samples without an image and shards with damage, by reason, as counted when the shards were indexed."""
    return dict(self._opened[1]["skipped"])

  def __len__(self) -> int:
    return len(self._opened[0])

  def __getitem__(self, index: int) -> Example:
    """Reads one sample; without a caption, or with empty ones, it still comes, and so it does without a class.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: the shard cannot be read or changed since it was indexed, or the .json or .cls cannot be parsed.
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
      raise BadSample("missing file", f"{place}: {error}") from error
    except ValueError as error:  # no tar header
      raise BadSample("damaged record", f"{place}: {error}; the shard changed since it was indexed") from None
    contents = {member.suffix: buffer[member.data : member.stop] for member in members}
    image = next((contents[suffix] for suffix in _IMAGES if suffix in contents), None)
    if len(buffer) < stop - start or image is None or len({member.key for member in members}) > 1:
      raise BadSample("damaged record", f"{place}: the shard changed since it was indexed, open it again")
    place = f"{path.rpartition('/')[2]}:{members[0].key}"
    label = _label(contents.get("cls", b"-1"), len(self.classnames), place)
    return Example(image=image, captions=_captions(contents, place), label=label, id=place)

  def __getstate__(self) -> dict[str, Any]:
    return {"name": self.name, "_index": self._index}

  def __repr__(self) -> str:
    return f"WebDataset({self.name!r})"


def open_webdataset(location: str) -> WebDataset:
  """Opens a set of shards, and indexes them first if no index of just these files is found.

  Samples without an image are left out and counted in `skipped`. Of a shard that is cut off or damaged somewhere, the
  samples before that place stay, except for the last if it may lack a member; the shard is named in the log and counted
  once, as is one without a sample. Without a caption a sample stays: self-supervision and classification need none.

  Args:
    location: of .tar files, as `patterns.expand` reads it: `train-*.tar`, `gs://bucket/train-{0000..0012}.tar`.

  Raises:
    FileNotFoundError: a pattern matches no file, or a shard of a range is missing.
    ValueError: no sample is usable, as where the shards are not plain tars.
  """
  shards = patterns.expand(location)
  stamps = files.stamps(shards)
  stamp = [_INDEX_FORMAT, list(zip(shards, stamps, strict=True))]
  sizes = [size for size, _ in stamps]
  build = partial(_build, key=indexes.digest(stamp), shards=shards, sizes=sizes, location=location)
  index = indexes.find_or_build(stamp, shards[0], build, ".npy")
  shutil.rmtree(_parts_of(index.parent, index.stem), ignore_errors=True)
  return WebDataset(f"webdataset:{location}", index)


def _parts_of(folder: Path, key: str) -> Path:
  """The folder of the parts of an index; by its dot `indexes.find_or_build` knows what it may delete when it is old."""
  return folder / f".{key}.parts"


def _build(path: Path, key: str, shards: list[str], sizes: list[int], location: str) -> None:
  """Writes the index: the spans `[n 3]` of the usable samples, then JSON.

  Args:
    path: to write to. The index itself will lie beside it; when it does, another process was faster.
    key: stem of the name of the index.
    shards: paths.
    sizes: in bytes.
    location: for messages.
  """
  folder, index = _parts_of(path.parent, key), path.with_name(f"{key}.npy")
  numbered = list(zip(range(len(shards)), shards, sizes, strict=True))
  groups = [numbered[start : start + _GROUP] for start in range(0, len(shards), _GROUP)]
  todo = [jobs.Job(folder / f"{number:06d}", group, len(group)) for number, group in enumerate(groups)]
  processes = jobs.cores() if len(groups) > 1 and sum(sizes) >= _ALONE else 1

  def report(count: int) -> None:
    print(f"indexing {count} of {len(shards)} shards of {location} ...", file=sys.stderr, flush=True)

  try:
    jobs.make(make_part, todo, processes if processes > 1 else 0, index.is_file, report, _PROGRESS)
    _join([part.path for part in todo], path, shards, location)
  except (OSError, ValueError) as error:
    if isinstance(error, ValueError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
      shutil.rmtree(folder, ignore_errors=True)  # these shards have no index, or another folder will have it
    raise
  finally:
    with contextlib.suppress(OSError):
      folder.rmdir()  # if there is nothing in it


def make_part(path: Path, shards: list[tuple[int, str, int]], tell: Callable[[], None]) -> None:
  """Writes the part of an index that neighbouring shards are: a line of JSON, then their spans `[m 3]`, raw.

  Args:
    path: to write to.
    shards: number, path and size of each.
    tell: is called after each.
  """

  def scan(shard: tuple[int, str, int]) -> _Scan:
    found = _scan(*shard[1:])
    tell()
    return found

  with ThreadPoolExecutor(len(shards)) as pool:
    scans = list(pool.map(scan, shards))
  about = [scan._replace(spans=len(scan.spans)) for scan in scans]
  with path.open("wb") as file:
    file.write(json.dumps(about).encode() + b"\n")
    for (number, *_), scan in zip(shards, scans, strict=True):
      file.write(np.insert(scan.spans, 0, number, axis=1).tobytes())


def _join(made: list[Path], path: Path, shards: list[str], location: str) -> None:
  """Writes the index from its parts, one after the other."""
  scans = []
  for part in made:
    with part.open("rb") as file:
      scans += [_Scan(*scan) for scan in json.loads(file.readline())]
  count, skipped = sum(scan.spans for scan in scans), sum((Counter(scan.skipped) for scan in scans), Counter())
  for scan in scans:
    if scan.damage:
      logging.warning("%s; the %d samples before it are kept", scan.damage, scan.spans)
  if not count:
    seen = sum((Counter(scan.suffixes) for scan in scans), Counter()).most_common(_SHOWN)
    found = f"; of samples without an image there are {', '.join(f'.{name}' for name, _ in seen)}" if seen else ""
    damage = next((f"; {scan.damage}" for scan in scans if scan.damage), "")
    legal = " ".join(files.IMAGE_SUFFIXES)
    raise ValueError(
      f"{location}: no usable sample in {len(shards)} shards, skipped {dict(skipped)}{damage}{found}; expected {legal} "
      "after the first dot of a name"
    )
  index = np.lib.format.open_memmap(path, "w+", np.int64, (count, 3))
  start = 0
  for part in made:
    with part.open("rb") as file:
      file.readline()
      spans = np.frombuffer(file.read(), np.int64).reshape(-1, 3)
    index[start : start + len(spans)] = spans
    start += len(spans)
  index.flush()
  with path.open("ab") as file:
    file.write(json.dumps({"shards": shards, "skipped": skipped}).encode())


class _Scan(NamedTuple):
  """What is in one shard.

  Attributes:
    spans: start and stop of the usable samples, in bytes; in a part their number alone.
    skipped: counts of the others, and of the damage, by kind of `BAD`.
    suffixes: of members of samples that have no image, the most frequent ones.
    damage: what ends the shard early, with its place; empty if nothing does.
  """

  spans: Int64[np.ndarray, "m 2"] | int
  skipped: Counter[str]
  suffixes: Counter[str]
  damage: str


def _scan(path: str, size: int) -> _Scan:
  spans, skipped, suffixes, damage = [], Counter(), Counter(), ""
  with files.open_stream(path) as file:
    try:
      for sample in _samples(tars.members(file, size)):
        if sample[-1].stop > size:
          raise ValueError(f"byte {sample[-1].start}: cut off within this member")
        if any(member.suffix in _IMAGES for member in sample):
          spans.append((sample[0].start, sample[-1].stop))
        else:
          skipped["missing file"] += 1
          suffixes.update({member.suffix for member in sample})
      if not spans and not skipped:
        raise ValueError(f"no sample in its {size} bytes")
    except ValueError as error:
      skipped["damaged record"] += 1
      damage = f"{path}, {error}"
  return _Scan(np.array(spans, np.int64).reshape(-1, 2), skipped, Counter(dict(suffixes.most_common(_SHOWN))), damage)


def _samples(members: Iterable[tars.Member]) -> Iterator[list[tars.Member]]:
  """Neighbours of the same key, each suffix once; where `members` ends in an error, the last sample is left out."""
  sample: list[tars.Member] = []
  key, suffixes = "", set()
  for member in members:
    if member.key != key or member.suffix in suffixes:
      if sample:
        yield sample
      sample, key, suffixes = [], member.key, set()
    sample.append(member)
    suffixes.add(member.suffix)
  if sample:
    yield sample


def _captions(fields: dict[str, bytes], place: str) -> tuple[str, ...]:
  values = _json_captions(fields["json"], place) if "json" in fields else []
  many = next((value for value in values if isinstance(value, list)), [])
  one = [value for value in values if isinstance(value, str)]
  return _strip(many) or _strip([fields.get("txt", b"").decode("utf-8", "replace")]) or _strip(one)[:1]


def _json_captions(text: bytes, place: str) -> list[Any]:
  try:
    parsed = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise BadSample("damaged record", f"{place}: bad .json: {error}") from None
  return [parsed[key] for key in _CAPTION_KEYS if key in parsed] if isinstance(parsed, dict) else []


def _strip(captions: Iterable[Any]) -> tuple[str, ...]:
  stripped = (text.strip() for text in captions if isinstance(text, str))
  return tuple(filter(None, stripped))


def _label(text: bytes, classes: int, place: str) -> int:
  label = int(text) if re.fullmatch(rb"\s*-?\d+\s*", text) else None
  if label is None or label < -1 or (classes and label >= classes):
    legal = f"to {classes - 1}, the last line of classnames.txt" if classes else "up"
    message = f"{place}: bad .cls {text[:40]!r}: expected a whole number from -1 {legal}"
    raise BadSample("damaged record", message)
  return label

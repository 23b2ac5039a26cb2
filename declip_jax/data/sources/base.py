"""The interface of sources, on which the input pipeline relies, and the rule by which errors become bad samples."""

from collections.abc import Mapping
import errno
from functools import cached_property
from typing import Protocol, TypedDict, runtime_checkable

from jaxtyping import Int8
import numpy as np

from declip_jax.data.storage import files, layouts
from declip_jax.data.text.cleaning import has_text

# The kinds of bad samples.
BAD = (
  "missing file",  # or member of an archive, or it cannot be read
  "not allowed",  # a path or URL in the data that leads outside its root
  "empty image",  # without bytes
  "unknown format",  # not a known image format
  "damaged image",  # cut off or not decodable
  "too many pixels",
  "no caption",
  "no label",  # or one that is not among the classes
  "damaged record",  # the description of the sample cannot be parsed: its .json, its class, its line
  "too large",  # more bytes than `files.MAX_BYTES`
  "too slow",  # not read within config.data.max_seconds
  "fatal",  # processes died while reading it
  "unexpected error",  # an error of any other type
  "read error",  # a disk, a mount or a network failed, also when the read was retried
)
READ_ERROR = BAD[-1]  # may be gone at another time
OF_MEDIA = (READ_ERROR, "too slow")  # where many samples in a row are bad, a disk, a mount or a network fails
# Errors of the whole machine: of memory, of descriptors and of the disk that copies are written to.
_SHORTAGES = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT}
_LABELS = 2**31  # labels are int32 on devices


class BadSample(ValueError):
  """A sample that cannot be used; the pipeline counts it and uses another one.

  Attributes:
    kind: one of `BAD`.
  """

  def __init__(self, kind: str, message: str):
    super().__init__(message)
    self.kind = kind

  def __reduce__(self) -> tuple[type, tuple[str, str]]:
    return BadSample, (self.kind, str(self))  # so that worker processes can raise it


_MESSAGE = 500  # characters of an error's message that are kept


def bad_sample(error: BaseException, place: str) -> BadSample:
  """Converts an error that was raised while a sample was read or made into views to an error about that sample.

  Every error is, whatever its type: a library may raise anything for bad bytes, and a Rust library may panic with an
  error that is not an `Exception`. The exceptions are errors that another sample would meet too.

  Args:
    error: the error; the kind of a `BadSample` is kept.
    place: name of the sample, which the message begins with.

  Raises:
    MemoryError: memory ran out; the message names the sample.
    OSError: open files or space on the disk ran out; the message names the sample.
    KeyboardInterrupt, SystemExit: the same error, with a note that names the sample.
  """
  reason = _reason(error)
  if isinstance(error, BadSample):
    return error if place in reason else BadSample(error.kind, f"{place}: {reason}")
  number = error.errno if isinstance(error, OSError) else None
  if isinstance(error, MemoryError) or number == errno.ENOMEM:
    raise MemoryError(f"{place}: memory ran out: {reason}") from error
  if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
    error.add_note(f"while reading {place}")
    raise error
  if isinstance(error, files.TooLarge):
    return BadSample("too large", f"{place}: {reason}")
  if number in _SHORTAGES:
    raise OSError(number, f"{place}: {reason}") from error
  if isinstance(error, OSError):
    return BadSample("read error" if number in files.PASSING else "missing file", f"{place}: {reason}")
  return BadSample("unexpected error", f"{place}: {type(error).__name__}: {reason}")


def _reason(error: BaseException) -> str:
  """The message of an error on one line, shortened if it is very long."""
  try:
    return " ".join(str(error).split())[:_MESSAGE]
  except Exception:  # the description of an error may fail, too
    return ""


class Marks(TypedDict, total=False):
  """The fields of an example that only evaluations read; a source either has one for all of its examples or for none.

  Attributes:
    labels: for data with several labels per image, 1 for a class that is present, -1 for one that is absent, 0 for one
      that does not count, such as VOC's difficult objects.
    groups: the group of the image in each grouping, such as its region; -1 for none.
  """

  labels: Int8[np.ndarray, "classes"]
  groups: Mapping[str, int]


class Example(Marks):
  """One example as the source stores it: not decoded, augmented or tokenized.

  Attributes:
    image: the encoded image, or uint8 pixels `[h w 3]`.
    captions: captions, stripped and not empty; there may be none if only a class is known.
    label: the class, -1 for none.
    id: where the example comes from, for error messages.
  """

  image: bytes | np.ndarray
  captions: tuple[str, ...]
  label: int
  id: str


@runtime_checkable
class Source(Protocol):
  """Random access to examples, for grain; pickles to a few kilobytes, for worker processes.

  Attributes:
    name: the spec that opened the source.
    classnames: the names of classes 0, 1, ...; empty without classes.
    skipped: number of samples that were skipped when the source was opened, by kind of `BAD`.
    left_out: number of files that belong to no sample, by suffix, such as those in a format that is not read.
    stamp: a text that changes with the data.
  """

  @property
  def name(self) -> str: ...

  @property
  def classnames(self) -> tuple[str, ...]: ...

  @property
  def skipped(self) -> dict[str, int]: ...

  @property
  def left_out(self) -> dict[str, int]: ...

  @property
  def stamp(self) -> str: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example:
    """Reads one example.

    Raises:
      BadSample: this example cannot be used; others can.
    """
    ...


class Named:
  """A source with its name, of which nothing was skipped or left out when it was opened.

  Args:
    name: the spec that opened the source.
  """

  def __init__(self, name: str):
    self.name = name

  @property
  def skipped(self) -> dict[str, int]:
    """Numbers of skipped samples by kind."""
    return {}

  @property
  def left_out(self) -> dict[str, int]:
    """Numbers of files that belong to no sample, by suffix."""
    return {}

  def __len__(self) -> int:
    raise NotImplementedError

  def _check(self, index: int, noun: str = "sample") -> None:
    """Rejects an index without a sample.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name}: no {noun} {index}, there are {len(self)}")

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self.name!r})"


class OfFiles(Named):
  """A source of files with the names of classes and the prompt templates beside them."""

  @property
  def _first_file(self) -> str:
    """The path of the first file."""
    raise NotImplementedError

  @cached_property
  def classnames(self) -> tuple[str, ...]:
    """Line i of classnames.txt, see `layouts.find`, is class i; empty without that file."""
    return layouts.classnames(self._first_file)

  @cached_property
  def templates(self) -> tuple[str, ...]:
    """Prompt templates next to the data, see `layouts.templates`; empty without that file."""
    return layouts.templates(self._first_file)


class Wrapper(Named):
  """A source around another one, of which it has a part, or all with other images.

  Args:
    name: the spec that opened this source.
    source: the other one.
  """

  def __init__(self, name: str, source: Source):
    super().__init__(name)
    self._source = source

  @property
  def classnames(self) -> tuple[str, ...]:
    return self._source.classnames

  @property
  def templates(self) -> tuple[str, ...]:
    """The prompt templates of the other source; () if it has none."""
    return getattr(self._source, "templates", ())

  @property
  def skipped(self) -> dict[str, int]:
    """Numbers of skipped samples of the whole other source, by kind."""
    return self._source.skipped

  @property
  def left_out(self) -> dict[str, int]:
    """Numbers of files that belong to no sample of the whole other source, by suffix."""
    return self._source.left_out

  @property
  def stamp(self) -> str:
    """The stamp of the other source; the names of the two differ."""
    return self._source.stamp


def read_example(source: Source, index: int) -> Example:
  """Reads one example, without captions that have no text.

  Raises:
    BadSample: it cannot be used, for whatever reason; the message names it.
    MemoryError, OSError, KeyboardInterrupt, SystemExit: see `bad_sample`.
  """
  try:
    example = source[index]
    label, captions, image, place = (example[field] for field in ("label", "captions", "image", "id"))
    if isinstance(image, bytes) and len(image) > files.MAX_BYTES:
      raise BadSample("too large", f"{place}: an image of {len(image):,} bytes, expected at most {files.MAX_BYTES:,}")
    if not -1 <= label < _LABELS:
      raise BadSample("damaged record", f"{place}: label {label}: expected -1, or 0 to {_LABELS - 1}")
    if not all(map(has_text, captions)):
      return {**example, "captions": tuple(filter(has_text, captions))}
    return example
  except BaseException as error:
    if isinstance(error, BadSample):
      raise
    raise bad_sample(error, f"{source.name}: sample {index}") from error

"""The interface of sources, on which the input pipeline relies."""

from typing import Protocol, TypedDict, runtime_checkable

import numpy as np

# The kinds of bad samples.
BAD = (
  "missing file",  # or member of an archive, or it cannot be read
  "not allowed",  # a path or URL in the data that leads out of its root
  "empty image",  # without bytes
  "unknown format",  # not a known image format
  "damaged image",  # cut off or not decodable
  "too many pixels",
  "no caption",
  "damaged record",  # the description of the sample cannot be parsed: its .json, its class, its line
)


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


class Example(TypedDict):
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

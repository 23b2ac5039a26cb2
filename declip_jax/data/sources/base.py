"""What every source of examples gives, and what the input pipeline may rely on."""

from typing import Protocol, TypedDict, runtime_checkable

import numpy as np

# Why a sample cannot be used.
BAD = (
  "missing file",  # or member, or it cannot be read
  "empty image",  # of no bytes
  "unknown format",  # the bytes are no image that we know
  "damaged image",  # cut off, or it cannot be decoded
  "too many pixels",
  "no caption",
  "damaged record",  # what describes the sample cannot be parsed: its .json, its class, its line
)


class BadSample(ValueError):
  """A sample that cannot be used: the pipeline takes another and counts it.

  Attributes:
    kind: one of `BAD`.
  """

  def __init__(self, kind: str, message: str):
    super().__init__(message)
    self.kind = kind

  def __reduce__(self) -> tuple[type, tuple[str, str]]:
    return BadSample, (self.kind, str(self))  # without it, to cross from a worker process fails


class Example(TypedDict):
  """One example as it lies in the source: nothing decoded, augmented or tokenized.

  Attributes:
    image: the encoded file, or uint8 pixels `[h w 3]`.
    captions: stripped, none of them empty; may be no caption at all where only a class is known.
    label: the class, -1 for none.
    id: where it came from, for error messages.
  """

  image: bytes | np.ndarray
  captions: tuple[str, ...]
  label: int
  id: str


@runtime_checkable
class Source(Protocol):
  """Random access to examples, which is all that grain needs; pickles to a few kilobytes, for its worker processes.

  Attributes:
    name: the spec that opened it.
    classnames: the names of classes 0, 1, ...; empty if there are none.
    skipped: how many samples were left out when the source was opened, by reason.
    stamp: a text that changes when the data do.
  """

  @property
  def name(self) -> str: ...

  @property
  def classnames(self) -> tuple[str, ...]: ...

  @property
  def skipped(self) -> dict[str, int]: ...

  @property
  def stamp(self) -> str: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example:
    """Reads one example.

    Raises:
      BadSample: this one cannot be used; others can.
    """
    ...

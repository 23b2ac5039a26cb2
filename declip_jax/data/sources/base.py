"""What every source of examples gives, and what the input pipeline may rely on."""

from typing import Protocol, TypedDict

import numpy as np


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


class Source(Protocol):
  """Random access to examples, which is all that grain needs; pickles to a few kilobytes, for its worker processes.

  Attributes:
    name: the spec that opened it.
    classnames: the names of classes 0, 1, ...; empty if there are none.
    skipped: how many samples were left out when the source was opened, by reason.
  """

  @property
  def name(self) -> str: ...

  @property
  def classnames(self) -> tuple[str, ...]: ...

  @property
  def skipped(self) -> dict[str, int]: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...

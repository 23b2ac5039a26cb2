"""A fixed random subset of another source for evaluation, and the rest of that source for training.

`heldout:1%:SPEC` and `kept:1%:SPEC` are disjoint and together contain all samples of SPEC. Instead of a fraction, a
number of samples can be given, or both: `heldout:10%,5000:SPEC` is the smaller of the two. A fraction leaves at least
one sample on each side. The division depends only on the number of samples of SPEC and on these numbers, so it never
changes.
"""

from collections.abc import Callable
from fractions import Fraction
import math

from declip_jax.data.sources.base import Example, Source, Wrapper
from declip_jax.spelling import counted

_ROUNDS = 4
_MASK = 2**64 - 1


class Subset(Wrapper):
  """Positions `start` to `stop` of a random order of a source, as a `Source`; see `open_heldout` and `open_kept`."""

  def __init__(self, name: str, source: Source, start: int, stop: int):
    super().__init__(name, source)
    self._start, self._stop = start, stop

  @property
  def division(self) -> str:
    """Which part of the source it is, in words."""
    if not self._start:
      return f"the {self._stop:,} held out of {len(self._source):,}"
    return f"all but the {self._start:,} held out of {len(self._source):,}"

  def __len__(self) -> int:
    return self._stop - self._start

  def __getitem__(self, index: int) -> Example:
    """Reads one example of the subset.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: raised by the source.
    """
    self._check(index)
    return self._source[shuffled(self._start + index, len(self._source))]


def open_heldout(location: str, open_source: Callable[[str], Source]) -> Subset:
  """Opens the held-out subset: "1%:webdataset:/data/train-*.tar", "0.01:...", "5000:..." or "1%,5000:...".

  Args:
    location: SIZE:SPEC, where SPEC is the source that is divided, and SIZE a fraction, a number of samples, or both,
      separated by a comma, of which the smaller subset is held out.
    open_source: function that opens SPEC.

  Raises:
    ValueError: the size is neither a fraction between 0 and 1 nor a whole number, a subset is empty, or the source
      raises it.
  """
  return _open("heldout", location, open_source)


def open_kept(location: str, open_source: Callable[[str], Source]) -> Subset:
  """Opens everything except the held-out subset of the same location; see `open_heldout`."""
  return _open("kept", location, open_source)


def share_samples(train: str, test: str) -> bool:
  """Whether two specs name samples of one source in common, as far as the specs tell."""
  (kind, size, spec), (other_kind, other_size, other_spec) = (_parts(one) for one in (train, test))
  return spec == other_spec and (size != other_size or {kind, other_kind} != {"heldout", "kept"})


def _parts(spec: str) -> tuple[str, str, str]:
  """The kind of a subset, its size and the source that is divided; empty texts before a source that is not divided."""
  kind, _, location = spec.partition(":")
  if kind not in ("heldout", "kept"):
    return "", "", spec
  size, _, source = location.partition(":")
  return kind, size, source


def _open(kind: str, location: str, open_source: Callable[[str], Source]) -> Subset:
  text, _, spec = location.partition(":")
  name = f"{kind}:{location}"
  sizes = [_size(one) for one in text.split(",")]
  if not all(sizes) or not spec:
    raise ValueError(
      f"bad source {name!r}: expected {kind}:SIZE:SPEC, with a fraction such as 1% or 0.01, a number of samples such "
      "as 5000, or both, as in 1%,5000"
    )
  source = open_source(spec)
  total = len(source)
  cut = min(min(max(1, round(size * total)), total - 1) if size < 1 else int(size) for size in sizes)
  if not 0 < cut < total:
    remedy = f"add samples to {spec}" if total < 2 else f"hold out fewer, or add samples to {spec}"
    raise ValueError(f"{name}: {text} of {counted(total, 'sample')} leaves none on one side: {remedy}")
  return Subset(name, source, *((0, cut) if kind == "heldout" else (cut, total)))


def _size(text: str) -> Fraction:
  """A fraction below 1 or a whole number; 0 for a text that is neither."""
  try:
    size = Fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1)  # exact: 0.7% is 0.007
  except (ValueError, ZeroDivisionError):
    return Fraction()
  is_count = size.denominator == 1 and not text.endswith("%")
  return size if 0 < size < 1 or (size >= 1 and is_count) else Fraction()


def shuffled(index: int, count: int) -> int:
  """Returns the image of `index` under a fixed permutation of `range(count)`, without a table.

  A generalised Feistel network with cycle walking (Black and Rogaway 2002, sections 4 and 5).
  Changing it would mix held-out samples into training.
  """
  a = math.isqrt(count - 1) + 1
  b = -(-count // a)
  while True:
    right, left = divmod(index, a)
    for number in range(_ROUNDS):
      left = (left + _hash(right, 2 * number)) % a
      right = (right + _hash(left, 2 * number + 1)) % b
    index = right * a + left
    if index < count:  # nearly always: a * b - count < a
      return index


def _hash(value: int, number: int) -> int:
  """64 random-looking bits: the finaliser of SplitMix64 (Steele et al. 2014), variant 13 of Stafford."""
  x = (value + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
  x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
  return x ^ x >> 31

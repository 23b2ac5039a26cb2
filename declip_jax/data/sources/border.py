"""Another source, of whose images a border is cut off, such as the red frame of those of ObjectNet: `border:2:SPEC`."""

from collections.abc import Callable

from declip_jax.data import images
from declip_jax.data.sources.base import BadSample, Example, Source, Wrapper, bad_sample, read_example

KIND = "border"


class WithoutBorder(Wrapper):
  """Another source, of whose images the same number of pixels is cut off at each side; see `open_border`."""

  def __init__(self, name: str, source: Source, border: int):
    super().__init__(name, source)
    self._border = border

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    """Reads one example, with the pixels of its image in place of the encoded image.

    An image may have `images.MAX_PIXELS` pixels; another limit, which is one of encoded images, has no effect.
    The border is part of its id, so that results with and without the border are not results of the same data.

    Raises:
      BadSample: raised by the source, or the image cannot be decoded, or nothing would be left of it.
    """
    example = read_example(self._source, index)
    if not self._border:
      return example
    try:
      pixels = images.decode(example["image"])
      cut = pixels[self._border : -self._border, self._border : -self._border]
      if not cut.size:
        height, width = pixels.shape[:2]
        raise BadSample("damaged image", f"{width} x {height} pixels, but its border has {self._border} on each side")
    except BaseException as error:
      raise bad_sample(error, example["id"]) from error
    return {**example, "image": cut, "id": f"{example['id']}, without its border of {self._border}"}


def open_border(location: str, open_source: Callable[[str], Source]) -> WithoutBorder:
  """Opens a source whose images lack their border: "2:folder:/data/objectnet/images".

  Args:
    location: PIXELS:SPEC, the width of the border and the source that has it; 0 says that there is no border.
    open_source: function that opens SPEC.

  Raises:
    ValueError: PIXELS is not an integer of at least 0, or the source raises it.
  """
  text, _, spec = location.partition(":")
  name = f"{KIND}:{location}"
  if not (text.isascii() and text.isdecimal()) or not spec:
    raise ValueError(f"bad source {name!r}: expected {KIND}:PIXELS:SPEC, with a number of pixels such as 2")
  return WithoutBorder(name, open_source(spec), int(text))

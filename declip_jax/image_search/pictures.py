"""The images of a source by their numbers: thumbnails, and the encoded images as they are."""

import functools
import io
import threading
from typing import NamedTuple

import cv2
from PIL import Image
import simplejpeg

from declip_jax.data import images
from declip_jax.data.sources import BadSample, Source, read_example

_SIDE = 320  # pixels of the longer side of a thumbnail
_QUALITY = 85  # of its JPEG
_KEPT = 1024  # thumbnails; some 20 KB each
_DECODED = 2  # images that are decoded at once
# Media types of the formats of `images.format_of`; a file in any other format is not sent.
_MEDIA_TYPES = {
  "JPEG": "image/jpeg",
  "PNG": "image/png",
  "GIF": "image/gif",
  "WEBP": "image/webp",
  "BMP": "image/bmp",
  "TIFF": "image/tiff",
  "PPM": "image/x-portable-anymap",
  "JPEG2000": "image/jp2",
  "AVIF": "image/avif",
}


class Picture(NamedTuple):
  """An encoded image and its media type."""

  content: bytes
  media_type: str


class Pictures:
  """Thumbnails and encoded images of a source, for several threads.

  Args:
    source: the images.
    max_pixels: largest number of pixels of an image, see `images.open_photo`.
  """

  def __init__(self, source: Source, max_pixels: int):
    self._source, self._max_pixels = source, max_pixels
    self._decoding = threading.BoundedSemaphore(_DECODED)
    self.thumbnail = functools.lru_cache(_KEPT)(self._thumbnail)

  def _thumbnail(self, number: int) -> Picture:
    """A JPEG of an image, whose longer side has at most 320 pixels.

    Raises:
      BadSample: the image cannot be read.
    """
    with self._decoding:
      photo = images.open_photo(self._image(number), self._max_pixels)
      pixels, _ = photo.decode(max(photo.height, photo.width) // _SIDE)
    scale = _SIDE / max(pixels.shape[:2])
    if scale < 1:
      height, width = (max(1, round(scale * side)) for side in pixels.shape[:2])
      pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return Picture(simplejpeg.encode_jpeg(pixels.copy(order="C"), _QUALITY), "image/jpeg")

  def original(self, number: int) -> Picture:
    """The encoded image as it is in the source; PNG if the source has pixels.

    Raises:
      BadSample: it cannot be read, or is not an image.
    """
    image = self._image(number)
    if not isinstance(image, bytes):
      with self._decoding:
        file = io.BytesIO()
        Image.fromarray(images.decode(image, self._max_pixels)).save(file, "PNG")
        return Picture(file.getvalue(), "image/png")
    kind = images.format_of(image)
    if kind not in _MEDIA_TYPES:
      raise BadSample("unknown format", f"image {number} is {kind}: expected one of {', '.join(_MEDIA_TYPES)}")
    return Picture(image, _MEDIA_TYPES[kind])

  def _image(self, number: int) -> bytes:
    return read_example(self._source, number)["image"]

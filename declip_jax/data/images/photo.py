"""Images whose height and width are known before they are decoded, and what becomes of those that cannot be."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import io

import cv2
from jaxtyping import UInt8
import numpy as np
from PIL import Image, features
import simplejpeg

from declip_jax.data.sources.base import BadSample

Pixels = UInt8[np.ndarray, "h w 3"]
View = UInt8[np.ndarray, "size size 3"]

MAX_PIXELS = 2**26  # 8192 x 8192, 192 MiB decoded: more is a decompression bomb to us

# What Pillow may try. Others it knows are no photographs, some (EPS) start programs, some (TGA) are guessed from noise.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000") + ("AVIF",) * features.check("avif")
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Photo:
  """An image of known size that is decoded on demand, each time anew; made by `open_photo`.

  Attributes:
    height: in pixels.
    width: in pixels.
    source: the bytes of a file, an image of Pillow's, or pixels.
    reducible: whether it can be decoded at lower resolution: an ordinary JPEG.
  """

  height: int
  width: int
  source: bytes | np.ndarray | Image.Image
  reducible: bool = False

  def decode(self, factor: int = 1) -> tuple[Pixels, int]:
    """Pixels, and how many times lower their resolution is than the image's: 8, 4, 2 or 1, at most `factor`.

    libjpeg-turbo leaves out the high frequencies of each block of 8 x 8 then; pixel `i` covers those from `n * i` up to
    `n * (i + 1)` of the image, for a number of times `n`.

    Raises:
      BadSample: the image is damaged.
    """
    if isinstance(self.source, np.ndarray):
      return self.source, 1
    if self.reducible:
      times = next(times for times in (8, 4, 2, 1) if times <= max(factor, 1))
      try:
        # The smallest size that is at least the given one: also faster than others, which have no vector code.
        height, width = -(-self.height // times), -(-self.width // times)
        return simplejpeg.decode_jpeg(self.source, "RGB", min_height=height, min_width=width), times
      except ValueError:
        pass  # also harmless damage (stray bytes), which Pillow forgives
    with _opened(self.source) as image:
      pixels = _rgb(_pillow_pixels(image))
    if pixels.shape[:2] != (self.height, self.width):
      height, width = pixels.shape[:2]
      raise BadSample("damaged image", f"{width} x {height} pixels, and {self.width} x {self.height} in its header")
    return pixels, 1


def open_photo(image: bytes | np.ndarray | Image.Image | Photo) -> Photo:
  """Reads the header of an encoded image, or checks an array.

  Args:
    image: a file's bytes, whatever its name said, in one of the formats of the web (JPEG, PNG, GIF, WebP, BMP, TIFF,
      PPM, JPEG 2000, AVIF if Pillow has it), an image of Pillow's, or uint8 `[h w]`, `[h w 1]`, `[h w 3]`, `[h w 4]`.

  Raises:
    BadSample: of no bytes, in no known format, or with more than `MAX_PIXELS`, which are not decoded to find out. The
      caller knows the name of the file.
    ValueError: an array of another type or shape.
  """
  if isinstance(image, Photo):
    return image
  if isinstance(image, np.ndarray):
    pixels = _rgb(image)
    return Photo(*pixels.shape[:2], pixels)
  if not isinstance(image, Image.Image):
    if not image:
      raise BadSample("empty image", "the image has 0 bytes")
    if size := _jpeg_size(image):
      return Photo(*_checked(*size), image, reducible=True)
  with _opened(image) as opened:
    return Photo(*_checked(opened.height, opened.width), image)


def decode(image: bytes | np.ndarray | Image.Image | Photo) -> Pixels:
  """Decodes an image into RGB, at its own resolution; of an animation the first frame.

  JPEG pixels equal Pillow's. As in torchvision's loaders, transparency is dropped (not blended with a background) and
  the EXIF orientation is ignored (but for TIFF, where Pillow obeys it). Unlike there, 16-bit grey keeps its range
  instead of clipping to white.

  Args:
    image: as of `open_photo`; an array `[h w 3]` is returned as it is, not copied.

  Raises:
    BadSample: as `open_photo`, or the image cannot be read completely.
    ValueError: as `open_photo`.
  """
  return open_photo(image).decode()[0]


def _checked(height: int, width: int) -> tuple[int, int]:
  if height * width > MAX_PIXELS:
    raise BadSample("too many pixels", f"{width} x {height} pixels are more than {MAX_PIXELS}")
  return height, width


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
  """Height and width of an ordinary JPEG; None leaves it to Pillow."""
  if not data.startswith(b"\xff\xd8\xff"):
    return None
  try:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
  except ValueError:
    return None
  return None if colours in ("CMYK", "YCCK") else (height, width)


@contextmanager
def _opened(source: bytes | Image.Image) -> Iterator[Image.Image]:
  """The image by Pillow, lazily; what goes wrong with it within the context is a `BadSample`."""
  try:
    if isinstance(source, Image.Image):
      yield source
    else:
      with Image.open(io.BytesIO(source), formats=_FORMATS) as image:
        yield image
  except BadSample:
    raise
  except Image.UnidentifiedImageError as error:
    raise BadSample("unknown format", f"no known image format (starts with {source[:8]!r})") from error
  except _BOMB as error:
    raise BadSample("too many pixels", f"more than {MAX_PIXELS} pixels: {error}") from error
  except Exception as error:  # decoders meet bad bytes with nearly any: OSError, SyntaxError, struct.error, ...
    raise BadSample("damaged image", f"cannot be decoded: {error}") from error


def _pillow_pixels(image: Image.Image) -> np.ndarray:
  if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to 255
    return np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
  image.load()
  image.info.pop("transparency", None)  # else Pillow warns, for each palette image, that it is lost
  return np.array(image.convert("RGB"))


def _rgb(image: np.ndarray) -> Pixels:
  channels = image.shape[2] if image.ndim == 3 else 1
  if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
    raise ValueError(f"image is {image.dtype}{list(image.shape)}; want uint8 [h w], [h w 1], [h w 3] or [h w 4]")
  if not image.size:
    raise BadSample("empty image", f"image is {image.dtype}{list(image.shape)}")
  if channels == 1:
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
  return image if channels == 3 else np.ascontiguousarray(image[:, :, :3])

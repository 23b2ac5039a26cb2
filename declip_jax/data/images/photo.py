"""Images whose size is known before they are decoded, and errors for those that cannot be decoded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import io
import math
import re

import cv2
from jaxtyping import UInt8
import numpy as np
from PIL import Image, TiffImagePlugin, features
import simplejpeg

from declip_jax.data.sources.base import BadSample

Pixels = UInt8[np.ndarray, "h w 3"]
View = UInt8[np.ndarray, "size size 3"]

MAX_PIXELS = 2**26  # 8192 x 8192, 192 MiB decoded; more counts as a decompression bomb
LARGEST_LIMIT = 178_956_970  # pixels; Pillow does not open larger images
# Pixels of these formats and modes count several times, since they take several times the memory or time.
_WEIGHTS = {"AVIF": 2, "CMYK": 2, "F": 2, "I": 2, "WEBP": 2, "JPEG2000": 4}
# Each scan of a JPEG takes as long to decode as a whole image; progressive ones have about 10.
_USUAL_SCANS, _MAX_SCANS, _SCANNED_PIXELS = 16, 100, 2**30
_SAMPLE_FORMAT = 339  # tag of a TIFF: 1 for unsigned numbers, as without it
_TILE_SIZE = (323, 322)  # tags of a TIFF: height and width of its tiles
_DARK = 64  # levels below 64 of 256 have 14 of 16 bits, see `deep_grey`
_STRIP = 2**20  # pixels that are converted at once
_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"

# Formats for Pillow. Most of its others are not for photographs, EPS starts programs, and noise is mistaken for TGA.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000") + ("AVIF",) * features.check("avif")
# Starts of files that are common among images and cannot be read.
_OTHER_FORMATS = {
  "HEIC": re.compile(rb"....ftyp(he[iv]|mif1|msf1)", re.DOTALL),
  "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
  "SVG": re.compile(rb"\s*<(\?xml|svg)"),
  "PDF": re.compile(rb"%PDF"),
  "a web page": re.compile(rb"\s*<(!doctype )?html", re.IGNORECASE),
}
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Photo:
  """An image of known size, decoded each time it is needed; made by `open_photo`.

  Attributes:
    height: height in pixels.
    width: width in pixels.
    source: the encoded image, a Pillow image, or pixels.
    reducible: whether it can be decoded at lower resolution, as ordinary JPEGs can.
  """

  height: int
  width: int
  source: bytes | np.ndarray | Image.Image
  reducible: bool = False

  def decode(self, factor: int = 1) -> tuple[Pixels, int]:
    """Returns pixels, and the factor `n` by which their resolution was reduced: 8, 4, 2 or 1, at most `factor`.

    libjpeg-turbo then omits the high frequencies of each block of 8 x 8; pixel `i` covers pixels `n * i` to
    `n * (i + 1)` of the image.

    Raises:
      BadSample: the image is damaged.
    """
    if isinstance(self.source, np.ndarray):
      return self.source, 1
    if self.reducible:
      reduction = next(n for n in (8, 4, 2, 1) if n <= max(factor, 1))
      try:
        # simplejpeg chooses the smallest size that is at least this one. Other factors are slower, without vector code.
        height, width = -(-self.height // reduction), -(-self.width // reduction)
        return simplejpeg.decode_jpeg(self.source, "RGB", min_height=height, min_width=width), reduction
      except ValueError:
        pass  # the damage may be harmless (stray bytes), and Pillow tolerates that
    with _opened(self.source) as image:
      # The header of JPEG 2000 may say 16 bits, but Pillow does not tell.
      is_deep = image.format == "JPEG2000" or any(";16" in str(tile) for tile in getattr(image, "tile", ()))
      pixels = _pillow_pixels(image)
    if is_deep and isinstance(self.source, bytes) and pixels.max() < _DARK:
      pixels = _deep_colour(self.source, pixels)
    if pixels.shape[:2] != (self.height, self.width):
      height, width = pixels.shape[:2]
      raise BadSample("damaged image", f"{width} x {height} pixels, but {self.width} x {self.height} in its header")
    return pixels, 1


def open_photo(image: bytes | np.ndarray | Image.Image | Photo, max_pixels: int = MAX_PIXELS) -> Photo:
  """Reads the header of an encoded image, or checks an array.

  Args:
    image: an encoded image, whatever the suffix of its file, as JPEG, PNG, GIF, WebP, BMP, TIFF, PPM, JPEG 2000 or, if
      Pillow has it, AVIF; a Pillow image; or uint8 `[h w]`, `[h w 1]`, `[h w 3]`, `[h w 4]`.
    max_pixels: largest number of pixels of an encoded image. Those of WebP, AVIF, CMYK and 32-bit grey count twice,
      those of JPEG 2000 four times, so that decoding takes some 10 bytes of memory per pixel at most.

  Raises:
    BadSample: no bytes, an unknown format, or more than `max_pixels` pixels by the header; callers add the name.
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
      return Photo(*_checked(*size, max_pixels, scans=_scans(image)), image, reducible=True)
  with _opened(image) as opened:
    kind = opened.mode if opened.mode in _WEIGHTS else opened.format
    if isinstance(opened, TiffImagePlugin.TiffImageFile):  # a tile may be larger than the image
      _checked(*(opened.tag_v2.get(tag, 1) for tag in _TILE_SIZE), max_pixels)
    scans = _scans(image) if isinstance(image, bytes) else 1
    return Photo(*_checked(opened.height, opened.width, max_pixels, kind, scans), image)


def decode(image: bytes | np.ndarray | Image.Image | Photo, max_pixels: int = MAX_PIXELS) -> Pixels:
  """Decodes an image to RGB at full resolution; the first frame of an animation.

  JPEG pixels equal Pillow's. As in torchvision's loaders, transparency is dropped (not blended with a background) and
  the EXIF orientation is ignored (except in TIFF, where Pillow applies it). Unlike torchvision's, grey of more than 8
  bits keeps its contrast instead of being clipped to white; see `deep_grey`.

  Args:
    image: see `open_photo`; an array `[h w 3]` is returned without copying.
    max_pixels: see `open_photo`.

  Raises:
    BadSample: as in `open_photo`, or the image cannot be read completely.
    ValueError: as in `open_photo`.
  """
  return open_photo(image, max_pixels).decode()[0]


def _checked(height: int, width: int, max_pixels: int, kind: str | None = None, scans: int = 1) -> tuple[int, int]:
  weight = _WEIGHTS.get(kind or "", 1)
  if weight * height * width > max_pixels:
    counted = f", each of which counts {weight} times in {kind}," if weight > 1 else ""
    raise BadSample("too many pixels", f"{width} x {height} pixels{counted} are more than {max_pixels}")
  if scans > min(_MAX_SCANS, _SCANNED_PIXELS // max(height * width, 1)) and scans > _USUAL_SCANS:
    raise BadSample("damaged image", f"{scans} scans of {width} x {height} pixels would take too long to decode")
  return height, width


def _scans(data: bytes) -> int:
  """The number of scans of a JPEG, including those of its thumbnail; 1 for other formats."""
  return data.count(b"\xff\xda") if data.startswith(_JPEG) else 1


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
  """Height and width of an ordinary JPEG; None if Pillow should read it."""
  if not data.startswith(_JPEG):
    return None
  try:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
  except ValueError:
    return None
  return None if colours in ("CMYK", "YCCK") else (height, width)


@contextmanager
def _opened(source: bytes | Image.Image) -> Iterator[Image.Image]:
  """Opens an image with Pillow, lazily; errors of Pillow within the context become `BadSample`."""
  try:
    if isinstance(source, Image.Image):
      yield source
    else:
      with Image.open(io.BytesIO(_without_metadata(source)), formats=_FORMATS) as image:
        yield image
  except (BadSample, MemoryError):  # not a fault of the image, since its size was checked
    raise
  except Image.UnidentifiedImageError as error:
    named = next((f"{name}, which is " for name, start in _OTHER_FORMATS.items() if start.match(source)), "")
    raise BadSample("unknown format", f"{named}not a known image format (starts with {source[:8]!r})") from error
  except _BOMB as error:
    raise BadSample("too many pixels", str(error)) from error
  except Exception as error:  # decoders raise nearly anything for bad bytes: OSError, SyntaxError, struct.error, ...
    raise BadSample("damaged image", f"cannot be decoded: {error}") from error


def format_of(image: bytes) -> str:
  """The format of an encoded image by its header, such as "JPEG".

  Raises:
    BadSample: it is not an image.
  """
  with _opened(image) as opened:
    return opened.format or "unknown"


def _without_metadata(data: bytes) -> bytes:
  """A PNG without the chunks that do not change its pixels; Pillow rejects long texts and colour profiles."""
  if not data.startswith(_PNG):
    return data
  view, kept, place = memoryview(data), [], len(_PNG)
  while place + 8 <= len(data):
    end = place + 12 + int.from_bytes(view[place : place + 4], "big")
    if not view[place + 4] & 0x20:  # its name begins with a capital letter
      kept.append(view[place:end])
    place = end
  return b"".join([_PNG, *kept])


def _pillow_pixels(image: Image.Image) -> Pixels:
  """The pixels of an image, converted strip by strip: a copy of the whole would take more memory than the decoder."""
  image.load()
  if image.mode == "F" or image.mode.startswith("I"):
    return cv2.cvtColor(deep_grey(_levels(image)), cv2.COLOR_GRAY2RGB)
  image.info.pop("transparency", None)  # otherwise Pillow warns that each palette image loses it
  pixels, rows = np.empty((image.height, image.width, 3), np.uint8), max(1, _STRIP // image.width)
  for top in range(0, image.height, rows):
    strip = image.crop((0, top, image.width, min(top + rows, image.height)))
    pixels[top : top + rows] = np.asarray(strip.convert("RGB"))
  return pixels


def _deep_colour(source: bytes, dark: Pixels) -> Pixels:
  """The pixels of an image of 16 bits per channel of which Pillow kept the high ones; see `deep_grey`."""
  levels = cv2.imdecode(np.frombuffer(source, np.uint8), cv2.IMREAD_UNCHANGED)
  if levels is None or levels.dtype != np.uint16 or levels.ndim != 3 or levels.shape[:2] != dark.shape[:2]:
    return dark
  return deep_grey(levels[..., 2::-1].reshape(len(levels), -1)).reshape(dark.shape)


def _levels(image: Image.Image) -> np.ndarray:
  levels = np.asarray(image)
  unsigned = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_SAMPLE_FORMAT, (1,))[0] == 1
  return levels.view(np.uint32) if unsigned and levels.dtype == np.int32 else levels  # Pillow has only signed ones


def deep_grey(levels: np.ndarray) -> UInt8[np.ndarray, "h w"]:
  """Grey of any range in 8 bits, with its contrast.

  Files do not say which level is white, and 16 bits often contain 12. White is therefore the largest number with as
  many bits as the largest level has, where whole numbers have 8, 10, 12, ... bits; if all levels are between 0 and 1,
  white is 1. If there are negative levels, black is the smallest level and white the largest. Levels that are not
  finite count as 0.

  Args:
    levels: numbers of any type, `[h w]`.
  """
  finite = np.isfinite(levels)
  low, high = (bound(levels, where=finite, initial=0).item() for bound in (np.min, np.max))
  whole, bits = np.issubdtype(levels.dtype, np.integer), math.ceil(high).bit_length()
  made = np.empty(levels.shape, np.uint8)
  for row, line in enumerate(levels):  # of each row, since a copy of all would take more memory than the decoder
    if whole and low >= 0:
      made[row] = line >> max(0, bits + bits % 2 - 8)
    else:
      white = high if low < 0 else max(1, 2**bits - 1)
      made[row] = np.rint((np.where(finite[row], line, 0.0) - low) * (255 / max(white - low, 1e-300)))
  return made


def _rgb(image: np.ndarray) -> Pixels:
  channels = image.shape[2] if image.ndim == 3 else 1
  if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
    raise ValueError(f"image is {image.dtype}{list(image.shape)}; expected uint8 [h w], [h w 1], [h w 3] or [h w 4]")
  if not image.size:
    raise BadSample("empty image", f"image is {image.dtype}{list(image.shape)}")
  if channels == 1:
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
  return image if channels == 3 else np.ascontiguousarray(image[:, :, :3])

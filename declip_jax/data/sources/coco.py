"""Captions in COCO's JSON format, and in Karpathy's splits of COCO, Flickr30k and Flickr8k.

COCO's own files (captions_train2017.json) have `images` and `annotations`, joined by the image's id. The files of
Karpathy and Fei-Fei (2015), dataset_coco.json and dataset_flickr30k.json, have one list of images, each with its
sentences and its split; retrieval is reported on their "test" split, 5,000 and 1,000 images.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
import itertools
import re
from typing import Any

from absl import logging

from declip_jax.data.sources import lists
from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.lists import Entry
from declip_jax.data.storage import files, patterns, remote, texts
from declip_jax.data.storage.bounded import NestedTooDeeplyError, parse_json, without_deep_values
from declip_jax.data.storage.reach import Reach
from declip_jax.data.text.cleaning import has_text

_FOLDERS = ("", "images", "flickr30k-images", "flickr30k_images", "Images", "Flicker8k_Dataset")
_DIGITS = 18  # of a number that fits into 64 bits
_MOST = 2**32  # bytes of an annotation file
_PROBED = 20  # images to look for at random, since some may be missing


def open_coco(location: str) -> lists.ListSource:
  """Opens "ANNOTATIONS.json?split=test&root=FOLDER", of which `split` and `root` are optional.

  A sample is an image with all its captions, in the order of the file. Images without captions or an id and captions of
  unknown images are skipped and counted; an id may be a number or a text, and 7 and "7" are the same. A value that is
  nested too deeply to be parsed counts as missing. The file is parsed once, as a whole, which takes about 8 times its
  size in memory.

  Args:
    location: the file. Karpathy's files need `split`, and only they have one; "train+restval" joins splits. `root` is
      the folder that image names are relative to. Without it the images are searched for next to the file, one folder
      up, and in folders of these with the names of COCO's archives ("train2017" for captions_train2017.json) or
      "images". Names lead to files below that folder; for others and URLs see `reach`, such as "&allow=https".

  Raises:
    FileNotFoundError: the file or its images are not found; the message lists where they were searched for.
    ValueError: the file has no captions, an element of its lists is not an object, or `split` is missing, unknown or
      not applicable.
  """
  name = f"coco:{location}"
  place, wanted = lists.parse(location, ("split", *lists.REACH))
  path, *others = patterns.expand(place)
  if others:
    raise ValueError(f"{name}: expected one file, got {1 + len(others)}; open each as a separate source")
  split, reach = wanted.get("split"), Reach.of(wanted)
  index = lists.index_list(name, [path], ["coco", split, files.stamps([path])], lambda: _entries(path, split))
  source = lists.ListSource(name, index, reach)
  few = [source.entry(number).path or "" for number in lists.probes(len(source), _PROBED)]
  if reach.root is None and not all(map(remote.is_url, few)):
    source = lists.ListSource(name, index, reach._replace(root=_find_root(name, path, few)))
  return lists.checked(source)


def _entries(path: str, split: str | None) -> Iterator[Entry | BadSample]:
  try:
    content = _parsed(texts.decode(files.read(path, limit=_MOST), path), path)
  except ValueError as error:
    raise ValueError(f"{path}: not JSON: {error}") from None
  content = content if isinstance(content, dict) else {}
  images, annotations = (_objects(content, name) for name in ("images", "annotations"))
  if any("sentences" in image for image in images):
    return _karpathy_entries(images, split, path)
  if not any("caption" in annotation for annotation in annotations):
    raise ValueError(
      f"{path}: expected images and annotations with captions, as in captions_train2017.json, or images with sentences,"
      f" as in dataset_coco.json; its fields: {list(content) or 'none'}"
    )
  if split:
    raise ValueError(f"{path}: split={split}, but only files such as dataset_coco.json have splits")
  return _coco_entries(images, annotations, path)


def _parsed(text: str, path: str) -> Any:
  """Parses the whole file; values that are nested too deeply are missing, and cost only their own record."""
  try:
    return parse_json(text)
  except NestedTooDeeplyError:
    text, count = without_deep_values(text)
    logging.warning("%s: values nested too deeply, which count as missing: %d", path, count)
    return parse_json(text)


def _objects(content: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
  """A list of objects, empty if it is missing; an element that is not an object becomes an empty one."""
  listed = content.get(name)
  return [element if isinstance(element, dict) else {} for element in listed] if isinstance(listed, list) else []


def _coco_entries(
  images: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], path: str
) -> Iterator[Entry | BadSample]:
  ids = [_id(image.get("id")) for image in images]
  captions: dict[int | str, list[Any]] = {known: [] for known in ids if known is not None}
  for annotation in annotations:
    named = _id(annotation.get("image_id"))
    if named is None or named not in captions:
      yield BadSample("damaged record", f"{path}: annotation of an unknown image: {annotation!r:.200}")
    else:
      captions[named].append(annotation.get("caption"))
  seen: dict[int | str, Any] = {}  # file of each id
  for number, (known, image) in enumerate(zip(ids, images, strict=True)):
    if known is None:
      yield BadSample("damaged record", f"{path}: images[{number}] needs a number or text as id: {image!r:.200}")
    elif seen.setdefault(known, image.get("file_name")) != image.get("file_name"):
      yield BadSample("damaged record", f"{path}: images[{number}] has the id of another image: {image!r:.200}")
    else:
      yield _entry(known, image.get("file_name"), captions[known], f"{path}, image {known}")


def _id(value: Any) -> int | str | None:
  """An id of an image, a number also if it is written as a text or as 3.0; None for another value."""
  if isinstance(value, str) and value.isdecimal() and len(value) <= _DIGITS:
    return int(value)
  if isinstance(value, float) and value.is_integer() and abs(value) < 10**_DIGITS:
    return int(value)
  return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _karpathy_entries(images: Sequence[Mapping[str, Any]], split: str | None, path: str) -> Iterator[Entry | BadSample]:
  counts = Counter(str(image.get("split")) for image in images if image)
  wanted = set(split.split("+")) if split else set()
  if not wanted or not wanted <= counts.keys():
    raise ValueError(f"{path}: split={split}; choose with ?split=NAME or NAME+NAME; numbers of images: {dict(counts)}")
  for number, image in enumerate(images):
    if not image:
      yield BadSample("damaged record", f"{path}: images[{number}] is not an object with fields")
    elif str(image.get("split")) in wanted:
      name = "/".join(map(str, filter(None, (image.get("filepath"), image.get("filename")))))
      captions = [sentence.get("raw") for sentence in _objects(image, "sentences")]
      yield _entry(image.get("imgid", number), name, captions, f"{path}, image {number}")


def _entry(number: Any, name: Any, captions: Sequence[Any], place: str) -> Entry | BadSample:
  texts = [text.strip() for text in captions if isinstance(text, str) and has_text(text)]
  if not name or not isinstance(name, str):
    return BadSample("damaged record", f"{place}: expected a file name, got {name!r}")
  if not texts:
    return BadSample("no caption", f"{place}: {name} has no caption")
  return Entry(0, number if isinstance(number, int) and 0 <= number < 10**_DIGITS else -1, name, captions=texts)


def _find_root(name: str, path: str, images: Sequence[str]) -> str:
  """The first folder near the annotations that has the first of the images that exists."""
  here = lists.folder_of(path)
  archive = re.search(r"(train|val|test)\d{4}", path.rpartition("/")[2])
  folders = [*_FOLDERS, *((archive[0], f"images/{archive[0]}") if archive else ())]
  tried = [f"{place}/{folder}".rstrip("/") for place in (here, lists.folder_of(here)) for folder in folders]
  for image, root in itertools.product(images, tried):
    if _exists(image, root):
      return root
  advice = lists.missing_advice(images[0], here, given=False, search=False)
  raise FileNotFoundError(f"{name}: found none of {list(images[:3])} in {', '.join(tried)}; {advice}")


def _exists(image: str, root: str) -> bool:
  try:
    return files.exists(Reach().resolve(image, root))
  except (OSError, ValueError):
    return False

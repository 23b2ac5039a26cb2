"""Examples from the features of tf.train.Example messages, as TFRecord and ArrayRecord files contain them.

| writer | image | captions | label |
|---|---|---|---|
| TFDS | image | caption, captions, captions/text and others | label |
| img2dataset, clip-jax | jpg, png or webp | caption | |
| TensorFlow's research models | image/encoded | image/caption | |
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from declip_jax.data.sources import lists, values
from declip_jax.data.sources.base import BadSample, Example
from declip_jax.data.storage import texts, tf_examples
from declip_jax.data.storage.bounded import short

ROLES = ("image", "caption", "label")
PROBED = 16  # messages whose features are known when a choice is made

_IMAGE_KEYS = ("image", "img", "jpg", "jpeg", "png", "webp", "image/encoded", "image_raw", "image_bytes")
_INNER = ("text", "raw")  # keys within a sequence of captions
_CAPTION_KEYS = (*lists.CAPTION_NAMES, "image/caption", "image/captions")
_CAPTION_KEYS += tuple(f"{name}/{inner}" for name in lists.CAPTION_NAMES for inner in _INNER)


class Keys(NamedTuple):
  """The keys of the features in use.

  Attributes:
    image: the key of the encoded image.
    captions: keys of texts or lists of texts.
    label: the key of a number, or of the name of a class in classnames.txt; None for no label.
  """

  image: str
  captions: tuple[str, ...]
  label: str | None


def kinds_of(messages: Iterable[bytes], place: str) -> dict[str, str]:
  """The kinds of values in some messages by feature: "bytes", "integer" if there is only one, "integers" or "floats".

  Args:
    messages: the messages; those that cannot be parsed do not count.
    place: the data, for messages.

  Raises:
    ValueError: no message can be parsed.
  """
  kinds, error = dict[str, str](), None
  for message in messages:
    try:
      for key, feature in tf_examples.features(message).items():
        several = feature.kind == "integers" and len(tf_examples.values(feature)) > 1
        if several or key not in kinds:
          kinds[key] = "integer" if feature.kind == "integers" and not several else feature.kind
    except ValueError as damage:
      error = damage
  if not kinds and error is not None:
    raise ValueError(f"{place}: {error}")
  return kinds


def choose(kinds: Mapping[str, str], wanted: Mapping[str, str], classnames: Sequence[str], place: str) -> Keys:
  """Chooses the features of each role: wanted ones, else by their names and kinds.

  Args:
    kinds: see `kinds_of`.
    wanted: keys by role, see `ROLES`; several of captions are joined by commas, and "" means none.
    classnames: the names of the classes; empty if they have none.
    place: the data, for messages.

  Raises:
    ValueError: a feature that is named does not exist or is of another kind; several match; there is no image, or
      neither a caption nor a label; or labels are names without a classnames.txt.
  """
  legal = {"image": ["bytes"], "caption": ["bytes"], "label": ["integer"]}
  columns = {role: [key for key in kinds if role in wanted or kinds[key] in legal[role]] for role in ROLES}
  image = lists.choose("image", wanted.get("image"), columns["image"], _IMAGE_KEYS, place)
  captions = lists.choose("caption", wanted.get("caption"), columns["caption"], _CAPTION_KEYS, place, several=True)
  label = lists.choose("label", wanted.get("label"), columns["label"], lists.LABEL_NAMES, place)
  if not image or not (captions or label or wanted.get("caption") == ""):
    missing = "caption or label" if image else "image"
    shown = ", ".join(f"{key!r} ({kind})" for key, kind in kinds.items()) or "nothing"
    raise ValueError(f"{place}: which feature is the {missing}? Choose with ?image=KEY&caption=KEY from {shown}")
  legal["label"].append("bytes")
  for role, keys in (("image", image), ("caption", captions), ("label", label)):
    for key in keys:
      if kinds[key] not in legal[role]:
        raise ValueError(f"{place}: {role}={key}: a feature of {kinds[key]}, expected {' or '.join(legal[role])}")
  if label and kinds[label[0]] == "bytes" and not classnames:
    raise ValueError(
      f"{place}: label={label[0]}: names of classes; write all of them to classnames.txt next to the data, one a line, "
      "or give label= to ignore them"
    )
  return Keys(image[0], captions, label[0] if label else None)


def read(message: bytes, keys: Keys, classnames: Sequence[str], place: str) -> Example:
  """Returns the example of a message.

  Args:
    message: the serialised message.
    keys: the features in use.
    classnames: the names of the classes; empty if they have none.
    place: the name of the sample.

  Raises:
    BadSample: the message is damaged, has no image, a feature has another type, or the label is not among the classes.
  """
  try:
    features = tf_examples.features(message)
    image = _image(features, keys.image)
    captions = tuple(caption for key in keys.captions for caption in _captions(features, key, place))
    label = _label(features, keys.label, classnames) if keys.label else -1
  except BadSample as error:
    raise BadSample(error.kind, f"{place}: {error}") from None
  except ValueError as error:
    raise BadSample("damaged record", f"{place}: {error}") from error
  return Example(image=image, captions=captions, label=label, id=place)


_Features = Mapping[str, tf_examples.Feature]


def _image(features: _Features, key: str) -> bytes:
  found = _values(features, key)
  if not found:
    raise BadSample("missing file", f"no image in {key!r}; its features are {short([*features])}")
  if len(found) > 1 or not isinstance(found[0], bytes):
    raise ValueError(f"expected one encoded image in {key!r}, got {_described(features[key], found)}")
  return found[0]


def _captions(features: _Features, key: str, place: str) -> list[str]:
  found = _values(features, key)
  if not all(isinstance(value, bytes) for value in found):
    raise ValueError(f"expected texts in {key!r}, got {_described(features[key], found)}")
  return values.captions_of([texts.decode(value, place) for value in found if isinstance(value, bytes)])


def _label(features: _Features, key: str, classnames: Sequence[str]) -> int:
  """The number of a class, -1 if there is none."""
  found = _values(features, key)
  if not found:
    return -1
  (value, *others) = found
  if others or (isinstance(value, int) and value < -1):
    raise ValueError(f"expected one label from -1 up in {key!r}, got {_described(features[key], found)}")
  if isinstance(value, bytes):
    name = value.decode(errors="replace").strip()
    if name not in classnames:
      raise BadSample("no label", f"label {short(name)}: expected a line of classnames.txt")
    return classnames.index(name)
  if classnames and value >= len(classnames):
    legal = f"-1 to {len(classnames) - 1}, the last line of classnames.txt"
    raise BadSample("no label", f"label {value}: expected {legal}")
  return value


def _values(features: _Features, key: str) -> list[bytes] | list[int]:
  return tf_examples.values(features[key]) if key in features else []


def _described(feature: tf_examples.Feature, found: Sequence[bytes | int]) -> str:
  return f"{len(found):,} {feature.kind}" + (f", {short(found[0])}" if found else "")

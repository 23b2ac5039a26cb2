"""The released image-text models of big_vision, built by its own code with random parameters.

Names of files and settings are those of its README_siglip2.md, README_lit.md and of the notebook SigLIP_demo, at the
revision that `make released-weights` clones. LiT's text tower, BERT, is not part of that code: only its image tower is
built.
"""

import importlib
import math
from pathlib import Path
import sys
import types
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import numpy as np


class Model(NamedTuple):
  """One released file.

  Attributes:
    image: variant of the image tower, with its patch.
    size: pixels of a side, 0 for images of any shape (NaFlex).
    text: variant of the text tower, "" if it is not built.
    width: dimensions of the text's projection, None without one.
    tokens: length of a text.
    vocabulary: number of ids of texts.
    stacked: whether the parameters of all blocks are one array.
  """

  image: str
  size: int
  text: str
  width: int | None
  tokens: int = 64
  vocabulary: int = 32_000
  stacked: bool = False


def _siglip2(image: str, size: int) -> Model:
  variant = image.partition("/")[0]
  width = {"B": 768, "L": 1024, "So400m": 1152, "g-opt": 1536}[variant]
  text = "So400m" if variant == "g-opt" else variant
  return Model(image, size, text, width, vocabulary=256_000, stacked=True)


_SIZES = {
  "B/32": (256,),
  "B/16": (224, 256, 384, 512, 0),
  "L/16": (256, 384, 512),
  "So400m/14": (224, 384),
  "So400m/16": (256, 384, 512, 0),
  "g-opt/16": (256, 384),
}
MODELS = {
  "webli_en_b16_224_63724782": Model("B/16", 224, "B", 768),
  "webli_en_b16_256_60500360": Model("B/16", 256, "B", 768),
  "webli_en_b16_384_68578854": Model("B/16", 384, "B", 768),
  "webli_en_b16_512_68580893": Model("B/16", 512, "B", 768),
  "webli_en_l16_256_60552751": Model("L/16", 256, "L", 1024),
  "webli_en_l16_384_63634585": Model("L/16", 384, "L", 1024),
  "webli_en_so400m_224_57633886": Model("So400m/14", 224, "So400m", 1152, tokens=16),
  "webli_en_so400m_384_58765454": Model("So400m/14", 384, "So400m", 1152),
  "webli_i18n_b16_256_66117334": Model("B/16", 256, "B", 768, vocabulary=250_000),
  "webli_i18n_so400m_16_256_78061115": Model("So400m/16", 256, "So400m", None, vocabulary=250_000),
  **{
    f"siglip2_{image.lower().replace('/', '')}_{size or 'naflex'}": _siglip2(image, size)
    for image, sizes in _SIZES.items()
    for size in sizes
  },
  "LiT-L16L": Model("L/16", 224, "", 1024),
  "LiT-B16B": Model("B/16", 224, "", 768),
  "LiT-B16B_2": Model("B/16", 224, "", 768),
  "coco_B16B": Model("B/16", 224, "", 768),
}


class Built(NamedTuple):
  """A model of big_vision with random parameters.

  Attributes:
    tensors: the parameters by the names of its `.npz` files.
    pixels: float32 `[n h w 3]` from -1 to 1.
    ids: int32 `[n t]`.
    image: unit embeddings of the pixels, float32 `[n d]`; None if it is not compared.
    text: unit embeddings of the ids.
    scale: factor of the cosines.
  """

  tensors: dict[str, np.ndarray]
  pixels: np.ndarray
  ids: np.ndarray
  image: np.ndarray | None
  text: np.ndarray | None
  scale: float


def build(checkout: Path, model: Model, whole: bool = False) -> Built:
  """Builds a released model, with two blocks a tower unless it is `whole`, and computes its embeddings."""
  towers = _import(checkout)
  rng = np.random.default_rng(0)
  depth = {} if whole else {"depth": 2}
  fields: dict[str, Any] = {"image": {"variant": model.image, "pool_type": "map", **depth}, "bias_init": -10.0}
  pixels = rng.uniform(-1, 1, (2, model.size, model.size, 3)).astype(np.float32)
  ids = rng.integers(2, model.vocabulary, (3, model.tokens), np.int32)
  ids[:, -1] = 1
  inputs: tuple[Any, ...] = pixels, ids
  if not model.text:
    fields |= {"image": {**fields["image"], "pool_type": "tok"}, "out_dim": (model.width, None)}
    inputs = (pixels,)
  else:
    fields |= {"text": {"variant": model.text, "vocab_size": model.vocabulary, **depth}}
    fields |= {"out_dim": (None, model.width)}
  if not model.size:
    variant, patch = model.image.split("/")
    image = {"variant": variant, **depth, "pool_type": "map", "nposemb": 16, "posemb": "learn_2d"}
    fields |= {"image_model": "proj.image_text.naflex_vit", "image": image}
    patches = rng.normal(size=(2, 4, int(patch) ** 2 * 3)).astype(np.float32)
    places = np.asarray([[0, 0, 1, 1], [0, 1, 0, 1]], np.int32)
    inputs = (patches, np.ones((2, 4), np.int32), *(np.stack([axis] * 2) for axis in places)), ids
  elif model.stacked:
    for tower in ("image", "text"):
      fields[tower]["scan"] = True
  module = towers.Model(**fields)
  shapes = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"], sep="/")
  tensors = {name: _draw(rng, name, leaf.shape) for name, leaf in shapes.items()}
  if not model.text or not model.size:
    return Built(tensors, pixels, ids, None, None, 0.0)
  image, text, out = jax.jit(module.apply)({"params": unflatten_dict(tensors, sep="/")}, *inputs)
  return Built(tensors, pixels, ids, np.asarray(image), np.asarray(text), float(out["t"][0]))


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
  x = rng.standard_normal(shape, np.float32)
  if name.endswith("kernel"):  # of variance 1 / inputs: query, key and value are [f h e], the output [h e f]
    into_heads = any(f"/{part}/" in name for part in ("query", "key", "value"))
    inputs = shape[-3] if into_heads else math.prod(shape[-3:-1]) if "/out/" in name else shape[-2]
    return x / np.float32(math.sqrt(math.prod(shape[:-1]) if "embedding" in name else inputs))
  return x + 1 if name.endswith(("scale", "t")) else 0.1 * x


def _import(checkout: Path) -> Any:
  """The module of big_vision's two towers, without its readers of checkpoints, which need TensorFlow."""
  if not (checkout / "big_vision").is_dir():
    raise ValueError(f"--big-vision={checkout}: not a clone of google-research/big_vision")
  if str(checkout) not in sys.path:
    sys.path.insert(0, str(checkout))
    for name in ("big_vision.utils", "big_vision.models.common"):
      sys.modules[name] = types.ModuleType(name)
    import big_vision

    big_vision.utils = sys.modules["big_vision.utils"]
  return importlib.import_module("big_vision.models.proj.image_text.two_towers")

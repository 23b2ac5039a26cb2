"""The encoders of the papers by name, and the functions that describe any other.

`config.default(method, "ViT-L/14")` builds one for training; `python benchmarks/architectures.py` prints their sizes.
"""

from collections.abc import Mapping
import copy
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from declip_jax.spelling import did_you_mean

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # SLIP's and DeCLIP's


class TowerSize(NamedTuple):
  """Size of a transformer, in the fields of `config.model.image` and `config.model.text`."""

  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0


class Architecture(NamedTuple):
  """Two towers and their joint space.

  Attributes:
    image, text: the towers.
    embed_dim: dimension of the joint space.
    image_size: resolution in pixels.
    image_bias, text_bias: whether the projection into the joint space has a bias.
    image_linear: whether there is such a projection of images.
    mean, std: normalisation of pixels; () for OpenAI's.
    heads: widths of other heads, by their fields in `config.model.heads`, where they are not those of the papers.
  """

  image: ConfigDict
  text: ConfigDict
  embed_dim: int
  image_size: int = 224
  image_bias: bool = False
  text_bias: bool = False
  image_linear: bool = True
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()
  heads: Mapping[str, Any] = MappingProxyType({})


def vit(patch: int, width: int, depth: int, heads: int, **options: Any) -> ConfigDict:
  """OpenAI's vision transformer; `options`, such as `SLIP`, replace fields. See `models.vit.ViT`."""
  c = ConfigDict()
  c.kind = "vit"
  c.patch, c.width, c.depth, c.heads = patch, width, depth, heads
  c.pre_norm = True  # a norm before the first block; SLIP: False
  c.patch_bias = False  # SLIP: True
  c.activation = "quick_gelu"  # or "gelu" (SLIP), "gelu_tanh" (SigLIP)
  c.epsilon = 1e-5  # of the norms; SLIP: 1e-6
  c.initializer = "torch"  # "torch" (OpenAI), "openai_text" (DeCLIP), "timm" (SLIP) or "big_vision" (SigLIP)
  c.mlp_ratio = 4.0  # width of the MLP divided by that of the tower
  c.pooling = "token"  # "token", "average" (CLIPA), "map" (SigLIP) or "query" (CoCa), see `models.vit.ViT`
  c.pool_width = 0  # width of the feature by "query"
  c.branch_norm = False  # norms after attention and MLP instead of before them (EVA-02-CLIP-E)
  c.lock().update(options)
  return c.unlock()


def resnet(width: int, layers: tuple[int, int, int, int]) -> ConfigDict:
  """CLIP's modified ResNet; its output projection has a bias (`model.heads.image_bias`)."""
  c = ConfigDict()
  c.kind = "resnet"
  c.width, c.layers = width, layers
  c.norm_groups = 1  # groups of the batch that are normalised separately; 1 is synchronised batch norm
  return c


def regnet(initial_width: int, slope: float, multiplier: float, depth: int, group_width: int) -> ConfigDict:
  """RegNetY by the parameters of its design space; see `models.regnet.RegNetY`."""
  c = ConfigDict()
  c.kind = "regnet"
  c.initial_width, c.slope, c.multiplier, c.depth, c.group_width = initial_width, slope, multiplier, depth, group_width
  return c


def convnext(widths: tuple[int, ...], layers: tuple[int, ...], hidden: int = 0, epsilon: float = 1e-6) -> ConfigDict:
  """ConvNeXt; see `models.convnext.ConvNeXt`."""
  c = ConfigDict()
  c.kind = "convnext"
  c.widths, c.layers, c.hidden, c.epsilon = widths, layers, hidden, epsilon
  return c


def text(width: int, depth: int = 12, **options: Any) -> ConfigDict:
  """OpenAI's causal text transformer, with heads of width 64; `options` replace fields of its `TextTransformer`."""
  c = ConfigDict()
  # Or "huggingface:FILE" (a tokenizer.json) or "sentencepiece:FILE", with options, see `tokenizer.make_tokenizer`.
  c.tokenizer = "openai"
  c.vocab_size = 49408  # OpenAI's; one more where a mask token is needed
  c.eot = 49407  # id of the end-of-text token, whose state is the feature of a text
  c.width, c.depth, c.heads = width, depth, width // 64
  c.context_length = 77  # tokens of a text with start and end; longer ones are truncated
  c.activation = "quick_gelu"  # or "gelu", "gelu_tanh" (SigLIP)
  c.mlp_ratio = 4.0
  c.epsilon = 1e-5  # of the norms; SigLIP: 1e-6
  c.causal = True  # whether a token sees only those before it; SigLIP, CLIPA: False
  c.pooling = "eot"  # position of the feature: "eot", "last", the end of the row (SigLIP, CLIPA), or "class" (CoCa)
  # Lengths to which a batch may be trimmed, if its longest text fits: same results, less compute. The train step is
  # compiled for each that occurs. Where a tower or a loss sees padding, nothing is trimmed; see training.trimming.
  c.buckets = (16, 24, 32, 40, 48, 64)
  c.lock().update(options)
  return c.unlock()


# timm's ViT as SLIP trains it: 12 heads also in the small one, where timm has 6.
SLIP = {"pre_norm": False, "patch_bias": True, "activation": "gelu", "epsilon": 1e-6, "initializer": "timm"}
_GELU = {"activation": "gelu"}  # open_clip's own models
# big_vision's ViT as SigLIP trains it. Images may be larger than the patches that they have: So400m/14 is released for
# 384 pixels, of which it sees 378.
SIGLIP = {
  "pre_norm": False,
  "patch_bias": True,
  "activation": "gelu_tanh",
  "epsilon": 1e-6,
  "initializer": "big_vision",
  "pooling": "map",
}
_SIGLIP_TEXT = {
  "eot": 1,
  "context_length": 64,
  "activation": "gelu_tanh",
  "epsilon": 1e-6,
  "causal": False,
  "pooling": "last",
}
# The files of c4_en's and Gemma's tokenizers, which are published with the weights, in the current folder.
_C4 = {
  "vocab_size": 32_000,
  "tokenizer": "sentencepiece:spiece.model?start=none&pad=</s>&clean=lower,no_punctuation,spaces",
}
_GEMMA = {"vocab_size": 256_000, "tokenizer": "huggingface:tokenizer.json?start=none&pad=<pad>&clean=lower"}
_SO400M = TowerSize(1152, 27, 16, 4304 / 1152)
# The image tower and the text tower of each size.
SIGLIP_SIZES = {
  "B": (TowerSize(768, 12, 12), TowerSize(768, 12, 12)),
  "L": (TowerSize(1024, 24, 16), TowerSize(1024, 24, 16)),
  "So400m": (_SO400M, _SO400M),
  "g-opt": (TowerSize(1536, 40, 16), _SO400M),
}


def _siglip(size: str, patch: int, image_size: int, tokens: Mapping[str, Any]) -> Architecture:
  image, words = SIGLIP_SIZES[size]
  return Architecture(
    vit(patch, **image._asdict(), **SIGLIP),
    text(**words._asdict(), **_SIGLIP_TEXT, **tokens),
    image.width,
    image_size,
    text_bias=True,
    image_linear=False,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
  )


def _siglips(name: str, tokens: Mapping[str, Any], released: Mapping[str, tuple[int, ...]]) -> dict[str, Architecture]:
  """The architectures of a release by their names; `released` has the image sizes of each size and patch."""
  found = {}
  for variant, sizes in released.items():
    size, patch = variant.split("/")
    for pixels in sizes:
      suffix = "" if pixels == 224 else f"@{pixels}px"
      found[f"{name} ViT-{variant}{suffix}"] = _siglip(size, int(patch), pixels, tokens)
  return found


# The image tower and the text tower of OpenAI's ViT-L/14, and of open_clip's larger ones.
_LARGE_SIZES = {
  "L": (TowerSize(1024, 24, 16), TowerSize(768, 12, 12)),
  "H": (TowerSize(1280, 32, 16), TowerSize(1024, 24, 16)),
  "bigG": (TowerSize(1664, 48, 16, 8192 / 1664), TowerSize(1280, 32, 20)),
}
_CLIPA_TEXT = {
  "tokenizer": "huggingface:tokenizer.json?start=[CLS]&end=[PAD]&clean=repair,spaces",  # BERT's, uncased
  "vocab_size": 32_000,
  "eot": 0,
  "context_length": 32,
  "causal": False,
  "pooling": "last",
}
_METACLIP_2_TEXT = {
  "tokenizer": "huggingface:tokenizer.json?start=<s>&pad=<pad>&clean=repair,spaces",  # XLM-V's
  "vocab_size": 901_629,
  "eot": 2,
}


def _open_clip(size: str) -> Architecture:
  image, words = _LARGE_SIZES[size]
  return Architecture(vit(14, **image._asdict(), **_GELU), text(**words._asdict(), **_GELU), words.width)


def _clipa(size: str, image_size: int) -> Architecture:
  image, words = _LARGE_SIZES[size]
  return Architecture(
    vit(14, **image._asdict(), pre_norm=False, pooling="average", **_GELU),
    text(**words._asdict(), **_CLIPA_TEXT, **_GELU),
    words.width,
    image_size,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
  )


def _metaclip_2(size: str, image_size: int, activation: str) -> Architecture:
  image, words = _LARGE_SIZES[size]
  return Architecture(
    vit(14, **image._asdict(), activation=activation),
    text(**words._asdict(), **_METACLIP_2_TEXT, activation=activation),
    words.width,
    image_size,
  )


# Widths and layers of timm's ConvNeXts.
CONVNEXT_SIZES = {
  "tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
  "small": ((96, 192, 384, 768), (3, 3, 27, 3)),
  "base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
  "large": ((192, 384, 768, 1536), (3, 3, 27, 3)),
  "xlarge": ((256, 512, 1024, 2048), (3, 3, 27, 3)),
  "xxlarge": ((384, 768, 1536, 3072), (3, 4, 30, 3)),
}


_NANO_HEADS = {
  "simclr_projector": (512, 512, 128),
  "simsiam_projector": (256, 256, 256),
  "simsiam_predictor": (128, 256),
  "momentum_projector": (512, 512, 128),
  "momentum_predictor": (512, 128),
  "dense_dim": 64,
}
_MASK = {"vocab_size": 49409}  # DeCLIP's vocabulary, with its mask token at the end

ARCHITECTURES = {
  # Radford et al. 2021, tables 19 and 20.
  "RN50": Architecture(resnet(64, (3, 4, 6, 3)), text(512), 1024, 224, image_bias=True),
  "RN101": Architecture(resnet(64, (3, 4, 23, 3)), text(512), 512, 224, image_bias=True),
  "RN50x4": Architecture(resnet(80, (4, 6, 10, 6)), text(640), 640, 288, image_bias=True),
  "RN50x16": Architecture(resnet(96, (6, 8, 18, 8)), text(768), 768, 384, image_bias=True),
  "RN50x64": Architecture(resnet(128, (3, 15, 36, 10)), text(1024), 1024, 448, image_bias=True),
  "ViT-B/32": Architecture(vit(32, 768, 12, 12), text(512), 512),
  "ViT-B/16": Architecture(vit(16, 768, 12, 12), text(512), 512),
  "ViT-L/14": Architecture(vit(14, 1024, 24, 16), text(768), 768),
  "ViT-L/14@336px": Architecture(vit(14, 1024, 24, 16), text(768), 768, 336),
  # Mu et al. 2021 (SLIP), section 4.1 and its models.py.
  "SLIP ViT-S/16": Architecture(vit(16, 384, 12, 12, **SLIP), text(512), 512),
  "SLIP ViT-B/16": Architecture(vit(16, 768, 12, 12, **SLIP), text(512), 512),
  "SLIP ViT-L/16": Architecture(vit(16, 1024, 24, 16, **SLIP), text(512), 512),
  # Li et al. 2022 (DeCLIP), section 4.1 and its released configs. How it projects a RegNet's feature is not published:
  # here it is the global average, with which RegNets end, and a linear projection.
  "DeCLIP ViT-B/32": Architecture(
    vit(32, 768, 12, 12, initializer="openai_text"), text(512, **_MASK), 512, text_bias=True
  ),
  "DeCLIP RN50": Architecture(resnet(64, (3, 4, 6, 3)), text(512, **_MASK), 1024, image_bias=True, text_bias=True),
  "DeCLIP RegNetY-64GF": Architecture(regnet(352, 147.48, 2.4, 20, 328), text(512, **_MASK), 1024, text_bias=True),
  # Other RegNets of Radosavovic et al. 2020.
  "RegNetY-400MF": Architecture(regnet(48, 27.89, 2.09, 16, 8), text(512), 512),
  "RegNetY-16GF": Architecture(regnet(200, 106.23, 2.48, 18, 112), text(512), 512),
  # Cherti et al. 2023 (open_clip), beyond the papers' sizes; heads are 80 and 88 wide.
  "ViT-H/14": _open_clip("H"),
  "ViT-g/14": Architecture(vit(14, 1408, 40, 16, mlp_ratio=6144 / 1408, **_GELU), text(1024, 24, **_GELU), 1024),
  "ViT-bigG/14": _open_clip("bigG"),
  "ViT-e/14": Architecture(vit(14, 1792, 56, 16, mlp_ratio=15360 / 1792, **_GELU), text(1280, 36, **_GELU), 1280),
  # Li et al. 2023 (CLIPA), as open_clip has its weights.
  **{
    f"CLIPA ViT-{size}/14{suffix}": _clipa(size, pixels)
    for size in _LARGE_SIZES
    for suffix, pixels in (("", 224), ("@336px", 336))
  },
  # Chuang et al. 2025 (MetaCLIP 2), as open_clip has its weights.
  "MetaCLIP 2 ViT-H/14": _metaclip_2("H", 224, "quick_gelu"),
  "MetaCLIP 2 ViT-H/14@378px": _metaclip_2("H", 378, "gelu"),
  "MetaCLIP 2 ViT-bigG/14": _metaclip_2("bigG", 224, "gelu"),
  "MetaCLIP 2 ViT-bigG/14@378px": _metaclip_2("bigG", 378, "gelu"),
  # Zhai et al. 2023 (SigLIP), and Tschannen et al. 2025 (SigLIP 2).
  **_siglips("SigLIP", _C4, {"B/16": (224, 256, 384, 512), "L/16": (256, 384), "So400m/14": (224, 384)}),
  **_siglips(
    "SigLIP 2",
    _GEMMA,
    {
      "B/32": (256,),
      "B/16": (224, 256, 384, 512),
      "L/16": (256, 384, 512),
      "So400m/14": (224, 384),
      "So400m/16": (256, 384, 512),
      "g-opt/16": (256, 384),
    },
  ),
  # Ours, for CPUs: 4 million parameters, most of them embeddings of tokens.
  "ViT-Nano/8@32px": Architecture(
    vit(8, 128, 4, 4), text(64, 3, heads=2, context_length=24), 128, 32, heads=_NANO_HEADS
  ),
}


def build(name: str) -> Architecture:
  """The named architecture, for the caller to change.

  Raises:
    ValueError: an unknown name.
  """
  if name not in ARCHITECTURES:
    hint = did_you_mean(name, ARCHITECTURES)
    raise ValueError(f"architecture {name!r}: choose one of {sorted(ARCHITECTURES)}{hint}")
  found = ARCHITECTURES[name]
  return found._replace(image=copy.deepcopy(found.image), text=copy.deepcopy(found.text))

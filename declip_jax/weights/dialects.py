"""Names and layouts that other projects use for the tensors of CLIP and SigLIP models, translated to OpenAI's and back.

A dialect is a list of pairs of names, OpenAI's and the project's, and functions for what renaming does not cover. In a
name `#` is the number of a layer and `*` the rest of the name. Names without a pair are the same on both sides.
"""

from collections.abc import Callable, Iterable, Mapping
import re
from typing import Any, NamedTuple

import numpy as np

from declip_jax.weights import big_vision
from declip_jax.weights.layout import StateDict

Pairs = tuple[tuple[str, str], ...]
Translation = Callable[[StateDict], StateDict]


def _keep(tensors: StateDict) -> StateDict:
  return tensors


class Dialect(NamedTuple):
  """Names and layouts of one project.

  Attributes:
    marker: name of a tensor by which the dialect is recognised; see the order of `DIALECTS`.
    pairs: OpenAI's names and the project's.
    to_openai, from_openai: functions for changes other than renaming, applied to tensors under the project's names;
      `from_openai` is None for a dialect that is only read.
    told: function from the tensors to the settings, see `read.read`, that their shapes tell beyond those of OpenAI's.
  """

  marker: str
  pairs: Pairs = ()
  to_openai: Translation = _keep
  from_openai: Translation | None = _keep
  told: Callable[[Mapping[str, np.ndarray]], dict[str, Any]] = lambda tensors: {}


def recognise(names: Iterable[str]) -> str | None:
  """The dialect of a state dict with these names, None if there is none."""
  names = set(names)
  return next((name for name, dialect in DIALECTS.items() if dialect.marker in names), None)


def with_prefix_of_tower(tensors: Mapping[str, np.ndarray]) -> StateDict:
  """The tensors of one tower of transformers under the names that they have in its models of both."""
  if "embeddings.patch_embedding.weight" in tensors:
    return {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
  if {"embeddings.token_embedding.weight", "final_layer_norm.weight"} <= set(tensors):
    return {f"text_model.{name}": tensor for name, tensor in tensors.items()}
  return dict(tensors)


def to_openai(tensors: Mapping[str, np.ndarray], dialect: str) -> StateDict:
  """A state dict under OpenAI's names and in OpenAI's layout."""
  found = DIALECTS[dialect]
  renamed = _renamed(found.to_openai(dict(tensors)), [(theirs, openai) for openai, theirs in found.pairs])
  names = ("logit_scale", "logit_bias", "logit_scale_dense")
  return _changed(renamed, dict.fromkeys(names, lambda x: x.reshape(()) if x.size == 1 else x))


def from_openai(tensors: Mapping[str, np.ndarray], dialect: str) -> StateDict:
  """A state dict under the names and in the layout of a dialect.

  Raises:
    ValueError: the dialect is only read.
  """
  found = DIALECTS[dialect]
  if found.from_openai is None:
    raise ValueError(f"{dialect}: weights are only read in this dialect")
  return found.from_openai(_renamed(tensors, found.pairs))


def _renamed(tensors: Mapping[str, np.ndarray], pairs: Iterable[tuple[str, str]]) -> StateDict:
  rules = [(re.compile(_pattern(old)), _replacement(new)) for old, new in pairs]

  def rename(name: str) -> str:
    matches = ((rule.fullmatch(name), new) for rule, new in rules)
    return next((match.expand(new) for match, new in matches if match), name)

  return {rename(name): tensor for name, tensor in tensors.items()}


def _pattern(template: str) -> str:
  return re.escape(template).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")


def _replacement(template: str) -> str:
  number = iter(range(1, 10))
  return re.sub("[#*]", lambda _: f"\\g<{next(number)}>", template)


def _changed(tensors: StateDict, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> StateDict:
  return tensors | {name: change(tensors[name]) for name, change in changes.items() if name in tensors}


# timm's vision transformer, which SLIP uses.
def _timm_pairs(trunk: str) -> Pairs:
  block, theirs = "visual.transformer.resblocks.#.", f"{trunk}.blocks.#."
  return (
    ("visual.class_embedding", f"{trunk}.cls_token"),
    ("visual.positional_embedding", f"{trunk}.pos_embed"),
    ("visual.conv1.*", f"{trunk}.patch_embed.proj.*"),
    (f"{block}ln_1.*", f"{theirs}norm1.*"),
    (f"{block}attn.in_proj_*", f"{theirs}attn.qkv.*"),
    (f"{block}attn.out_proj.*", f"{theirs}attn.proj.*"),
    (f"{block}ln_2.*", f"{theirs}norm2.*"),
    (f"{block}mlp.c_fc.*", f"{theirs}mlp.fc1.*"),
    (f"{block}mlp.c_proj.*", f"{theirs}mlp.fc2.*"),
    ("visual.ln_post.*", f"{trunk}.norm.*"),
    ("visual.ln_pre.*", f"{trunk}.norm_pre.*"),
  )


def _without_leading_ones(tensors: StateDict) -> StateDict:
  flat = {"cls_token": lambda x: x[0, 0], "pos_embed": lambda x: x[0]}
  return _changed(tensors, {name: flat[end] for name in tensors if (end := name.rpartition(".")[2]) in flat})


def _with_leading_ones(tensors: StateDict) -> StateDict:
  deep = {"cls_token": lambda x: x[None, None], "pos_embed": lambda x: x[None]}
  return _changed(tensors, {name: deep[end] for name in tensors if (end := name.rpartition(".")[2]) in deep})


# open_clip with a timm trunk: its projection is a linear layer.
def _from_trunk(tensors: StateDict) -> StateDict:
  flat = _with_whole_biases({name.removeprefix("text."): tensor for name, tensor in tensors.items()})  # or without it
  return _changed(_without_leading_ones(flat), dict.fromkeys(_TRUNK_PROJECTIONS, np.transpose))


def _to_trunk(tensors: StateDict) -> StateDict:
  if "visual.head.mlp.fc1.weight" in tensors:
    others = {name: x for name, x in tensors.items() if name != "visual.head.proj.weight"}
    tensors = {**others, "visual.head.mlp.fc2.weight": tensors["visual.head.proj.weight"]}
  return _changed(_with_leading_ones(tensors), dict.fromkeys(_TRUNK_PROJECTIONS, np.transpose))


# The projection is a linear layer after the trunk, that of the trunk itself, or the last of an MLP.
_TRUNK_PROJECTIONS = ("visual.head.proj.weight", "visual.trunk.head.weight", "visual.head.mlp.fc2.weight")


def _with_whole_biases(tensors: StateDict) -> StateDict:
  """EVA-CLIP's attention has biases of queries and values only; those of keys change no result."""
  whole = {}
  for name, tensor in tensors.items():
    if name.endswith(".attn.q_bias") and (other := name.replace("q_bias", "v_bias")) in tensors:
      bias = [tensor, np.zeros_like(tensor), tensors[other]]
      whole[name.replace("q_bias", "qkv.bias")] = np.concatenate(bias)
    elif not name.endswith((".attn.v_bias", ".attn.k_bias")):
      whole[name] = tensor
  return whole


# CoCa in open_clip: its decoder of captions is not part of our model.
_QUERY_POOL = "visual.attn_pool"


def _from_coca(tensors: StateDict) -> StateDict:
  flat = {name.removeprefix("text."): x for name, x in tensors.items() if not name.startswith("text_decoder.")}
  pool = {name: flat.pop(f"{_QUERY_POOL}.{name}") for name in ("query", "ln_q.weight", "ln_q.bias")}
  first = pool["query"][0].astype(np.float64)
  unit = (first - first.mean()) / np.sqrt(first.var() + 1e-5)
  flat[f"{_QUERY_POOL}.probe"] = (unit * pool["ln_q.weight"] + pool["ln_q.bias"]).astype(np.float32)
  packed = flat.pop(f"{_QUERY_POOL}.attn.in_proj_weight", None)
  if packed is not None:  # where both widths are equal
    flat |= {f"{_QUERY_POOL}.attn.{part}_proj_weight": x for part, x in zip("qkv", np.split(packed, 3), strict=True)}
  for part, bias in zip("qkv", np.split(flat.pop(f"{_QUERY_POOL}.attn.in_proj_bias"), 3), strict=True):
    flat[f"{_QUERY_POOL}.attn.{part}_proj.weight"] = flat.pop(f"{_QUERY_POOL}.attn.{part}_proj_weight")
    flat[f"{_QUERY_POOL}.attn.{part}_proj.bias"] = bias
  *positions, last = flat["positional_embedding"]
  return flat | {"cls_emb": flat["cls_emb"] + last, "positional_embedding": np.stack(positions)}


def _text_under(prefix: str) -> Pairs:
  names = ("token_embedding.*", "positional_embedding", "transformer.*", "ln_final.*", "text_projection")
  return tuple((name, f"{prefix}.{name}") for name in (*names, "text_projection.*"))


# DeCLIP: its three special ids are mask, start, end; ours are start, end, mask, the first two of which are OpenAI's.
_SPECIAL = {"to": [1, 2, 0], "from": [2, 0, 1]}


def _with_specials(tensors: StateDict, order: list[int]) -> StateDict:
  def reorder(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[:-3], x[-3:][order]])

  ends = (".token_embedding.weight", "text_label_predictor.weight", "text_label_predictor.bias")
  return _changed(tensors, {name: reorder for name in tensors if name.endswith(ends)})


def _from_declip(tensors: StateDict) -> StateDict:
  return _with_specials(tensors, _SPECIAL["to"])


def _to_declip(tensors: StateDict) -> StateDict:
  return _changed(_with_specials(tensors, _SPECIAL["from"]), {"logit_scale": lambda x: x.reshape(1)})


# Hugging Face: query, key and value are separate, and projections are linear layers.
def _hugging_face_tower(ours: str, theirs: str) -> Pairs:
  block, layer = f"{ours}transformer.resblocks.#.", f"{theirs}_model.encoder.layers.#."
  return (
    (f"{block}ln_1.*", f"{layer}layer_norm1.*"),
    (f"{block}attn.in_proj_*", f"{layer}self_attn.in_proj_*"),
    (f"{block}attn.out_proj.*", f"{layer}self_attn.out_proj.*"),
    (f"{block}ln_2.*", f"{layer}layer_norm2.*"),
    (f"{block}mlp.c_fc.*", f"{layer}mlp.fc1.*"),
    (f"{block}mlp.c_proj.*", f"{layer}mlp.fc2.*"),
  )


_PROJECTIONS = {"visual_projection.weight": np.transpose, "text_projection.weight": np.transpose}
_PROJECTION_NAMES = ("q_proj", "k_proj", "v_proj")


def _from_hugging_face(tensors: StateDict) -> StateDict:
  joined = {}
  for name, tensor in _changed(tensors, _PROJECTIONS).items():
    match = re.fullmatch(r"(.+\.self_attn\.)([qkv]_proj)\.(weight|bias)", name)
    if not match:
      joined[name] = tensor
    elif match[2] == "q_proj":
      names = [f"{match[1]}{projection}.{match[3]}" for projection in _PROJECTION_NAMES]
      if all(name in tensors for name in names):
        joined[f"{match[1]}in_proj_{match[3]}"] = np.concatenate([tensors[name] for name in names])
  return joined


# FlaxCLIP: names are paths, kernels are `[in out]`, and convolutions HWIO.
_FLAX_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def _from_flax(tensors: StateDict) -> StateDict:
  renamed = {}
  for name, tensor in tensors.items():
    above, _, leaf = name.rpartition("/")
    if leaf == "kernel":
      tensor = tensor.transpose(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
    renamed[f"{above}/{_FLAX_LEAVES.get(leaf, leaf)}".lstrip("/").replace("/", ".")] = tensor
  return _from_hugging_face(renamed)


def _to_hugging_face(tensors: StateDict) -> StateDict:
  split = {}
  for name, tensor in _changed(tensors, _PROJECTIONS).items():
    match = re.fullmatch(r"(.+\.self_attn\.)in_proj_(weight|bias)", name)
    if match:
      thirds = zip(_PROJECTION_NAMES, np.split(tensor, 3), strict=True)
      split |= {f"{match[1]}{projection}.{match[2]}": third for projection, third in thirds}
    else:
      split[name] = tensor
  return split


_HUGGING_FACE: Pairs = (
  ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
  ("visual.conv1.*", "vision_model.embeddings.patch_embedding.*"),
  ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
  ("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),  # sic
  *_hugging_face_tower("visual.", "vision"),
  ("visual.ln_post.*", "vision_model.post_layernorm.*"),
  ("visual.proj", "visual_projection.weight"),
  ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
  ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
  *_hugging_face_tower("", "text"),
  ("ln_final.*", "text_model.final_layer_norm.*"),
  ("text_projection", "text_projection.weight"),
)

_SHAPES_OF_ONE = ("logit_scale", "logit_bias")


def _with_ones(tensors: StateDict) -> StateDict:
  return _changed(tensors, dict.fromkeys(_SHAPES_OF_ONE, lambda x: x.reshape(1)))


def _from_siglip(tensors: StateDict) -> StateDict:
  return _changed(_from_hugging_face(tensors), {"vision_model.head.probe": lambda x: x[0, 0]})


def _to_siglip(tensors: StateDict) -> StateDict:
  deep = _changed(_with_ones(tensors), {"vision_model.head.probe": lambda x: x[None, None]})
  return _to_hugging_face(deep)


# SigLIP: the image tower ends in the joint space, and the text projection has a bias.
_SIGLIP: Pairs = (
  ("visual.head.*", "vision_model.head.*"),
  ("text_projection.*", "text_model.head.*"),
  *(pair for pair in _HUGGING_FACE if "projection.weight" not in pair[1]),
)

_POOL = "visual.trunk.attn_pool"
# SigLIP in open_clip, whose image tower is timm's: query apart from key and value.
_SIGLIP_TRUNK: Pairs = (
  *_timm_pairs("visual.trunk"),
  ("visual.head.probe", f"{_POOL}.latent"),
  ("visual.head.attention.out_proj.*", f"{_POOL}.proj.*"),
  ("visual.head.attention.in_proj_*", f"{_POOL}.in_proj_*"),
  ("visual.head.layernorm.*", f"{_POOL}.norm.*"),
  ("visual.head.mlp.*", f"{_POOL}.mlp.*"),
  *_text_under("text"),
)


def _from_siglip_trunk(tensors: StateDict) -> StateDict:
  joined = dict(_changed(tensors, {"visual.trunk.pos_embed": lambda x: x[0], f"{_POOL}.latent": lambda x: x[0, 0]}))
  for leaf in ("weight", "bias"):
    parts = [joined.pop(f"{_POOL}.{name}.{leaf}") for name in ("q", "kv")]
    joined[f"{_POOL}.in_proj_{leaf}"] = np.concatenate(parts)
  return joined


def _to_siglip_trunk(tensors: StateDict) -> StateDict:
  split = dict(
    _changed(tensors, {"visual.trunk.pos_embed": lambda x: x[None], f"{_POOL}.latent": lambda x: x[None, None]})
  )
  for leaf in ("weight", "bias"):
    packed = split.pop(f"{_POOL}.in_proj_{leaf}")
    split[f"{_POOL}.q.{leaf}"], split[f"{_POOL}.kv.{leaf}"] = np.split(packed, [len(packed) // 3])
  return split


# DeCLIP's SLIP has an unused norm after its head, which keeps its name.
_DECLIP_SLIP_HEAD: Pairs = (
  ("image_mlp.layer#.*", "predictor_sim.linear#.*"),
  ("image_mlp.bn#.*", "predictor_sim.bn#.*"),
)

# In the order in which they are recognised: the markers of the last ones occur in others, too.
DIALECTS = {
  "SigLIP in big_vision": Dialect(big_vision.MARKER, big_vision.PAIRS, big_vision.to_openai, None, big_vision.told),
  "SigLIP in transformers": Dialect("vision_model.head.probe", _SIGLIP, _from_siglip, _to_siglip),
  "SigLIP in open_clip": Dialect(f"{_POOL}.latent", _SIGLIP_TRUNK, _from_siglip_trunk, _to_siglip_trunk),
  "Hugging Face": Dialect(
    "vision_model.embeddings.class_embedding", _HUGGING_FACE, _from_hugging_face, _to_hugging_face
  ),
  "FlaxCLIP": Dialect("vision_model/embeddings/class_embedding", _HUGGING_FACE, _from_flax, None),
  "SigLIP in transformers, texts only": Dialect("text_model.head.weight", _SIGLIP, _from_siglip, _to_siglip),
  "Hugging Face, texts only": Dialect(
    "text_model.embeddings.token_embedding.weight", _HUGGING_FACE, _from_hugging_face, _to_hugging_face
  ),
  "DeCLIP": Dialect("encode_text.token_embedding.weight", _text_under("encode_text"), _from_declip, _to_declip),
  "DeCLIP's SLIP": Dialect(
    "text_encoder.token_embedding.weight", (*_text_under("text_encoder"), *_DECLIP_SLIP_HEAD), _from_declip, _to_declip
  ),
  "open_clip, timm trunk": Dialect(
    "visual.trunk.cls_token",
    (
      *_timm_pairs("visual.trunk"),
      ("visual.proj", "visual.head.proj.weight"),
      ("visual.proj", "visual.trunk.head.weight"),
      ("visual.proj_bias", "visual.trunk.head.bias"),
    ),
    _from_trunk,
    _to_trunk,
  ),
  "open_clip, ConvNeXt of timm": Dialect(
    "visual.trunk.stages.0.blocks.0.conv_dw.weight",
    (("visual.proj", "visual.head.proj.weight"), ("visual.proj", "visual.head.mlp.fc2.weight")),
    _from_trunk,
    _to_trunk,
  ),
  "CoCa in open_clip": Dialect(f"{_QUERY_POOL}.query", (), _from_coca, None),
  "open_clip, separate text": Dialect("text.token_embedding.weight", _text_under("text")),
  "SLIP": Dialect(
    "visual.cls_token",
    # `image_projection` is already `[in out]`.
    (*_timm_pairs("visual"), ("visual.proj", "image_projection")),
    _without_leading_ones,
    _with_leading_ones,
  ),
  "OpenAI": Dialect("visual.conv1.weight"),
}

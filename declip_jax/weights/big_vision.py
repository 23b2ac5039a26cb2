"""Names and layouts of the two towers that big_vision trains as SigLIP, in its `.npz` files.

Flax's kernels are `[in out]`, those of attention `[in heads width]` and `[heads width out]`. With `scan`, the blocks of
a tower are one array with a leading axis of layers.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from declip_jax.weights.layout import StateDict

MARKER = "img/MAPHead_0/probe"
_ATTENTION = "MultiHeadDotProductAttention_0"


def _tower(ours: str, theirs: str, encoder: str) -> tuple[tuple[str, str], ...]:
  block, layer = f"{ours}transformer.resblocks.#.", f"{theirs}/{encoder}/encoderblock_#/"
  return (
    (f"{block}ln_1.*", f"{layer}LayerNorm_0/*"),
    (f"{block}attn.out_proj.*", f"{layer}{_ATTENTION}/out/*"),
    (f"{block}attn.in_proj_*", f"{layer}{_ATTENTION}/in/*"),
    (f"{block}ln_2.*", f"{layer}LayerNorm_1/*"),
    (f"{block}mlp.c_fc.*", f"{layer}MlpBlock_0/Dense_0/*"),
    (f"{block}mlp.c_proj.*", f"{layer}MlpBlock_0/Dense_1/*"),
  )


# OpenAI's names, and those of big_vision after `to_openai`.
PAIRS = (
  ("visual.conv1.*", "img/embedding/*"),
  ("visual.positional_embedding", "img/pos_embedding"),
  *_tower("visual.", "img", "Transformer"),
  ("visual.ln_post.*", "img/Transformer/encoder_norm/*"),
  ("visual.head.probe", MARKER),
  ("visual.head.attention.out_proj.*", f"img/MAPHead_0/{_ATTENTION}/out/*"),
  ("visual.head.attention.in_proj_*", f"img/MAPHead_0/{_ATTENTION}/in/*"),
  ("visual.head.layernorm.*", "img/MAPHead_0/LayerNorm_0/*"),
  ("visual.head.mlp.fc1.*", "img/MAPHead_0/MlpBlock_0/Dense_0/*"),
  ("visual.head.mlp.fc2.*", "img/MAPHead_0/MlpBlock_0/Dense_1/*"),
  ("token_embedding.weight", "txt/Embed_0/embedding"),
  ("positional_embedding", "txt/pos_embedding"),
  *_tower("", "txt", "Encoder_0"),
  ("ln_final.*", "txt/Encoder_0/encoder_norm/*"),
  ("text_projection.*", "txt/head/*"),
  ("logit_scale", "t"),
  ("logit_bias", "b"),
)


def told(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The numbers of heads, by the shapes of attention."""
  heads = {}
  for side, tower in (("image", "img"), ("text", "txt")):
    pattern = rf"{tower}/\w+/encoderblock(_0)?/{_ATTENTION}/query/bias"
    if name := next((name for name in tensors if re.fullmatch(pattern, name)), None):
      heads[f"{side}.heads"] = tensors[name].shape[-2]
  return heads


def to_openai(tensors: StateDict) -> StateDict:
  """The tensors in PyTorch's layout, under the names of `PAIRS`."""
  tensors = _unstacked(tensors)
  flat, packed = {}, re.compile(rf"(.+/{_ATTENTION})/(query|key|value)/(kernel|bias)")
  for name, tensor in tensors.items():
    if match := packed.fullmatch(name):
      if match[2] == "query":
        parts = [tensors[f"{match[1]}/{part}/{match[3]}"] for part in ("query", "key", "value")]
        parts = [part.reshape(len(part), -1).T if match[3] == "kernel" else part.reshape(-1) for part in parts]
        flat[f"{match[1]}/in/{_PYTORCH[match[3]]}"] = np.concatenate(parts)
      continue
    above, _, leaf = name.rpartition("/")
    if leaf == "kernel":
      tensor = tensor.transpose(3, 2, 0, 1) if tensor.ndim == 4 else tensor.reshape(-1, tensor.shape[-1]).T
    elif leaf in ("pos_embedding", "probe"):
      is_square = name.startswith("img/pos") and len(tensor) > 1  # NaFlex, which `recognise` refuses by its patches
      kept = 1 if leaf == "probe" else 2
      tensor = tensor.reshape((-1, *tensor.shape[-1:]) if is_square else tensor.shape[tensor.ndim - kept :])
    flat[f"{above}/{_PYTORCH[leaf]}" if leaf in _PYTORCH else name] = tensor
  return flat


_PYTORCH = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _unstacked(tensors: StateDict) -> StateDict:
  """The tensors with one entry for each block, as without `scan`."""
  split = {}
  for name, tensor in tensors.items():
    if "/encoderblock/" in name:
      split |= {name.replace("/encoderblock/", f"/encoderblock_{index}/"): x for index, x in enumerate(tensor)}
    else:
      split[name] = tensor
  return split

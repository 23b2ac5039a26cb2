"""Correspondence of our arrays and the tensors of OpenAI's CLIP state dict, with the transpositions between them.

OpenAI's names are the common ones: `dialects` translates those of every other project to them. Heads that OpenAI's
model does not have keep the names of their projects: `image_mlp` (SLIP), `projector`, `predictor` and
`text_label_predictor` (DeCLIP), `image_mapping` and `text_mapping` (FILIP), `logit_bias` (open_clip). The pooling of
SigLIP's image tower has the names of transformers, `visual.head`; ConvNeXt those of timm, `visual.trunk`; and CoCa's
poolings those of open_clip, `visual.attn_pool` and `cls_emb`. A bias of the projection of images is `visual.proj_bias`.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from declip_jax.models.heads import HEADS
from declip_jax.models.model import Model, make_model
from declip_jax.models.paths import is_stacked
from declip_jax.views import Views

Tree = Any
StateDict = dict[str, np.ndarray]
ModelFields = Mapping[str, Any]  # `config.model` as nested dicts, as `make_model` takes them


class Entry(NamedTuple):
  """The tensors that make up one of our arrays.

  Attributes:
    names: one tensor, or one for each layer along our leading axis.
    kind: key of `_TRANSPOSITIONS`.
  """

  names: tuple[str, ...]
  kind: str = "same"


def _same(x: np.ndarray) -> np.ndarray:
  return x


def _transposed(x: np.ndarray) -> np.ndarray:
  return x.T


def _patches_to_kernel(x: np.ndarray) -> np.ndarray:
  return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _kernel_to_patches(x: np.ndarray) -> np.ndarray:
  side = round((x.shape[0] / 3) ** 0.5)
  return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


# Kind of an entry -> functions from their layout to ours, and back.
_TRANSPOSITIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
  "same": (_same, _same),
  "linear": (_transposed, _transposed),  # [out in] and [in out]
  "convolution": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW and HWIO
  "patches": (_patches_to_kernel, _kernel_to_patches),  # OIHW and [(h w i) o]
}
_BLOCK = {
  "attention_norm": "ln_1",
  "qkv": "attn.in_proj_",
  "out": "attn.out_proj.",
  "mlp_norm": "ln_2",
  "fc1": "mlp.c_fc.",
  "fc2": "mlp.c_proj.",
}


def layout(model: ModelFields, heads: Sequence[str]) -> dict[str, Entry]:
  """Maps the path of each array of a model, such as "params/towers/image/class_embedding", to its tensors.

  The neighbour bank has no entry, since no project saves one; nor do the heads of MoCo v3, BYOL and masked image
  modelling and the arrays of a RegNet, for which there is no format.

  Args:
    model: `config.model` as nested dicts.
    heads: the model's heads.
  """
  entries = {**(_text(model) if "joint" in heads else {}), **_heads(model, heads)}
  if model["image"]["kind"] == "vit":
    entries |= _vit(model)
  elif model["image"]["kind"] == "resnet":
    entries |= _resnet(model)
  elif model["image"]["kind"] == "convnext":
    entries |= _convnext(model)
  return entries


def abstract_variables(model: ModelFields, heads: Sequence[str], image_size: int) -> tuple[Model, Tree]:
  """A model with these heads, and the shapes of its parameters and collections under "params" and "collections"."""
  roles = {role for head in heads for role in HEADS[head].views}
  views = Views(**{role: 0 if role.startswith("masked_") else (0,) for role in roles})
  built = make_model(model, views=views, heads=tuple(heads))
  groups = (model["heads"]["norm_groups"], model["heads"]["bank_groups"], model["image"].get("norm_groups", 1))
  shape, examples = jax.ShapeDtypeStruct, math.lcm(*groups)  # each number of groups divides the batch
  batch = {
    "image": shape((examples, 1, image_size, image_size, 3), jnp.uint8),
    "text": shape((examples, 1, model["text"]["context_length"]), jnp.int32),
    "mlm_position": shape((examples, 1), jnp.int32),
    "mim_position": shape((examples, 1), jnp.int32),
  }
  params, collections = jax.eval_shape(lambda batch: built.init(jax.random.key(0), batch), batch)
  return built, {"params": params, "collections": collections}


def to_variables(tensors: Mapping[str, np.ndarray], entries: Mapping[str, Entry]) -> Tree:
  """Our arrays, float32, from a state dict with all their tensors."""
  flat = {}
  for path, entry in entries.items():
    transpose = _TRANSPOSITIONS[entry.kind][0]
    layers = [np.asarray(transpose(tensors[name]), np.float32) for name in entry.names]
    flat[path] = np.stack(layers) if is_stacked(path) else np.array(layers[0], order="C")
  return unflatten_dict(flat, sep="/")


def to_state_dict(variables: Tree, entries: Mapping[str, Entry]) -> StateDict:
  """The state dict, float32, of our arrays; arrays without an entry are omitted."""
  flat, tensors = flatten_dict(variables, sep="/"), {}
  for path, entry in entries.items():
    array = np.asarray(flat[path])
    layers = array if is_stacked(path) else [array]
    transpose = _TRANSPOSITIONS[entry.kind][1]
    tensors |= {name: np.array(transpose(layer), order="C") for name, layer in zip(entry.names, layers, strict=True)}
  return tensors


def expected_shapes(variables: Tree, entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
  """Maps the name of each tensor to its shape in the state dict."""
  flat, shapes = flatten_dict(variables, sep="/"), {}
  for path, entry in entries.items():
    shape = flat[path].shape[1:] if is_stacked(path) else flat[path].shape
    transposed = _TRANSPOSITIONS[entry.kind][1](np.broadcast_to(np.float32(0), shape)).shape  # takes no memory
    shapes |= dict.fromkeys(entry.names, transposed)
  return shapes


def _leaves(*names: str, leaf: str) -> tuple[str, ...]:
  return tuple(f"{name}.{leaf}" for name in names)


def _norm(path: str, *names: str) -> dict[str, Entry]:
  """A norm, or stacked norms of several layers; so are `_linear` and `_convolution`."""
  return {f"{path}/scale": Entry(_leaves(*names, leaf="weight")), f"{path}/bias": Entry(_leaves(*names, leaf="bias"))}


def _convolution(path: str, *names: str) -> dict[str, Entry]:
  kernel = Entry(_leaves(*names, leaf="weight"), "convolution")
  return {f"{path}/kernel": kernel, f"{path}/bias": Entry(_leaves(*names, leaf="bias"))}


def _batch_norm(half: str, path: str, *names: str) -> dict[str, Entry]:
  """A batch norm, or stacked batch norms of several layers."""
  theirs = {
    f"params/{half}/{path}/scale": "weight",
    f"params/{half}/{path}/bias": "bias",
    f"collections/{half}/batch_stats/{path}/mean": "running_mean",
    f"collections/{half}/batch_stats/{path}/var": "running_var",
  }
  return {ours: Entry(_leaves(*names, leaf=leaf)) for ours, leaf in theirs.items()}


def _linear(path: str, *names: str, bias: bool = True) -> dict[str, Entry]:
  entries = {f"{path}/kernel": Entry(_leaves(*names, leaf="weight"), "linear")}
  return entries | ({f"{path}/bias": Entry(_leaves(*names, leaf="bias"))} if bias else {})


def _transformer(path: str, name: str, depth: int) -> dict[str, Entry]:
  entries = {}
  for ours, theirs in _BLOCK.items():
    weight, kind = ("scale", "same") if "norm" in ours else ("kernel", "linear")
    dot = "." if "norm" in ours else ""
    for leaf, their_leaf, leaf_kind in ((weight, "weight", kind), ("bias", "bias", "same")):
      names = tuple(f"{name}.resblocks.{index}.{theirs}{dot}{their_leaf}" for index in range(depth))
      entries[f"{path}/blocks/{ours}/{leaf}"] = Entry(names, leaf_kind)
  return entries


def _text(model: ModelFields) -> dict[str, Entry]:
  tower = "params/towers/text"
  of_class = {f"{tower}/class_embedding": Entry(("cls_emb",))} if model["text"]["pooling"] == "class" else {}
  return {
    **of_class,
    f"{tower}/token_embedding/embedding": Entry(("token_embedding.weight",)),
    f"{tower}/position_embedding": Entry(("positional_embedding",)),
    **_transformer(f"{tower}/transformer", "transformer", model["text"]["depth"]),
    **_norm(f"{tower}/final_norm", "ln_final"),
  }


def _vit(model: ModelFields) -> dict[str, Entry]:
  tower = "params/towers/image"
  entries = {
    f"{tower}/position_embedding": Entry(("visual.positional_embedding",)),
    f"{tower}/patch_embedding/kernel": Entry(("visual.conv1.weight",), "patches"),
    **_transformer(f"{tower}/transformer", "visual.transformer", model["image"]["depth"]),
    **_norm(f"{tower}/post_norm", "visual.ln_post"),
  }
  if model["image"]["patch_bias"]:
    entries[f"{tower}/patch_embedding/bias"] = Entry(("visual.conv1.bias",))
  if model["image"].get("pooling") == "map":
    entries |= _attention_pool(f"{tower}/attention_pool", "visual.head")
  else:
    entries[f"{tower}/class_embedding"] = Entry(("visual.class_embedding",))
  if model["image"].get("pooling") == "query":
    entries |= _query_pool(f"{tower}/query_pool", "visual.attn_pool")
  return entries | (_norm(f"{tower}/pre_norm", "visual.ln_pre") if model["image"]["pre_norm"] else {})


def _query_pool(path: str, name: str) -> dict[str, Entry]:
  entries = {f"{path}/probe": Entry((f"{name}.probe",)), **_norm(f"{path}/norm", f"{name}.ln_k")}
  for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj")):
    entries |= _linear(f"{path}/{ours}", f"{name}.attn.{theirs}")
  return entries


def _attention_pool(path: str, name: str) -> dict[str, Entry]:
  return {
    f"{path}/probe": Entry((f"{name}.probe",)),
    f"{path}/qkv/kernel": Entry((f"{name}.attention.in_proj_weight",), "linear"),
    f"{path}/qkv/bias": Entry((f"{name}.attention.in_proj_bias",)),
    **_linear(f"{path}/out", f"{name}.attention.out_proj"),
    **_norm(f"{path}/mlp_norm", f"{name}.layernorm"),
    **_linear(f"{path}/fc1", f"{name}.mlp.fc1"),
    **_linear(f"{path}/fc2", f"{name}.mlp.fc2"),
  }


def _resnet(model: ModelFields) -> dict[str, Entry]:
  tower, entries = "params/towers/image", {}

  def layer(path: str, conv: str, norm: str, blocks: Sequence[str], their_conv: str, their_norm: str) -> None:
    kernels = tuple(f"visual.{block}{their_conv}.weight" for block in blocks)
    entries[f"{tower}/{path}{conv}/kernel"] = Entry(kernels, "convolution")
    entries.update(_batch_norm("towers", f"image/{path}{norm}", *(f"visual.{block}{their_norm}" for block in blocks)))

  for index in (1, 2, 3):
    layer("", f"stem_conv{index}", f"stem_norm{index}", [""], f"conv{index}", f"bn{index}")
  for stage, depth in enumerate(model["image"]["layers"], start=1):
    blocks = [f"layer{stage}.{block}." for block in range(depth)]
    for which, names in (("first", blocks[:1]), ("rest", blocks[1:])):
      for index in (1, 2, 3) if names else ():
        layer(f"stage{stage}_{which}/", f"conv{index}", f"norm{index}", names, f"conv{index}", f"bn{index}")
    layer(f"stage{stage}_first/", "shortcut_conv", "shortcut_norm", blocks[:1], "downsample.0", "downsample.1")
  pool = f"{tower}/attention_pool"
  entries[f"{pool}/position_embedding"] = Entry(("visual.attnpool.positional_embedding",))
  for name in ("query", "key", "value"):
    entries |= _linear(f"{pool}/{name}", f"visual.attnpool.{name[0]}_proj")
  return entries


def _convnext(model: ModelFields) -> dict[str, Entry]:
  tower, trunk, image = "params/towers/image", "visual.trunk", model["image"]
  entries = {**_convolution(f"{tower}/stem", f"{trunk}.stem.0"), **_norm(f"{tower}/stem_norm", f"{trunk}.stem.1")}
  for stage, depth in enumerate(image["layers"]):
    ours, theirs = f"{tower}/stage{stage + 1}", f"{trunk}.stages.{stage}"
    if stage:
      entries |= _norm(f"{ours}/norm", f"{theirs}.downsample.0")
      entries |= _convolution(f"{ours}/downsample", f"{theirs}.downsample.1")
    blocks = [f"{theirs}.blocks.{block}" for block in range(depth)]
    entries |= _convolution(f"{ours}/blocks/depthwise", *(f"{block}.conv_dw" for block in blocks))
    entries |= _norm(f"{ours}/blocks/norm", *(f"{block}.norm" for block in blocks))
    for layer in ("fc1", "fc2"):
      entries |= _linear(f"{ours}/blocks/{layer}", *(f"{block}.mlp.{layer}" for block in blocks))
    entries[f"{ours}/blocks/layer_scale"] = Entry(tuple(f"{block}.gamma" for block in blocks))
  entries |= _norm(f"{tower}/post_norm", f"{trunk}.head.norm")
  return entries | (_linear(f"{tower}/hidden", "visual.head.mlp.fc1") if image["hidden"] else {})


def _heads(model: ModelFields, heads: Sequence[str]) -> dict[str, Entry]:
  entries = _joint(model) if "joint" in heads else {}
  if "sigmoid" in heads:
    entries["params/heads/logit_bias"] = Entry(("logit_bias",))
  if "filip" in heads:
    entries["params/heads/dense_logit_scale"] = Entry(("logit_scale_dense",))
    for name in ("image_mapping", "text_mapping"):
      entries |= _linear(f"params/heads/{name}", name)
  if "simclr" in heads:
    entries |= _mlp("simclr", [f"image_mlp.layer{i}" for i in (1, 2, 3)], [f"image_mlp.bn{i}" for i in (1, 2)])
  if "simsiam" in heads:
    entries |= _mlp("projector", [f"projector.linear{i}" for i in (1, 2, 3)], [f"projector.bn{i}" for i in (1, 2, 3)])
    entries |= _mlp("predictor", ["predictor.linear1", "predictor.layer2"], ["predictor.bn1"])
  if "mlm" in heads:
    entries |= _linear("params/heads/mlm", "text_label_predictor")
  return entries


def _joint(model: ModelFields) -> dict[str, Entry]:
  entries = {"params/heads/logit_scale": Entry(("logit_scale",))}
  image, text = "params/heads/image_projection", "params/heads/text_projection"
  if model["image"]["kind"] == "resnet":  # OpenAI's projection is the last layer of its attention pool
    entries |= _linear(image, "visual.attnpool.c_proj", bias=model["heads"]["image_bias"])
  elif model["heads"].get("image_linear", True):
    entries[f"{image}/kernel"] = Entry(("visual.proj",))
    if model["heads"]["image_bias"]:
      entries[f"{image}/bias"] = Entry(("visual.proj_bias",))
  if not model["heads"].get("text_linear", True):
    return entries
  if model["heads"]["text_bias"]:
    return entries | _linear(text, "text_projection")
  return entries | {f"{text}/kernel": Entry(("text_projection",))}


def _mlp(head: str, linears: Sequence[str], norms: Sequence[str]) -> dict[str, Entry]:
  entries = {}
  for index, name in enumerate(linears):
    entries |= _linear(f"params/heads/{head}/linear{index}", name)
  for index, name in enumerate(norms):
    entries |= _batch_norm("heads", f"{head}/norm{index}", name)
  return entries

"""Numbers of the reference implementations (see fixtures/README.md) and their weights as parameters of our modules.

`sd` is a PyTorch state dict: a linear weight is `[out in]`, a convolution `[out in height width]`.
"""

from pathlib import Path

from flax import linen as nn
import jax
import numpy as np

from declip_jax.models.heads import Heads
from declip_jax.models.model import Model
from declip_jax.models.towers import Towers
from declip_jax.objectives import total_loss
from declip_jax.types import Views

FIXTURES = Path(__file__).parent / "fixtures"
# Pixels of the fixtures are already normalised: a mean and a deviation that leave them as they are.
UNCHANGED = {"mean": (0.0,), "std": (1 / 255,)}
OPENAI_BLOCK = {
  "attention_norm": "ln_1",
  "qkv": "attn.in_proj_",
  "out": "attn.out_proj",
  "mlp_norm": "ln_2",
  "fc1": "mlp.c_fc",
  "fc2": "mlp.c_proj",
}
TIMM_BLOCK = {
  "attention_norm": "norm1",
  "qkv": "attn.qkv",
  "out": "attn.proj",
  "mlp_norm": "norm2",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
}


def load(*names):
  """The arrays of some fixtures; those stored as float16, without loss, come back as float32."""
  arrays = {}
  for name in names:
    with np.load(FIXTURES / f"{name}.npz") as file:
      arrays |= {key: file[key] for key in file.files}
  return {key: a.astype(np.float32) if a.dtype == np.float16 else a for key, a in arrays.items()}


def below(arrays, prefix):
  """The entries under a prefix, without it."""
  return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def pixels(*views):
  """Images `[b c h w]`, one array per view, as the `[b v h w c]` of a batch."""
  return np.stack([np.moveaxis(view, 1, -1) for view in views], axis=1)


def dense(sd, name):
  """A linear layer; a `name` that ends in `_` is one of PyTorch's packed parameters, such as `in_proj_weight`."""
  dot = "" if name.endswith("_") else "."
  bias = {"bias": sd[f"{name}{dot}bias"]} if f"{name}{dot}bias" in sd else {}
  return {"kernel": sd[f"{name}{dot}weight"].T, **bias}


def norm(sd, name):
  """A layer or batch norm."""
  return {"scale": sd[f"{name}.weight"], "bias": sd[f"{name}.bias"]}


def statistics(sd, name):
  """The running statistics of a batch norm."""
  return {"mean": sd[f"{name}.running_mean"], "var": sd[f"{name}.running_var"]}


def patches(weight):
  """A patch convolution `[w c p q]` as the matrix `[(p q c) w]`."""
  return {"kernel": weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])}


def transformer(sd, prefix, names):
  """Blocks `prefix0.`, `prefix1.`, ... stacked along a leading axis."""
  depth = 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in sd if key.startswith(prefix))
  layer = {ours: norm if "norm" in ours else dense for ours in names}
  blocks = [
    {ours: layer[ours](below(sd, f"{prefix}{index}."), theirs) for ours, theirs in names.items()}
    for index in range(depth)
  ]
  return {
    "blocks": {
      ours: {leaf: np.stack([block[ours][leaf] for block in blocks]) for leaf in blocks[0][ours]} for ours in names
    }
  }


def openai_vit(sd):
  """The vision transformer of openai/CLIP, without its projection."""
  return {
    "class_embedding": sd["class_embedding"],
    "position_embedding": sd["positional_embedding"],
    "patch_embedding": patches(sd["conv1.weight"]),
    "pre_norm": norm(sd, "ln_pre"),
    "post_norm": norm(sd, "ln_post"),
    "transformer": transformer(sd, "transformer.resblocks.", OPENAI_BLOCK),
  }


def timm_vit(sd):
  """The vision transformer of timm, which SLIP uses."""
  return {
    "class_embedding": sd["cls_token"][0, 0],
    "position_embedding": sd["pos_embed"][0],
    "patch_embedding": patches(sd["patch_embed.proj.weight"]) | {"bias": sd["patch_embed.proj.bias"]},
    "post_norm": norm(sd, "norm"),
    "transformer": transformer(sd, "blocks.", TIMM_BLOCK),
  }


def text(sd):
  """The text transformer of openai/CLIP, SLIP and DeCLIP, without its projection."""
  return {
    "token_embedding": {"embedding": sd["token_embedding.weight"]},
    "position_embedding": sd["positional_embedding"],
    "final_norm": norm(sd, "ln_final"),
    "transformer": transformer(sd, "transformer.resblocks.", OPENAI_BLOCK),
  }


def resnet(sd):
  """The parameters of stem and stages of openai/CLIP's ResNet."""
  kernels = {
    ours: {"kernel": sd[f"{theirs}.weight"].transpose(2, 3, 1, 0)}
    for ours, theirs in _resnet_layers(sd, "conv").items()
  }
  return _nested(kernels | {ours: norm(sd, theirs) for ours, theirs in _resnet_layers(sd, "norm").items()})


def resnet_statistics(sd):
  """The running statistics of stem and stages of openai/CLIP's ResNet."""
  return _nested({ours: statistics(sd, theirs) for ours, theirs in _resnet_layers(sd, "norm").items()})


def _resnet_layers(sd, kind):
  """Our names of the convolutions ("conv") or norms ("norm") in `sd`, and the reference's."""
  theirs_short, shortcut = {"conv": ("conv", "downsample.0"), "norm": ("bn", "downsample.1")}[kind]
  layers = {f"stem_{kind}{index}": f"{theirs_short}{index}" for index in (1, 2, 3)}
  for stage, block in sorted({tuple(key.split(".")[:2]) for key in sd if key.startswith("layer")}):
    ours, theirs = f"{stage.replace('layer', 'stage')}_block{block}", f"{stage}.{block}"
    layers |= {f"{ours}/{kind}{index}": f"{theirs}.{theirs_short}{index}" for index in (1, 2, 3)}
    layers |= {f"{ours}/shortcut_{kind}": f"{theirs}.{shortcut}"}
  return {ours: theirs for ours, theirs in layers.items() if any(key.startswith(f"{theirs}.") for key in sd)}


def mlp(sd, linears, norms):
  """An MLP with batch norms: parameters and running statistics."""
  params = {f"linear{index}": dense(sd, name) for index, name in enumerate(linears)}
  params |= {f"norm{index}": norm(sd, name) for index, name in enumerate(norms)}
  return params, {f"norm{index}": statistics(sd, name) for index, name in enumerate(norms)}


def _nested(flat):
  tree = {}
  for path, value in flat.items():
    *parents, leaf = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


class GivenImages(nn.Module):
  """An image tower whose input already is the feature, as `[b 1 1 w]`."""

  @nn.compact
  def __call__(self, images, train=False):
    return images.reshape(images.shape[0], -1)


class GivenTexts(nn.Module):
  """A text tower whose input already is the feature `[b w]`."""

  @nn.compact
  def __call__(self, features):
    return features, features[:, None]


def make_model(image, text, views=None, **heads):
  """A model of these towers; `heads` are fields of `Heads` other than the tests' usual ones."""
  usual = {
    "heads": (),
    "vocab_size": 8,
    "image_bias": False,
    "text_bias": False,
    "simclr_projector": (),
    "simsiam_projector": (),
    "simsiam_predictor": (),
    "bank_size": 0,
  }
  return Model(towers=Towers(image, text, **UNCHANGED), heads=Heads(**usual | heads), views=views or Views())


def differentiate(model, params, collections, batch, loss_of=None, **weights):
  """One forward and backward pass in training mode.

  Returns:
    Loss, gradient, features, outputs, metrics and new collections. `loss_of(outputs)` is added to the weighted terms.
  """

  def forward(params):
    features, towers = model.encode(params, collections, batch)
    outputs, heads = model.apply_heads(params, collections, features)
    loss, metrics = total_loss(outputs, batch, weights)
    loss += loss_of(outputs) if loss_of else 0.0
    return loss, (features, outputs, metrics, {"towers": towers, "heads": heads})

  (loss, aux), gradient = jax.jit(jax.value_and_grad(forward, has_aux=True))(params)
  return loss, gradient, *aux

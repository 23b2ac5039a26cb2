"""Tests of the layout: every array maps to tensors and back, stacked layers in order, for any groups of a batch."""

import re

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
import numpy as np
import pytest

from declip_jax import architectures, config
from declip_jax.weights.layout import abstract_variables, layout, to_state_dict, to_variables

# Arrays that no project's files have.
WITHOUT_FORMAT = {
  "momentum": r"collections/momentum/.*|.*/heads/(batch_stats/)?momentum_.*",
  "mim": r".*/heads/mim(_norm)?/.*|.*/mask_embedding",
  "bank": r".*/heads/bank/text",
}
HEADS = ("joint", "sigmoid", "filip", "simclr", "simsiam", "mlm", *WITHOUT_FORMAT)


def small(image: ConfigDict) -> ConfigDict:
  """A model with this image tower and few other parameters."""
  model = config.default("clip").model
  model.image, model.text = image, architectures.text(16, 3, vocab_size=30, context_length=5, heads=2)
  model.heads.update({"embed_dim": 12, "dense_dim": 6, "bank_size": 7, "simclr_projector": (5, 6, 7)})
  model.heads.update({"simsiam_projector": (5, 6, 7), "simsiam_predictor": (3, 7)})
  model.heads.update({"momentum_projector": (5, 6, 7), "momentum_predictor": (3, 7)})
  return model


def check_round_trip(variables: dict[str, np.ndarray], entries: dict) -> dict[str, np.ndarray]:
  """The tensors of arrays by path, after checking that they map back bit for bit."""
  assert entries.keys() == variables.keys()
  tensors = to_state_dict(unflatten_dict(variables, sep="/"), entries)
  assert len(tensors) == sum(len(entry.names) for entry in entries.values())
  back = flatten_dict(to_variables(tensors, entries), sep="/")
  assert back.keys() == variables.keys()
  for key, value in variables.items():
    assert (back[key].shape, back[key].dtype) == (value.shape, value.dtype), key
    np.testing.assert_array_equal(back[key], value, err_msg=key)
  return tensors


@pytest.mark.parametrize("head", HEADS)
def test_every_array_has_its_tensors_but_those_without_a_format(head: str) -> None:
  model = small(architectures.vit(8, 16, 2, 2))
  alone = head in ("joint", "simclr", "momentum", "mim")
  heads = (head,) if alone else ("joint", head)
  _, shapes = abstract_variables(model.to_dict(), heads, 16)
  assert ("text" in shapes["params"]["towers"]) == ("joint" in heads)
  flat, rng = flatten_dict(shapes, sep="/"), np.random.default_rng(0)
  without = {path for path in flat if re.fullmatch(WITHOUT_FORMAT.get(head, ""), path)}
  assert bool(without) == (head in WITHOUT_FORMAT)
  variables = {path: rng.normal(size=flat[path].shape).astype(np.float32) for path in flat.keys() - without}
  check_round_trip(variables, layout(model.to_dict(), heads))


def test_every_layer_of_a_resnet_has_its_tensors() -> None:
  model = small(architectures.resnet(8, (2, 3, 1, 1)))
  model.heads.image_bias = True
  _, shapes = abstract_variables(model.to_dict(), ("joint",), 32)
  rng = np.random.default_rng(0)
  variables = {
    key: rng.normal(size=leaf.shape).astype(np.float32) for key, leaf in flatten_dict(shapes, sep="/").items()
  }
  tensors = check_round_trip(variables, layout(model.to_dict(), ("joint",)))
  tower, statistics = "params/towers/image", "collections/towers/batch_stats/image"
  expected = {
    "visual.layer2.0.conv1.weight": variables[f"{tower}/stage2_first/conv1/kernel"].transpose(3, 2, 0, 1),
    "visual.layer2.1.conv3.weight": variables[f"{tower}/stage2_rest/conv3/kernel"][0].transpose(3, 2, 0, 1),
    "visual.layer2.2.bn3.weight": variables[f"{tower}/stage2_rest/norm3/scale"][1],
    "visual.layer2.2.bn1.running_var": variables[f"{statistics}/stage2_rest/norm1/var"][1],
    "visual.layer2.0.downsample.1.bias": variables[f"{tower}/stage2_first/shortcut_norm/bias"],
    "transformer.resblocks.2.mlp.c_fc.weight": variables["params/towers/text/transformer/blocks/fc1/kernel"][2].T,
  }
  for name, value in expected.items():
    np.testing.assert_array_equal(tensors[name], value, err_msg=name)


@pytest.mark.parametrize(
  ("image", "norms", "banks"),
  [
    pytest.param(1, 32, 32, marks=pytest.mark.slow),
    (1, 3, 2),
    pytest.param(5, 3, 2, marks=pytest.mark.slow),
  ],
)
def test_batch_groups_change_only_the_number_of_banks(image: int, norms: int, banks: int) -> None:
  heads = ("bank", "joint", "momentum", "simclr", "simsiam")
  model = small(architectures.vit(8, 16, 2, 2) if image == 1 else architectures.resnet(8, (1, 1, 1, 1)))
  _, one = abstract_variables(model.to_dict(), heads, 32)
  model.heads.update({"norm_groups": norms, "bank_groups": banks})
  if image > 1:
    model.image.norm_groups = image
  _, many = abstract_variables(model.to_dict(), heads, 32)
  bank = many["collections"]["heads"].pop("bank")["text"]
  assert one["collections"]["heads"].pop("bank")["text"].entries.shape == (1, 7, 12)
  assert bank.entries.shape == (banks, 7, 12)
  assert many == one

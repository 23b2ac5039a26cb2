"""Tests of `declip_jax.models.heads`: whole steps of SLIP and DeCLIP, value, gradient, statistics and bank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_weights as reference

from declip_jax import config
from declip_jax.data.recipes import RECIPES
from declip_jax.models import bank
from declip_jax.models.heads import unit_norm
from declip_jax.models.model import make_model
from declip_jax.models.text import TextTransformer
from declip_jax.models.vit import ViT
from declip_jax.objectives import heads_for
from declip_jax.types import Features, Views


def assert_near(ours, theirs, **tolerance):
  for name, value in ours.items():
    np.testing.assert_allclose(value, theirs[name], err_msg=name, **tolerance)


@pytest.fixture(scope="module")
def slip():
  """A training step of SLIP: three image views, a caption, both losses."""
  golden = reference.load("slip", "slip_text")
  sd = reference.below(golden, "sd/")
  model = reference.make_model(
    ViT(patch=8, width=48, depth=2, heads=3, pre_norm=False, patch_bias=True, activation="gelu", epsilon=1e-6),
    TextTransformer(vocab_size=128, context_length=16, width=64, depth=2, heads=2, eot=127),
    Views(ssl_image=(1, 2)),
    heads=("simclr",),
    image_width=48,
    text_width=64,
    embed_dim=40,
    simclr_projector=(64, 64, 32),
  )
  simclr, statistics = reference.mlp(sd, [f"image_mlp.layer{i}" for i in (1, 2, 3)], ["image_mlp.bn1", "image_mlp.bn2"])
  params = {
    "towers": {"image": reference.timm_vit(reference.below(sd, "visual.")), "text": reference.text(sd)},
    "heads": {
      "image_projection": {"kernel": sd["image_projection"]},
      "text_projection": {"kernel": sd["text_projection"]},
      "logit_scale": sd["logit_scale"],
      "simclr": simclr,
    },
  }
  collections = {"towers": {}, "heads": {"batch_stats": {"simclr": statistics}}}
  views = reference.pixels(golden["image"], golden["aug1"], golden["aug2"])
  batch = {"image": views, "text": golden["tokens"][:, None]}
  result = reference.differentiate(model, params, collections, batch, clip=1.0, simclr=1.0)
  encoded = [
    jax.jit(model.encode_image)(params, collections, batch["image"][:, 0]),
    jax.jit(model.encode_text)(params, collections, batch["text"][:, 0]),
  ]
  return golden, params, result, encoded


def test_slip_embeddings_and_projections(slip):
  golden, params, (_, _, features, outputs, *_), _ = slip
  projected = features.image[:, 0] @ params["heads"]["image_projection"]["kernel"]
  np.testing.assert_allclose(projected, golden["out/image_embed"], rtol=1e-4, atol=2e-5)
  np.testing.assert_allclose(outputs.image[0], unit_norm(golden["out/image_embed"]), atol=1e-5)
  np.testing.assert_allclose(outputs.text[0], unit_norm(golden["out/text_embed"]), atol=1e-5)
  expected = np.stack([golden["out/aug1_embed"], golden["out/aug2_embed"]])
  np.testing.assert_allclose(outputs.simclr, expected, rtol=1e-4, atol=1e-4)


def test_slip_in_evaluation_mode(slip):
  golden, *_, (image, text) = slip
  np.testing.assert_allclose(image, unit_norm(golden["eval/image_embed"]), atol=1e-5)
  np.testing.assert_allclose(text, unit_norm(golden["eval/text_embed"]), atol=1e-5)


def test_slip_statistics_are_those_of_each_view_in_turn(slip):
  golden, _, (*_, collections), _ = slip
  found = collections["heads"]["batch_stats"]["simclr"]
  for index in (1, 2):
    expected = reference.statistics(reference.below(golden, "after/sd/"), f"image_mlp.bn{index}")
    assert_near(found[f"norm{index - 1}"], expected, rtol=1e-4, atol=2e-5)


def test_slip_loss_and_gradient(slip):
  golden, _, (loss, gradient, _, _, metrics, _), _ = slip
  np.testing.assert_allclose(loss, golden["slip/loss"], atol=1e-5)
  np.testing.assert_allclose(metrics["loss/clip"], golden["slip/clip_loss"], atol=1e-5)
  np.testing.assert_allclose(metrics["loss/simclr"], golden["slip/ssl_loss"], atol=1e-5)
  image, text, heads = gradient["towers"]["image"], gradient["towers"]["text"], gradient["heads"]
  ours = {
    "image_projection": heads["image_projection"]["kernel"],
    "text_projection": heads["text_projection"]["kernel"],
    "logit_scale": heads["logit_scale"],
    "visual.cls_token": image["class_embedding"][None, None],
    "visual.pos_embed": image["position_embedding"][None],
    "visual.patch_embed.proj.bias": image["patch_embedding"]["bias"],
    "visual.blocks.1.attn.qkv.bias": image["transformer"]["blocks"]["qkv"]["bias"][1],
    "visual.norm.weight": image["post_norm"]["scale"],
    "image_mlp.bn1.weight": heads["simclr"]["norm0"]["scale"],
    "image_mlp.layer3.bias": heads["simclr"]["linear2"]["bias"],
    "transformer.resblocks.0.attn.in_proj_bias": text["transformer"]["blocks"]["qkv"]["bias"][0],
  }
  expected = reference.below(golden, "slip/grad/")
  assert set(ours) == set(expected)
  assert_near(ours, expected, rtol=1e-3, atol=2e-5)


def reference_neighbour_loss(golden, outputs):
  """DeCLIP's own nearest-neighbour loss, which differs from ours: neighbours of both texts, image to text only."""
  searched = bank.empty(*golden["bank_before"].shape)._replace(entries=jnp.asarray(golden["bank_before"]))
  target = jnp.arange(outputs.image.shape[1])
  losses = [
    optax.softmax_cross_entropy_with_integer_labels(outputs.scale * image @ bank.nearest(searched, text).T, target)
    for image in outputs.image
    for text in outputs.text
  ]
  return jnp.mean(jnp.stack(losses))


@pytest.fixture(scope="module")
def declip():
  """A training step of DeCLIP behind the image tower: its image features are given."""
  golden = reference.load("declip")
  sd = reference.below(golden, "sd/")
  model = reference.make_model(
    reference.GivenImages(),
    TextTransformer(vocab_size=131, context_length=16, width=48, depth=2, heads=3, eot=130),
    Views(contrastive_image=(0, 1), contrastive_text=(0, 1), ssl_image=(0, 1), masked_text=0),
    heads=("bank", "mlm", "simsiam"),
    image_width=40,
    text_width=48,
    embed_dim=40,
    vocab_size=131,
    text_bias=True,
    simsiam_projector=(64, 64, 64),
    simsiam_predictor=(32, 64),
    bank_size=64,
  )
  projector, projector_statistics = reference.mlp(
    sd, [f"projector.linear{i}" for i in (1, 2, 3)], [f"projector.bn{i}" for i in (1, 2, 3)]
  )
  predictor, predictor_statistics = reference.mlp(sd, ["predictor.linear1", "predictor.layer2"], ["predictor.bn1"])
  encode_text = reference.below(sd, "encode_text.")
  params = {
    "towers": {"text": reference.text(encode_text)},
    "heads": {
      "image_projection": {"kernel": np.eye(40, dtype=np.float32)},
      "text_projection": reference.dense(encode_text, "text_projection"),
      "logit_scale": sd["logit_scale"][0],
      "projector": projector,
      "predictor": predictor,
      "mlm": reference.dense(sd, "text_label_predictor"),
    },
  }
  pointer, size = jnp.asarray(golden["bank_ptr_before"], jnp.int32).reshape(()), jnp.asarray(64)
  collections = {
    "towers": {},
    "heads": {
      "batch_stats": {"projector": projector_statistics, "predictor": predictor_statistics},
      "bank": {"text": bank.Bank(jnp.asarray(golden["bank_before"]), pointer, size)},
    },
  }
  images = np.stack([golden["declip/image_features1"], golden["declip/image_features2"]], axis=1)
  batch = {
    "image": images[:, :, None, None],
    "text": np.stack([golden["tokens1_masked"], golden["tokens2"]], axis=1),
    **masked_positions(golden["mlm_labels"], slots=6),
  }
  weights = {"clip": 0.4 / 4, "mvs": 0.4 * 3 / 4, "simsiam": 0.2, "mlm": 0.2}
  result = reference.differentiate(
    model,
    params,
    collections,
    batch,
    loss_of=lambda outputs: 0.2 * reference_neighbour_loss(golden, outputs),
    **weights,
  )
  return golden, batch, result


def masked_positions(labels, slots):
  """DeCLIP's labels `[b t]`, -100 where nothing is predicted, as the fields of a batch."""
  fields = {name: np.zeros((len(labels), slots), np.int32) for name in ("mlm_position", "mlm_target", "mlm_weight")}
  for row, label in enumerate(labels):
    chosen = np.flatnonzero(label != -100)
    fields["mlm_position"][row, : len(chosen)] = chosen
    fields["mlm_target"][row, : len(chosen)] = label[chosen]
    fields["mlm_weight"][row, : len(chosen)] = 1
  return fields | {"mlm_weight": fields["mlm_weight"].astype(np.float32)}


def test_declip_outputs(declip):
  golden, batch, (_, _, _, outputs, *_) = declip
  for view in (0, 1):
    expected = reference.below(golden, "declip/")
    np.testing.assert_allclose(outputs.text[view], unit_norm(expected[f"text_features{view + 1}"]), atol=1e-5)
    np.testing.assert_allclose(outputs.simsiam_projection[view], expected[f"projector{view + 1}"], atol=1e-4)
    np.testing.assert_allclose(outputs.simsiam_prediction[view], expected[f"predictor{view + 1}"], atol=1e-4)
  selected = outputs.mlm_logits[batch["mlm_weight"] == 1]
  np.testing.assert_allclose(selected, golden["declip/mlm_logits_selected"], rtol=1e-4, atol=5e-5)


def test_declip_terms(declip):
  golden, _, (*_, metrics, _) = declip
  pairs = {(i, t): golden[f"declip/infonce_i{i}t{t}"] for i in (1, 2) for t in (1, 2)}
  expected = {
    "clip": pairs.pop((1, 1)),
    "mvs": np.mean(list(pairs.values())),
    "simsiam": golden["declip/simsiam_loss"],
    "mlm": golden["declip/mlm_loss"],
  }
  assert_near({name: metrics[f"loss/{name}"] for name in expected}, expected, atol=1e-5)
  # The released code's one mean over four pairs, as a quarter of our first term and three of our second.
  folded = metrics["loss/clip"] / 4 + metrics["loss/mvs"] * 3 / 4
  np.testing.assert_allclose(folded, golden["declip/clip_loss"], atol=1e-5)


def test_declip_total_and_gradient(declip):
  golden, _, (loss, gradient, *_) = declip
  np.testing.assert_allclose(loss, golden["declip/total"], atol=1e-5)
  text, heads = gradient["towers"]["text"], gradient["heads"]
  ours = {
    "logit_scale": heads["logit_scale"][None],
    "encode_text.text_projection.weight": heads["text_projection"]["kernel"].T,
    "encode_text.text_projection.bias": heads["text_projection"]["bias"],
    "encode_text.ln_final.weight": text["final_norm"]["scale"],
    "projector.bn2.bias": heads["projector"]["norm1"]["bias"],
    "projector.bn3.weight": heads["projector"]["norm2"]["scale"],
    "predictor.layer2.bias": heads["predictor"]["linear1"]["bias"],
    "text_label_predictor.bias": heads["mlm"]["bias"],
  }
  expected = reference.below(golden, "declip/grad/")
  assert set(ours) == set(expected)
  assert_near(ours, expected, rtol=1e-3, atol=2e-5)


def test_declip_statistics(declip):
  golden, _, (*_, collections) = declip
  after = reference.below(golden, "declip/after/sd/")
  for head, count in (("projector", 3), ("predictor", 1)):
    for index in range(count):
      found = collections["heads"]["batch_stats"][head][f"norm{index}"]
      assert_near(found, reference.statistics(after, f"{head}.bn{index + 1}"), rtol=1e-4, atol=2e-5)


def test_the_bank_is_searched_first_and_then_takes_the_first_text_view(declip):
  golden, _, (_, _, _, outputs, _, collections) = declip
  np.testing.assert_array_equal(outputs.neighbour, golden["bank_before"][golden["declip/nn_index_text1"]])
  assert outputs.neighbour_ready == 1
  start, count = int(golden["bank_ptr_before"]), outputs.text.shape[1]
  expected = golden["bank_before"].copy()
  expected[start : start + count] = outputs.text[0]
  new = collections["heads"]["bank"]["text"]
  np.testing.assert_array_equal(new.entries, expected)
  assert (new.pointer, new.filled) == (start + count, 64)
  # DeCLIP writes its second view first, then the one that we write.
  after = golden["declip/bank_after"][start + count : start + 2 * count]
  np.testing.assert_allclose(new.entries[start : start + count], after, atol=1e-5)


def test_the_bank_is_ready_once_it_is_full():
  model = reference.make_model(
    reference.GivenImages(),
    reference.GivenTexts(),
    heads=("bank",),
    image_width=3,
    text_width=3,
    embed_dim=2,
    bank_size=5,
  )
  features = Features(image=jnp.ones((2, 1, 3)), text=jax.random.normal(jax.random.key(0), (2, 1, 3)))
  variables = model.heads.init(jax.random.key(1), features, model.views, True)
  collections = {"towers": {}, "heads": {"bank": variables["bank"]}}
  assert collections["heads"]["bank"]["text"].filled == 0  # init pushes nothing
  ready = []
  for _ in range(4):
    params = {"towers": {}, "heads": variables["params"]}
    outputs, new = model.apply_heads(params, collections, features)
    ready.append(float(outputs.neighbour_ready))
    collections["heads"] = new
  assert ready == [0, 0, 0, 1]


def test_unit_norm_of_a_zero_row_has_a_zero_gradient():
  x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
  np.testing.assert_allclose(unit_norm(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
  gradient = jax.grad(lambda x: unit_norm(x).sum())(x)
  assert np.isfinite(gradient).all()
  assert unit_norm(x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("method", ["clip", "slip", "declip"])
def test_bfloat16_stays_inside(method):
  """Parameters, collections, embeddings and logits are float32; only features are not."""
  c = config.default(method)
  c.model.dtype = "bfloat16"
  recipe = RECIPES[c.data.recipe]
  model = make_model(c.model, views=recipe.views, heads=heads_for(c.weights))
  shape = jax.ShapeDtypeStruct
  batch = {
    "image": shape((2, len(recipe.image_views), 64, 64, 3), jnp.uint8),
    "text": shape((2, len(recipe.text_views), 77), jnp.int32),
    "mlm_position": shape((2, 5), jnp.int32),
  }

  def run(batch):
    params, collections = model.init(jax.random.key(0), batch)
    features, _ = model.encode(params, collections, batch)
    outputs, new = model.apply_heads(params, collections, features)
    evaluated = model.encode_image(params, collections, batch["image"][:, 0])
    return params, new, features, outputs, (evaluated, model.encode_text(params, collections, batch["text"][:, 0]))

  params, collections, features, outputs, evaluated = jax.eval_shape(run, batch)
  assert {leaf.dtype for leaf in jax.tree.leaves(features)} == {jnp.dtype(jnp.bfloat16)}
  assert {leaf.dtype for leaf in jax.tree.leaves((params, evaluated))} == {jnp.dtype(jnp.float32)}
  float_leaves = [leaf for leaf in jax.tree.leaves(collections) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  assert {leaf.dtype for leaf in float_leaves} <= {jnp.dtype(jnp.float32)}
  contrast = [outputs.image, outputs.text, outputs.scale, outputs.mlm_logits, outputs.neighbour]
  assert {leaf.dtype for leaf in contrast if leaf is not None} == {jnp.dtype(jnp.float32)}

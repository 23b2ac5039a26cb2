"""The configs under `configs/`: each row builds, has the size and the recipe that its source says, and tells it.

Nothing is compiled and no array is made: models are traced for their shapes, at the batch size of the config.
"""

from functools import cache
import importlib.util
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from declip_jax import architectures, config, objectives, run
from declip_jax.sharding import check_batch
from declip_jax.state import abstract_state
from declip_jax.step import check_objective, make_schedule, make_step

CONFIGS = Path(__file__).parents[1] / "configs"
SCHEDULES = np.load(Path(__file__).parent / "fixtures" / "schedule.npz")
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))
OURS = ("demo", "small", "pretrain")  # no rows of a paper
EPOCH = 100_000_000  # examples; only clip_wit needs so many for its warm-up


@cache
def load(name):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def rows(*names):
  """(file, row) of every row that the files' own tables offer; a file without a table has one, its default."""
  return [(name, row) for name in names for row in getattr(load(name), "ROWS", [None])]


def get(name, row=None, rest=""):
  return load(name).get_config() if row is None else load(name).get_config(row + rest)


_traced = {}


def traced(c):
  """Parts and abstract state of a config; those with the same parameters and moments are traced once."""
  parts = run.build(c)
  key = str((c.model, objectives.heads_for(c.weights), c.data.image_size, c.optimizer.name, c.optimizer.frozen))
  if key not in _traced:
    batch = parts.batch_shape(c.batch_size)
    _traced[key] = abstract_state(batch, parts.mesh, model=parts.model, optimizer=parts.optimizer)
  return parts, _traced[key]


_checked = set()


def check_terms(c):
  """That each term finds its inputs. A ViT stands in for a ResNet, which takes three times as long to trace."""
  if c.model.image.kind == "resnet":
    c = c.copy_and_resolve_references()
    c.model.image = architectures.vit(patch=32, width=64, depth=1, heads=1)
  parts = run.build(c)
  key = str((objectives.active(c.weights), parts.recipe.views, c.terms, c.model.mlm_attention, c.model.heads))
  if key not in _checked:
    check_objective(c, parts.model, parts.batch_shape(c.batch_size))
    _checked.add(key)


def count(c):
  return sum(leaf.size for leaf in jax.tree.leaves(traced(c)[1].params))


METHODS = [*config.METHODS, *config.STUDIES, *(f"{method}_repo" for method in config.REPO_METHODS)]


@pytest.mark.parametrize(("name", "method"), [("demo", m) for m in config.METHODS] + [("small", m) for m in METHODS])
def test_every_method_builds_with_our_own_configs(name, method):
  c = load(name).get_config(method if name == "demo" else f"{method},fashion44k,/data")
  parts = run.build(c)
  check_objective(c, parts.model, parts.batch_shape(8))
  assert {"zero_shot", "heldout"} & set(c.evals) or method == "simclr"


@pytest.mark.parametrize(("name", "row"), rows(*NAMES))
def test_every_row_builds(name, row):
  c = get(name, row)
  parts, state = traced(c)
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
  check_terms(c)
  check_batch(c.batch_size, parts.mesh, "batch_size")
  make_schedule(c, run.plan_steps(c, EPOCH))  # which refuses a warm-up longer than the training
  assert config.from_json(c.to_json_best_effort()).to_dict() == c.to_dict()


_stepped = set()


@pytest.mark.parametrize(("name", "row"), rows(*NAMES))
def test_a_step_maps_the_state_to_one_of_the_same_shapes(name, row):
  c = get(name, row)
  parts, state = traced(c)
  o = c.optimizer
  program = (parts.recipe.views, objectives.active(c.weights), c.terms, c.model, c.data.image_size, c.batch_size)
  program += (o.name, o.schedule, o.decayed, o.frozen, o.multipliers, o.layer_decay, o.logit_scale_range)
  if str(program) in _stepped:  # rows that differ in data, epochs and rates take the same step
    return
  _stepped.add(str(program))
  step = make_step(c, parts, run.plan_steps(c, EPOCH), state)
  after, metrics = jax.eval_shape(step, state, parts.batch_shape(c.batch_size))
  shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, after)]
  assert shapes[0] == shapes[1]
  assert {f"loss/{term}" for term in objectives.active(c.weights)} <= metrics.keys()
  assert {leaf.shape for leaf in metrics.values()} == {()}


# What others count that no loss ever trains, so that we do not have it.
RESNET_FC = 2048 * 1024 + 1024  # DeCLIP's ResNet: a linear layer for other resolutions than 224
MLM_HEAD = 512 * 49409 + 49409  # its FILIP masks captions, but predicts nothing
SLIP_NORM = 2 * 4096  # its SLIP head: a norm behind the last layer, not applied


PUBLISHED = {
  ("declip_yfcc15m", "vit_clip"): 151_278_337,
  ("declip_yfcc15m", "vit_slip"): 172_282_881 - SLIP_NORM,
  ("declip_yfcc15m", "vit_filip"): 177_281_283 - MLM_HEAD,
  ("declip_yfcc15m", "vit_declip"): 180_306_946,
  ("declip_yfcc15m", "vit_defilip"): 180_635_139,
  ("declip_yfcc15m", "r50_clip"): 104_106_849 - RESNET_FC,
  ("declip_yfcc15m", "r50_filip"): 130_109_539 - RESNET_FC - MLM_HEAD,
  ("declip_yfcc15m", "r50_declip"): 133_659_746 - RESNET_FC,
  ("declip_88m", "r50"): 133_659_746 - RESNET_FC,
  ("declip_88m", "vitb32"): 186_207_746,
  ("slip", "clip_small_25ep"): 85_290_369,
  ("slip", "clip_base_25ep"): 149_619_969,
  ("slip", "clip_large_25ep"): 367_254_017,
  ("slip", "simclr_small_25ep"): 41_089_152,
  ("slip", "simclr_base_25ep"): 106_795_008,
  ("slip", "simclr_large_25ep"): 325_346_560,
  ("slip", "slip_small_25ep"): 104_713_857,
  ("slip", "slip_base_25ep"): 170_616_321,
  ("slip", "slip_large_25ep"): 389_298_945,
  ("slip", "clip_rn50_25ep"): 102_007_137,
  ("clip_wit", "RN50"): 102_007_137,
  ("clip_wit", "RN101"): 119_688_033,
  ("clip_wit", "RN50x4"): 178_300_601,
  ("clip_wit", "RN50x16"): 290_979_217,
  ("clip_wit", "RN50x64"): 623_258_305,
  ("clip_wit", "ViT-B/32"): 151_277_313,
  ("clip_wit", "ViT-B/16"): 149_620_737,
  ("clip_wit", "ViT-L/14"): 427_616_513,
  ("clip_wit", "ViT-L/14@336px"): 427_944_193,
}


def layers(*widths, bias):
  """Linear layers of these widths, and a gain and a bias of the norm behind each but the last."""
  return sum(a * b + b * bias for a, b in itertools.pairwise(widths)) + sum(2 * width for width in widths[1:-1])


MOCO_HEADS = layers(768, 4096, 4096, 256, bias=False) + layers(256, 4096, 256, bias=False)
MIM_HEAD = 768 + 2 * 768 + layers(768, 16 * 16 * 3, bias=True)  # the hidden patches' embedding, a norm, the pixels
# A row that has no published count: one that has, and what it has more.
LIKE = {
  ("declip_yfcc15m", "r50_slip"): ("declip_yfcc15m", "r50_clip", layers(2048, 4096, 4096, 256, bias=True)),
  ("declip_paper", "cc3m_iss"): ("declip_yfcc15m", "r50_declip", -MLM_HEAD),
  ("declip_paper", "cc3m_tss"): ("declip_yfcc15m", "r50_clip", MLM_HEAD),
  ("slip", "slip_mocov3"): ("slip", "clip_base_25ep", MOCO_HEADS),
  ("slip", "slip_byol"): ("slip", "clip_base_25ep", MOCO_HEADS),
  ("slip", "slip_mim"): ("slip", "clip_base_25ep", MIM_HEAD),
}
for one, others in {
  ("declip_yfcc15m", "r50_clip"): "cc3m_clip cc3m_mvs cc3m_clip_weak cc3m_nns yfcc15m_clip",
  ("declip_yfcc15m", "r50_declip"): "cc3m_mvs_ss cc3m_declip yfcc15m_declip",
}.items():
  LIKE |= {("declip_paper", row): (*one, 0) for row in others.split()}
for one, others in {
  "clip_base_25ep": "clip_base_cc3m_40ep clip_base_cc12m_35ep simclr_to_clip clip_color clip_crop clip_full",
  "slip_small_25ep": "slip_small_50ep slip_small_100ep",
  "slip_base_25ep": "slip_base_50ep slip_base_100ep slip_base_cc3m_40ep slip_base_cc12m_35ep slip_decoupled",
  "slip_large_25ep": "slip_large_50ep slip_large_100ep",
}.items():
  LIKE |= {("slip", row): ("slip", one, 0) for row in others.split()}


@pytest.mark.parametrize(("name", "row"), rows(*sorted(set(NAMES) - set(OURS))))
def test_parameters_are_as_many_as_published(name, row):
  *other, more = LIKE.get((name, row), (name, row, 0))
  assert count(get(name, row)) == PUBLISHED[tuple(other)] + more


@pytest.mark.parametrize("name", NAMES)
def test_no_two_rows_are_the_same_run(name):
  configs = {row: get(name, row).to_dict() for _, row in rows(name)}
  for one, other in itertools.combinations(configs, 2):
    assert configs[one] != configs[other], (one, other)


# The recipes, as the sources have them.


@pytest.mark.parametrize(
  ("row", "terms", "width", "rate", "decay"),
  [
    # experiments/*/yfcc15m/*/config.yaml of Sense-GVT/DeCLIP; a mean over 2x2 pairs is a quarter `clip`.
    ("vit_clip", {"clip": 1}, 512, 1e-3, 0.1),
    ("vit_slip", {"clip": 1, "simclr": 1}, 512, 5e-4, 0.5),
    ("vit_filip", {"filip": 1}, 768, 5e-4, 0.5),
    ("vit_declip", {"clip": 0.1, "mvs": 0.3, "simsiam": 0.2, "mlm": 0.2, "nns": 0.2}, 512, 1e-3, 0.1),
    ("vit_defilip", {"clip": 0.1, "mvs": 0.3, "simsiam": 0.2, "mlm": 0.2, "nns": 0.2, "filip": 0.2}, 512, 1e-3, 0.1),
    ("r50_clip", {"clip": 1}, 1024, 1e-3, 0.1),
    ("r50_slip", {"clip": 1, "simclr": 1}, 1024, 5e-4, 0.5),
    ("r50_filip", {"filip": 1}, 1024, 5e-4, 0.5),
    ("r50_declip", {"clip": 0.1, "mvs": 0.3, "simsiam": 0.2, "mlm": 0.2, "nns": 0.2}, 1024, 1e-3, 0.1),
  ],
)
def test_declips_rows_are_its_released_configs(row, terms, width, rate, decay):
  c = get("declip_yfcc15m", row)
  assert objectives.active(c.weights) == pytest.approx(terms)
  assert (c.model.heads.embed_dim, c.optimizer.learning_rate, c.optimizer.weight_decay) == (width, rate, decay)
  o = c.optimizer
  assert (o.name, o.b1, o.b2, o.epsilon, o.decayed) == ("adamw", 0.9, 0.98, 1e-8, "declip")
  assert (o.gradient_clip, o.layer_decay, o.multipliers, o.logit_scale_range) == (0, 1, (), (3, 6))
  assert o.frozen == (("towers/image/patch_embedding",) if row.startswith("vit") else ())
  assert c.batch_size == 32 * 128
  heads, nns = c.model.heads, c.terms.nns
  assert heads.norm_groups == heads.bank_groups == 32
  assert (heads.bank_overflow, heads.max_scale) == ("drop", 0 if row.endswith(("_slip", "_filip")) else 100)
  assert not nns.symmetric
  assert not nns.warmup
  assert (c.terms.filip.top_k, c.model.mlm_attention) == (16, "causal")
  assert (c.model.mean, c.model.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  recipes = {"clip": "clip", "slip": "slip", "filip": "filip_repo", "declip": "declip_repo", "defilip": "declip_repo"}
  assert (c.data.recipe, c.data.caption_weights) == (recipes[row.split("_")[1]], (1,))
  assert c.data.strong_scale == ((0.2, 1) if row.endswith("_slip") else None)
  assert (c.data.image_size, c.data.evaluation_resize, c.data.interpolation) == (224, 256, "bilinear")
  steps = run.plan_steps(c, epoch_examples=15_388_848)
  assert steps.total == 128_001
  if rate == 1e-3:
    want, schedule = SCHEDULES["declip_release/lr"], make_schedule(c, steps)
    got = [float(schedule(np.int32(step - 1))) for step in SCHEDULES["declip_release/steps1"]]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-9)


def test_declips_released_models_are_their_configs():
  r50, vit = get("declip_88m", "r50"), get("declip_88m", "vitb32")
  for c in (r50, vit):
    o = c.optimizer
    assert (o.name, o.momentum, o.nesterov, o.learning_rate, o.decayed) == ("sgd", 0.9, True, 0.2, "all")
    assert o.logit_scale_range[0] == 3
  four_pairs = {"clip": 0.25, "mvs": 0.75}
  rest = {"simsiam": 0.2, "mlm": 0.2, "nns": 0.2}
  for c, share, pairs in ((r50, 0.4, 128), (vit, 0.6, 64)):
    expected = {**{term: share * part for term, part in four_pairs.items()}, **rest}
    assert objectives.active(c.weights) == pytest.approx(expected)
    assert c.batch_size // c.model.heads.bank_groups == c.batch_size // c.model.heads.norm_groups == pairs
  assert (r50.optimizer.weight_decay, vit.optimizer.weight_decay) == (1e-4, 0)
  assert (r50.model.heads.embed_dim, vit.model.heads.embed_dim) == (1024, 3072)
  assert r50.optimizer.multipliers == (("heads/logit_scale", 0.1),)
  assert "heads/logit_scale" in vit.optimizer.frozen
  steps = run.plan_steps(vit, epoch_examples=88_000_000)
  schedule = make_schedule(vit, steps)
  assert [float(schedule(np.int32(step))) for step in (0, 4999, 300_000)] == pytest.approx([1e-3, 0.2, 0])


@pytest.mark.parametrize("row", load("slip").ROWS)
def test_slips_rows_have_its_training_procedure(row):
  c = get("slip", row)
  method, epochs = load("slip").ROWS[row][0], load("slip").ROWS[row][2]
  rates = {"clip": (5e-4, 0.5), "simclr": (3.2e-3, 0.1), "slip": (3e-3, 0.1)}
  o = c.optimizer
  assert (o.learning_rate, o.weight_decay) == rates[method.split("_")[0]]
  assert (o.name, o.b1, o.b2, o.epsilon, o.decayed) == ("adamw", 0.9, 0.98, 1e-8, "weights")
  assert o.logit_scale_range == pytest.approx((0, np.log(100)))
  assert not c.terms.clip.full_gradient
  assert (c.model.mean, c.model.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  assert (c.batch_size, c.data.interpolation, c.data.evaluation_resize) == (4096, "bilinear", 0)
  assert c.model.heads.simclr_projector == (4096, 4096, 256)
  steps = run.plan_steps(c, epoch_examples=4096 * 100)
  warmup = 200 if epochs == 100 else 100
  assert (steps.total, steps.warmup) == (100 * epochs, warmup)
  schedule = make_schedule(c, steps)
  got = [float(schedule(np.int32(step))) for step in (0, warmup - 1, warmup, steps.total)]
  assert got == pytest.approx([1e-6, o.learning_rate, o.learning_rate, 1e-5])


def test_slips_numbers_are_those_of_its_tables():
  table = {row: fields[-3:] for row, fields in load("slip").ROWS.items()}
  # One of each table, and what a table says again.
  assert table["slip_large_100ep"] == (47.9, 75.1, 84.8)
  assert table["clip_base_cc3m_40ep"] == (17.1, 53.3, 79.5)
  assert table["slip_mim"] == (39.1, 66.5, 82.2)
  assert table["slip_decoupled"] == (42.7, 72.0, 82.8)
  assert all(fields[0] is None for row, fields in table.items() if get("slip", row).weights.clip == 0)


def test_clips_rows_have_its_hyperparameters():
  rates = {"RN50x16": 4e-4, "RN50x64": 3.6e-4, "ViT-L/14": 4e-4, "ViT-L/14@336px": 2e-5}
  for row in load("clip_wit").ROWS:
    c, resnet, rate = get("clip_wit", row), row.startswith("RN"), rates.get(row, 5e-4)
    assert (c.optimizer.b2, c.optimizer.epsilon) == ((0.999, 1e-8) if resnet else (0.98, 1e-6))
    assert (c.optimizer.learning_rate, c.optimizer.weight_decay, c.batch_size) == (rate, 0.2, 32768)
    assert (c.data.recipe, c.data.interpolation) == ("openai", "bicubic")
    steps = run.plan_steps(c, epoch_examples=400_000_000)
    assert (steps.warmup, steps.total) == (2000, 12_208 if row.endswith("336px") else 390_625)
    assert c.init_from.path == ("runs/ViT-L-14" if row.endswith("336px") else "")


def test_the_papers_signals_are_added_one_by_one():
  active = [
    objectives.active(get("declip_paper", f"cc3m_{row}").weights) for row in ("clip", "mvs", "mvs_ss", "declip")
  ]
  assert [set(after) - set(before) for before, after in itertools.pairwise(active)] == [
    {"mvs"},
    {"simsiam", "mlm"},
    {"nns"},
  ]
  # The share of CLIP, self-supervision of images and texts taken as one.
  assert [weights["clip"] for weights in active] == pytest.approx([1, 0.8, 0.6, 0.4])


def test_studies_start_from_what_they_build_on():
  second = get("slip", "simclr_to_clip")
  assert (second.init_from.path, second.init_from.parts) == ("runs/simclr_base_25ep", ("image",))
  assert second.model.image == get("slip", "simclr_base_25ep").model.image
  decoupled = get("slip", "slip_decoupled")
  assert decoupled.data.ssl_train
  assert not set(decoupled.data.ssl_train) & set(decoupled.data.train)
  assert get("clip_wit", "ViT-L/14@336px").model.image == get("clip_wit", "ViT-L/14").model.image


# What a user gives, and is told.


@pytest.mark.parametrize(("name", "row"), [pair for pair in rows(*NAMES) if pair[0] not in OURS])
def test_folders_of_the_argument_are_read(name, row):
  assert get(name, row).evals.to_dict() == {}
  assert all(spec.startswith("webdataset:data/") for spec in get(name, row).data.train)
  assert get(name, row, ",/mine").data.train == ("webdataset:/mine/*.tar",)
  if "simclr" in objectives.active(get(name, row).weights) and not get(name, row).weights.clip:
    with pytest.raises(ValueError, match=rf"row '{row}' has no text tower to classify /val with: leave IMAGENET out"):
      get(name, row, ",,/val")
    return
  c = get(name, row, ",,/val")
  assert c.data.train == get(name, row).data.train
  assert c.evals.imagenet.data == "webdataset:/val/*.tar"
  assert c.checkpoint.best_metric == "eval/imagenet/top1"
  assert len(set(c.evals.imagenet.templates)) == (7 if name == "slip" else 1)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(OURS)))
def test_an_unknown_row_is_refused(name):
  with pytest.raises(ValueError, match=rf"row 'blip': choose one of \['{rows(name)[0][1]}', "):
    get(name, "blip")


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(OURS)))
def test_docstrings_tell_paper_command_numbers_and_hardware(name):
  text = load(name).__doc__
  for wanted in ("arXiv 2", " et al. 20", "\nExpected: ", "\nHardware: ", " not ours", "--workdir runs/"):
    assert wanted in text, wanted
  assert "published" in text or "days" in text
  command = next(line for line in text.splitlines() if line.startswith("  python -m declip_jax.train --config="))
  file, row = command.split("--config=")[1].split(",FOLDER,IMAGENET ")[0].split(":", 1)
  assert (CONFIGS.parent / file).samefile(load(name).__file__)
  assert row in load(name).ROWS


@pytest.mark.parametrize(
  ("arg", "method", "architecture", "preset"),
  [
    ("declip,ViT-B/16,/data/own", "declip", "ViT-B/16", "paper"),
    ("slip_repo,RN50", "slip", "RN50", "repo"),
    ("clip", "clip", "ViT-B/32", "paper"),
  ],
)
def test_pretrain_takes_any_method_architecture_and_folder(arg, method, architecture, preset):
  c, expected = get("pretrain", arg), config.default(method, architecture, preset)
  assert c.data.train == ("webdataset:/data/own/*.tar" if "own" in arg else "webdataset:data/train/*.tar",)
  for part in ("model", "weights", "terms", "optimizer"):
    assert c[part].to_dict() == expected[part].to_dict()

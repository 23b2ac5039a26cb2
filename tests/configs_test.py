"""The configs under `configs/`: each file builds, has the size and the recipe that its source says, and tells it.

Nothing is compiled and no array is made: models are traced for their shapes, at the batch size of the config.
"""

from functools import cache
import importlib.util
import itertools
from pathlib import Path
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from declip_jax import architectures, build, config
from declip_jax.build import check_objective, make_step
from declip_jax.methods import METHODS, REPO_METHODS, STUDIES
from declip_jax.objectives import make_objective
from declip_jax.sharding import check_batch
from declip_jax.training import schedules
from declip_jax.training.state import abstract_state

CONFIGS = Path(__file__).parents[1] / "configs"
SCHEDULES = np.load(Path(__file__).parent / "fixtures" / "schedule.npz")
FILES = sorted(path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.glob("**/*.py"))
NAMES = [str(file) for file in FILES if file.stem not in ("__init__", "recipe")]
ROWS = [name for name in NAMES if "/" in name]  # of a paper; the others are ours
EPOCH = 100_000_000  # examples; only clip_wit needs so many for its warm-up


@cache
def load(name):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def get(name, *arg):
  return load(name).get_config(*arg)


def in_folder(folder):
  return [name for name in ROWS if name.startswith(f"{folder}/")]


_traced = {}


def traced(c):
  """Parts and abstract state of a config; those with the same parameters and moments are traced once."""
  built = build.build(c)
  key = str(
    (c.model, make_objective(c.objective.to_dict()).heads, c.data.image_size, c.optimizer.name, c.optimizer.frozen)
  )
  if key not in _traced:
    batch = built.batch_shape(c.batch_size)
    _traced[key] = abstract_state(batch, built.mesh, model=built.model, optimizer=built.optimizer)
  return built, _traced[key]


_checked = set()


def check_terms(c):
  """That each term finds its inputs. A ViT stands in for a ResNet, which takes three times as long to trace."""
  if c.model.image.kind == "resnet":
    c = c.copy_and_resolve_references()
    c.model.image = architectures.vit(patch=32, width=64, depth=1, heads=1)
  built = build.build(c)
  key = str((built.recipe.views, c.objective, c.model.mlm_attention, c.model.heads))
  if key not in _checked:
    check_objective(c, built, built.batch_shape(c.batch_size))
    _checked.add(key)


def count(c):
  return sum(leaf.size for leaf in jax.tree.leaves(traced(c)[1].params))


ALL = [*METHODS, *STUDIES, *(f"{method}_repo" for method in REPO_METHODS)]


@pytest.mark.parametrize(("name", "method"), [("demo", m) for m in METHODS] + [("small", m) for m in ALL])
def test_every_method_builds_with_our_own_configs(name, method):
  c = load(name).get_config(method if name == "demo" else f"{method},fashion44k,/data")
  built = build.build(c)
  check_objective(c, built, built.batch_shape(8))
  assert {"zero_shot", "heldout"} & set(c.evals) or method == "simclr"


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds(name):
  c = get(name)
  built, state = traced(c)
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
  check_terms(c)
  check_batch(c.batch_size, built.mesh, "batch_size")
  build.to_steps(c, EPOCH)  # rejects a warm-up longer than training
  assert config.from_json(c.to_json_best_effort()).to_dict() == c.to_dict()


_stepped = {}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_maps_the_state_to_one_of_the_same_shapes(name):
  c = get(name)
  built, state = traced(c)
  o = c.optimizer
  program = (built.recipe.views, c.objective, c.model, c.data.image_size, c.batch_size)
  program += (o.name, o.schedule, o.decay_mask, o.frozen, o.multipliers, o.layer_decay, o.logit_scale_range)
  if (other := _stepped.setdefault(str(program), name)) != name:
    pytest.skip(f"the step of {other}, which differs in data, epochs or rates only")
  step = make_step(c, built, build.to_steps(c, EPOCH), state)
  after, metrics = jax.eval_shape(step, state, built.batch_shape(c.batch_size))
  shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, after)]
  assert shapes[0] == shapes[1]
  assert {f"loss/{term}" for term in built.objective.weights} <= metrics.keys()
  assert {leaf.shape for leaf in metrics.values()} == {()}


# What others count that no loss ever trains, so that we do not have it.
RESNET_FC = 2048 * 1024 + 1024  # DeCLIP's ResNet: a linear layer for other resolutions than 224
MLM_HEAD = 512 * 49409 + 49409  # its FILIP masks captions, but predicts nothing
SLIP_NORM = 2 * 4096  # its SLIP head: a norm behind the last layer, not applied


PUBLISHED = {
  "declip_yfcc15m/vit_clip": 151_278_337,
  "declip_yfcc15m/vit_slip": 172_282_881 - SLIP_NORM,
  "declip_yfcc15m/vit_filip": 177_281_283 - MLM_HEAD,
  "declip_yfcc15m/vit_declip": 180_306_946,
  "declip_yfcc15m/vit_defilip": 180_635_139,
  "declip_yfcc15m/r50_clip": 104_106_849 - RESNET_FC,
  "declip_yfcc15m/r50_filip": 130_109_539 - RESNET_FC - MLM_HEAD,
  "declip_yfcc15m/r50_declip": 133_659_746 - RESNET_FC,
  "declip_88m/r50": 133_659_746 - RESNET_FC,
  "declip_88m/vitb32": 186_207_746,
  "slip/clip_small_25ep": 85_290_369,
  "slip/clip_base_25ep": 149_619_969,
  "slip/clip_large_25ep": 367_254_017,
  "slip/simclr_small_25ep": 41_089_152,
  "slip/simclr_base_25ep": 106_795_008,
  "slip/simclr_large_25ep": 325_346_560,
  "slip/slip_small_25ep": 104_713_857,
  "slip/slip_base_25ep": 170_616_321,
  "slip/slip_large_25ep": 389_298_945,
  "slip/clip_rn50_25ep": 102_007_137,
  "clip_wit/rn50": 102_007_137,
  "clip_wit/rn101": 119_688_033,
  "clip_wit/rn50x4": 178_300_601,
  "clip_wit/rn50x16": 290_979_217,
  "clip_wit/rn50x64": 623_258_305,
  "clip_wit/vit_b_32": 151_277_313,
  "clip_wit/vit_b_16": 149_620_737,
  "clip_wit/vit_l_14": 427_616_513,
  "clip_wit/vit_l_14_336px": 427_944_193,
}


def layers(*widths, bias):
  """Linear layers of these widths, and a gain and a bias of the norm behind each but the last."""
  return sum(a * b + b * bias for a, b in itertools.pairwise(widths)) + sum(2 * width for width in widths[1:-1])


MOCO_HEADS = layers(768, 4096, 4096, 256, bias=False) + layers(256, 4096, 256, bias=False)
MIM_HEAD = 768 + 2 * 768 + layers(768, 16 * 16 * 3, bias=True)  # the hidden patches' embedding, a norm, the pixels
# A row that has no published count: one that has, and what it has more.
LIKE = {
  "declip_yfcc15m/r50_slip": ("declip_yfcc15m/r50_clip", layers(2048, 4096, 4096, 256, bias=True)),
  "declip_paper/cc3m_iss": ("declip_yfcc15m/r50_declip", -MLM_HEAD),
  "declip_paper/cc3m_tss": ("declip_yfcc15m/r50_clip", MLM_HEAD),
  "slip/slip_mocov3": ("slip/clip_base_25ep", MOCO_HEADS),
  "slip/slip_byol": ("slip/clip_base_25ep", MOCO_HEADS),
  "slip/slip_mim": ("slip/clip_base_25ep", MIM_HEAD),
}
for one, others in {
  "declip_yfcc15m/r50_clip": "cc3m_clip cc3m_mvs cc3m_clip_weak cc3m_nns yfcc15m_clip",
  "declip_yfcc15m/r50_declip": "cc3m_mvs_ss cc3m_declip yfcc15m_declip",
}.items():
  LIKE |= {f"declip_paper/{row}": (one, 0) for row in others.split()}
for one, others in {
  "clip_base_25ep": "clip_base_cc3m_40ep clip_base_cc12m_35ep simclr_to_clip clip_color clip_crop clip_full",
  "slip_small_25ep": "slip_small_50ep slip_small_100ep",
  "slip_base_25ep": "slip_base_50ep slip_base_100ep slip_base_cc3m_40ep slip_base_cc12m_35ep slip_decoupled",
  "slip_large_25ep": "slip_large_50ep slip_large_100ep",
}.items():
  LIKE |= {f"slip/{row}": (f"slip/{one}", 0) for row in others.split()}


@pytest.mark.parametrize("name", ROWS)
def test_parameters_are_as_many_as_published(name):
  other, more = LIKE.get(name, (name, 0))
  assert count(get(name)) == PUBLISHED[other] + more


def test_no_two_rows_are_the_same_run():
  configs = {name: get(name).to_dict() for name in NAMES}
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
  c = get(f"declip_yfcc15m/{row}")
  assert make_objective(c.objective.to_dict()).weights == pytest.approx(terms)
  assert (c.model.heads.embed_dim, c.optimizer.learning_rate, c.optimizer.weight_decay) == (width, rate, decay)
  o = c.optimizer
  assert (o.name, o.b1, o.b2, o.epsilon, o.decay_mask) == ("adamw", 0.9, 0.98, 1e-8, "declip")
  assert (o.gradient_clip, o.layer_decay, o.multipliers, o.logit_scale_range) == (0, 1, (), (3, 6))
  assert o.frozen == (("towers/image/patch_embedding",) if row.startswith("vit") else ())
  assert c.batch_size == 32 * 128
  heads, nns = c.model.heads, c.objective.nns
  assert heads.norm_groups == heads.bank_groups == 32
  assert (heads.bank_overflow, heads.max_scale) == ("drop", 0 if row.endswith(("_slip", "_filip")) else 100)
  assert not nns.symmetric
  assert not nns.warmup
  assert (c.objective.filip.top_k, c.model.mlm_attention) == (16, "causal")
  assert (c.model.mean, c.model.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  recipes = {"clip": "clip", "slip": "slip", "filip": "filip_repo", "declip": "declip_repo", "defilip": "declip_repo"}
  assert (c.data.recipe, c.data.caption_weights) == (recipes[row.split("_")[1]], (1,))
  assert c.data.strong_scale == ((0.2, 1) if row.endswith("_slip") else None)
  assert (c.data.image_size, c.data.evaluation_resize, c.data.interpolation) == (224, 256, "bilinear")
  steps = build.to_steps(c, epoch_examples=15_388_848)
  assert steps.total == 128_001
  if rate == 1e-3:
    want, schedule = SCHEDULES["declip_release/lr"], schedules.make_schedule(steps.schedule)
    got = [float(schedule(np.int32(step - 1))) for step in SCHEDULES["declip_release/steps1"]]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-9)


def test_declips_released_models_are_their_configs():
  r50, vit = get("declip_88m/r50"), get("declip_88m/vitb32")
  for c in (r50, vit):
    o = c.optimizer
    assert (o.name, o.momentum, o.nesterov, o.learning_rate, o.decay_mask) == ("sgd", 0.9, True, 0.2, "all")
    assert o.logit_scale_range[0] == 3
  four_pairs = {"clip": 0.25, "mvs": 0.75}
  rest = {"simsiam": 0.2, "mlm": 0.2, "nns": 0.2}
  for c, share, pairs in ((r50, 0.4, 128), (vit, 0.6, 64)):
    expected = {**{term: share * part for term, part in four_pairs.items()}, **rest}
    assert make_objective(c.objective.to_dict()).weights == pytest.approx(expected)
    assert c.batch_size // c.model.heads.bank_groups == c.batch_size // c.model.heads.norm_groups == pairs
  assert (r50.optimizer.weight_decay, vit.optimizer.weight_decay) == (1e-4, 0)
  assert (r50.model.heads.embed_dim, vit.model.heads.embed_dim) == (1024, 3072)
  assert r50.optimizer.multipliers == (("heads/logit_scale", 0.1),)
  assert "heads/logit_scale" in vit.optimizer.frozen
  steps = build.to_steps(vit, epoch_examples=88_000_000)
  schedule = schedules.make_schedule(steps.schedule)
  assert [float(schedule(np.int32(step))) for step in (0, 4999, 300_000)] == pytest.approx([1e-3, 0.2, 0])


@pytest.mark.parametrize("name", in_folder("slip"))
def test_slips_rows_have_its_training_procedure(name):
  c, row = get(name), name.removeprefix("slip/")
  length = re.search(r"_(\d+)ep", row)
  epochs = int(length[1]) if length else 25
  method = "clip" if row == "simclr_to_clip" else row.split("_")[0]
  rates = {"clip": (5e-4, 0.5), "simclr": (3.2e-3, 0.1), "slip": (3e-3, 0.1)}
  o = c.optimizer
  assert (o.learning_rate, o.weight_decay) == rates[method]
  assert (o.name, o.b1, o.b2, o.epsilon, o.decay_mask) == ("adamw", 0.9, 0.98, 1e-8, "weights")
  assert o.logit_scale_range == pytest.approx((0, np.log(100)))
  assert not c.objective.clip.full_gradient
  assert (c.model.mean, c.model.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  assert (c.batch_size, c.data.interpolation, c.data.evaluation_resize) == (4096, "bilinear", 0)
  assert c.model.heads.simclr_projector == (4096, 4096, 256)
  steps = build.to_steps(c, epoch_examples=4096 * 100)
  warmup = 200 if epochs == 100 else 100
  assert (steps.total, steps.schedule.warmup) == (100 * epochs, warmup)
  schedule = schedules.make_schedule(steps.schedule)
  got = [float(schedule(np.int32(step))) for step in (0, warmup - 1, warmup, steps.total)]
  assert got == pytest.approx([1e-6, o.learning_rate, o.learning_rate, 1e-5])


def numbers(name):
  """What a row's docstring expects, in per cent."""
  expected = next(line for line in load(name).__doc__.splitlines() if line.startswith("Expected: "))
  return {what: float(number) for number, what in re.findall(r"(\d\d\.\d) ([a-z -]+)", expected.split(";")[0])}


# Top-1 on ImageNet as the sources' tables have it, in per cent: zero-shot, or for SLIP zero-shot, linear probe and
# fine-tuned, or for SimCLR the last two.
TABLES = {
  "clip_wit": {
    "rn101": (62.2,),
    "rn50": (59.6,),
    "rn50x16": (70.5,),
    "rn50x4": (65.8,),
    "rn50x64": (73.6,),
    "vit_b_16": (68.6,),
    "vit_b_32": (63.2,),
    "vit_l_14": (75.3,),
    "vit_l_14_336px": (76.2,),
  },
  "declip_yfcc15m": {
    "r50_clip": (37.2,),
    "r50_declip": (44.4,),
    "r50_filip": (21.3,),
    "r50_slip": (28.5,),
    "vit_clip": (32.8,),
    "vit_declip": (43.2,),
    "vit_defilip": (45.0,),
    "vit_filip": (39.5,),
    "vit_slip": (34.3,),
  },
  "declip_88m": {
    "r50": (62.5,),
    "vitb32": (66.2,),
  },
  "declip_paper": {
    "cc3m_clip": (20.6,),
    "cc3m_clip_weak": (20.6,),
    "cc3m_declip": (27.2,),
    "cc3m_iss": (),
    "cc3m_mvs": (24.8,),
    "cc3m_mvs_ss": (25.4,),
    "cc3m_nns": (),
    "cc3m_tss": (),
    "yfcc15m_clip": (31.3,),
    "yfcc15m_declip": (41.9,),
  },
  "slip": {
    "clip_base_25ep": (37.6, 66.5, 80.5),
    "clip_base_cc12m_35ep": (36.5, 69.0, 82.1),
    "clip_base_cc3m_40ep": (17.1, 53.3, 79.5),
    "clip_color": (38.4, 68.5, 81.5),
    "clip_crop": (36.0, 66.1, 80.5),
    "clip_full": (36.3, 65.2, 80.6),
    "clip_large_25ep": (40.4, 70.5, 81.0),
    "clip_rn50_25ep": (34.6,),
    "clip_small_25ep": (32.7, 59.3, 78.2),
    "simclr_base_25ep": (64.0, 82.5),
    "simclr_large_25ep": (66.7, 84.0),
    "simclr_small_25ep": (58.1, 79.9),
    "simclr_to_clip": (41.1, 68.2, 82.3),
    "slip_base_100ep": (45.0, 73.6, 83.4),
    "slip_base_25ep": (42.8, 72.1, 82.6),
    "slip_base_50ep": (44.1, 73.0, 82.9),
    "slip_base_cc12m_35ep": (40.7, 73.7, 83.1),
    "slip_base_cc3m_40ep": (23.0, 65.4, 81.4),
    "slip_byol": (41.3, 71.1, 82.2),
    "slip_decoupled": (42.7, 72.0, 82.8),
    "slip_large_100ep": (47.9, 75.1, 84.8),
    "slip_large_25ep": (46.2, 76.0, 84.2),
    "slip_large_50ep": (47.4, 75.8, 84.7),
    "slip_mim": (39.1, 66.5, 82.2),
    "slip_mocov3": (41.8, 71.4, 82.4),
    "slip_small_100ep": (39.5, 68.3, 80.7),
    "slip_small_25ep": (38.3, 66.4, 80.3),
    "slip_small_50ep": (39.3, 67.6, 80.7),
  },
}
NAMES_OF_NUMBERS = {
  0: (),
  1: ("zero-shot",),
  2: ("linear probe", "fine-tuned"),
  3: ("zero-shot", "linear probe", "fine-tuned"),
}


@pytest.mark.parametrize("name", ROWS)
def test_numbers_are_those_of_the_papers_tables(name):
  folder, row = name.split("/")
  expected = TABLES[folder][row]
  assert numbers(name) == dict(zip(NAMES_OF_NUMBERS[len(expected)], expected, strict=True))


def test_clips_rows_have_its_hyperparameters():
  rates = {"rn50x16": 4e-4, "rn50x64": 3.6e-4, "vit_l_14": 4e-4, "vit_l_14_336px": 2e-5}
  for name in in_folder("clip_wit"):
    row = name.removeprefix("clip_wit/")
    c, resnet, rate = get(name), row.startswith("rn"), rates.get(row, 5e-4)
    assert (c.optimizer.b2, c.optimizer.epsilon) == ((0.999, 1e-8) if resnet else (0.98, 1e-6))
    assert (c.optimizer.learning_rate, c.optimizer.weight_decay, c.batch_size) == (rate, 0.2, 32768)
    assert (c.data.recipe, c.data.interpolation) == ("openai", "bicubic")
    steps = build.to_steps(c, epoch_examples=400_000_000)
    assert (steps.schedule.warmup, steps.total) == (2000, 12_208 if row.endswith("336px") else 390_625)


def test_the_papers_signals_are_added_one_by_one():
  objectives = [get(f"declip_paper/cc3m_{row}").objective for row in ("clip", "mvs", "mvs_ss", "declip")]
  active = [make_objective(objective.to_dict()).weights for objective in objectives]
  assert [set(after) - set(before) for before, after in itertools.pairwise(active)] == [
    {"mvs"},
    {"simsiam", "mlm"},
    {"nns"},
  ]
  # The share of CLIP, self-supervision of images and texts taken as one.
  assert [weights["clip"] for weights in active] == pytest.approx([1, 0.8, 0.6, 0.4])


@pytest.mark.parametrize(
  ("name", "first", "parts"),
  [
    ("slip/simclr_to_clip", "slip/simclr_base_25ep", ("image",)),
    ("clip_wit/vit_l_14_336px", "clip_wit/vit_l_14", ("image", "text", "heads")),
  ],
)
def test_rows_start_from_the_run_that_they_build_on(name, first, parts):
  c = get(name)
  assert f"--workdir {c.init_from.path}\n" in load(first).__doc__
  assert c.init_from.groups == parts
  assert c.model.image == get(first).model.image


def test_decoupled_self_supervision_has_images_of_its_own():
  data = get("slip/slip_decoupled").data
  assert data.ssl_train
  assert not set(data.ssl_train) & set(data.train)


# What a user gives, and is told.


def test_a_row_is_found_by_its_command(tmp_path):
  command = [sys.executable, "-m", "declip_jax.train", "--config=configs/slip/slip_mim.py", f"--workdir={tmp_path}"]
  done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert done.stderr.startswith("error: data/yfcc15m/*.tar: no file matches")  # the row's own default


@pytest.mark.parametrize("name", ROWS)
def test_folders_of_the_argument_are_read(name):
  c = get(name)
  assert c.evals.to_dict() == {}
  assert all(spec.startswith("webdataset:data/") for spec in c.data.train)
  assert get(name, "/mine").data.train == ("webdataset:/mine/*.tar",)
  if c.data.recipe == "simclr":
    with pytest.raises(
      ValueError, match=r"simclr has no text tower to classify webdataset:/val/\*.tar with: leave IMAGENET"
    ):
      get(name, ",/val")
    return
  assert get(name, ",/val").data.train == c.data.train
  c = get(name, "/mine,/val")
  assert c.data.train == ("webdataset:/mine/*.tar",)
  assert c.evals.imagenet.data == "webdataset:/val/*.tar"
  assert c.checkpoint.best_metric == "eval/imagenet/top1"
  assert len(set(c.evals.imagenet.templates)) == (7 if name.startswith("slip/") else 1)


@pytest.mark.parametrize("name", ROWS)
def test_docstrings_tell_paper_command_numbers_and_hardware(name):
  text = load(name).__doc__
  row = name.split("/")[1]
  assert re.search(r"\n\nPaper: .+ et al\. 20\d\d, arXiv 2\d{3}\.\d{5}[,;] .+\.\nExpected: .+\.\n", text)
  assert re.search(r"\nHardware: .*(hours|days|not published)", text)
  assert (" not ours" in text) == bool(numbers(name))
  command = f"python -m declip_jax.train --config=configs/{name}.py:FOLDER,IMAGENET --workdir runs/{row}\n"
  assert command in re.sub(" +", " ", text)


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
  for part in ("model", "objective", "optimizer"):
    assert c[part].to_dict() == expected[part].to_dict()

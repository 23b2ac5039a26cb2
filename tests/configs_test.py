"""The files of configs/: each builds, has its source's size, recipe and numbers, and shows how to run it.

Nothing is compiled and no array is made: models are traced for their shapes, at the batch size of the config. The fast
tests trace one config of each folder; the slow ones trace all.
"""

from functools import cache
import itertools
from pathlib import Path
import re
from types import ModuleType
from typing import Any

from clips import describe_any
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
from tiny import FinishedRun
import tokenizer_files

from declip_jax import architectures, build, config, config_files
from declip_jax.changes import changes_from_default
from declip_jax.configs.declip_yfcc15m.recipe import MLM_HEAD
from declip_jax.data.recipes import get_recipe
from declip_jax.methods import ABLATIONS, METHODS, OURS, REPO_METHODS, SUPERVISED, name_of
from declip_jax.objectives import make_objective
from declip_jax.planning import choose
from declip_jax.sharding import check_batch
from declip_jax.training import schedules
from declip_jax.training.state import State, abstract_state
from declip_jax.weights import describe

SCHEDULES = np.load(Path(__file__).parent / "fixtures" / "schedule.npz")
NAMES = config_files.names()
EPOCH = 100_000_000  # examples; only clip_wit needs this many for its warm-up
# One config of each folder, with every term but those of the momentum tower; the small ones.
REPRESENTATIVES = (
  *("demo", "slip/slip_small_25ep", "mocov3_transfer/pets", "clip_wit/vit_b_32", "declip_yfcc15m/vit_defilip"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder with the tokenizers that the configs of SigLIP read from the current one."""
  path = tmp_path_factory.mktemp("tokenizers")
  tokenizer_files.write(path)
  return path


@pytest.fixture(autouse=True)
def _files_that_are_not_published_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(describe, "describe", describe_any)
  monkeypatch.chdir(folder)


@cache
def load(name: str) -> ModuleType:
  return config_files.load_module(name)


def get(name: str, **arguments: Any) -> ConfigDict:
  """A config by the name of its file, with what a run takes from its data."""
  needed = {"finetune": {"classes": 10}, "finetune_pairs": {"init": "runs/clip"}}.get(name, {})
  return choose.choose(load(name).get_config(**needed | arguments), EPOCH)


ENTRIES = [name for name in NAMES if hasattr(load(name), "PUBLISHED")]

_traced: dict[str, State] = {}


def test_the_readme_names_the_folders_of_published_results() -> None:
  readme = (Path(__file__).parents[1] / "README.md").read_text()
  text = re.search(r"configs of published\s+results (.+?) not\s+every\s+result", readme, re.DOTALL)[1]
  assert {*re.findall(r"`(\w+)`", text)} == {name.partition("/")[0] for name in ENTRIES}
  assert "three models of SigLIP" in " ".join(text.split())
  assert sum(name.startswith("siglip/") for name in ENTRIES) == 3


def traced(c: ConfigDict) -> tuple[build.Built, State]:
  """Returns what a config builds and its abstract state; equal parameters and moments are traced once."""
  built = build.build(c)
  key = str(
    (c.model, make_objective(c.objective.to_dict()).heads, c.data.image_size, c.optimizer.name, c.optimizer.frozen)
  )
  if key not in _traced:
    batch = built.batch_shape(c.batch_size)
    _traced[key] = abstract_state(batch, built.mesh, model=built.model, optimizer=built.optimizer)
  return built, _traced[key]


_checked: set[str] = set()


def check_terms(c: ConfigDict) -> None:
  """Checks that each term finds its inputs. A ViT replaces a ResNet, which takes three times as long to trace."""
  if c.model.image.kind == "resnet":
    c = c.copy_and_resolve_references()
    c.model.image = architectures.vit(patch=32, width=64, depth=1, heads=1)
  built = build.build(c)
  key = str((built.recipe.views, c.objective, c.model.mlm_attention, c.model.heads))
  if key not in _checked:
    build.check_objective(c, built, built.batch_shape(c.batch_size))
    _checked.add(key)


def num_parameters(name: str) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(traced(get(name))[1].params))


def check_shapes(name: str) -> None:
  """Traces the model of a config, and checks its dtype and that its terms find their inputs."""
  c = get(name)
  check_state(c, *traced(c))
  check_terms(c)


def check_state(c: ConfigDict, built: build.Built, state: State) -> None:
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
  check_batch(c.batch_size, built.mesh, "config.batch_size")


def check_step(name: str) -> None:
  """Checks that a train step maps the state of a config to one of the same shapes, with a loss for each term."""
  c = get(name)
  built, state = traced(c)
  check_state(c, built, state)
  step = build.make_step(c, built, build.to_steps(c, EPOCH), state)
  after, metrics = jax.eval_shape(step, state, built.batch_shape(c.batch_size))
  shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, after)]
  assert shapes[0] == shapes[1]
  assert {f"loss/{term}" for term in built.objective.weights} <= metrics.keys()
  assert {leaf.shape for leaf in metrics.values()} == {()}


# Every file.


def test_every_config_is_complete() -> None:
  seen: dict[str, str] = {}
  for name in NAMES:
    c = get(name)
    build.to_steps(c, EPOCH)  # rejects a warm-up longer than training
    saved = c.to_json_best_effort(sort_keys=True)
    assert config.from_json(saved).to_dict() == c.to_dict(), name
    assert saved not in seen, (name, seen[saved])  # two files for the same run
    seen[saved] = name


def test_every_file_shows_how_to_run_it() -> None:
  for name in NAMES:
    text = re.sub(r"\\\n *", "", load(name).__doc__ or "")
    command = re.search(r"\n *python -m declip_jax\.train --config=(\S+) --workdir (\S+)\n", text)
    assert command, name
    assert config_files.load(command[1]).to_dict(), name
    assert command[1].partition(":")[0] == name
    if name in ENTRIES:
      assert command[2] == f"runs/{name.split('/')[1]}"


@pytest.mark.parametrize(
  "name", ["demo", *(pytest.param(name, marks=pytest.mark.slow) for name in REPRESENTATIVES[1:-1])]
)
def test_one_config_per_folder_has_consistent_shapes(name: str) -> None:
  check_shapes(name)


def test_a_step_preserves_the_shapes_of_the_state() -> None:
  check_step(REPRESENTATIVES[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_consistent_shapes(name: str) -> None:
  check_shapes(name)


_stepped: dict[str, str] = {}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_step_preserves_the_shapes_of_the_state(name: str) -> None:
  c = get(name)
  o = c.optimizer
  program = str((c.data.recipe, c.objective, c.model, c.data.image_size, c.batch_size, o.name, o.schedule, o.frozen))
  program += str((o.decay_mask, o.multipliers, o.layer_decay, o.logit_scale_range))
  if (other := _stepped.setdefault(program, name)) != name:
    pytest.skip(f"same step as {other}: only data, epochs or rates differ")
  check_step(name)


ALL = [*METHODS, *OURS, *ABLATIONS, *(f"{method}_repo" for method in REPO_METHODS)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("demo", m) for m in METHODS] + [("small", m) for m in ALL])
def test_every_method_builds_with_our_own_configs(name: str, method: str) -> None:
  c = get(name, method=method)
  built = build.build(c)
  build.check_objective(c, built, built.batch_shape(8))


def test_declip_smooth_is_declip_on_weak_crops_with_smoothed_targets() -> None:
  c, declip = config.default("declip_smooth"), config.default("declip")
  smoothing = {
    name: term.label_smoothing for name, term in c.objective.items() if term.weight and "label_smoothing" in term
  }
  assert smoothing == {"clip": 0.5, "mvs": 0.5, "nns": 0.5}
  for term in c.objective.values():
    term.update({"label_smoothing": 0.0} if term.weight and "label_smoothing" in term else {})
  assert c.objective.to_dict() == declip.objective.to_dict()
  assert c.model.to_dict() == declip.model.to_dict()
  own, weak = (get_recipe(name, {}) for name in ("declip_smooth", "clip"))
  assert own.augmentations == 2 * weak.augmentations
  assert (own.text_views, own.views) == (get_recipe("declip", {}).text_views, get_recipe("declip", {}).views)
  assert name_of("declip_smooth", [name for name, term in c.objective.items() if term.weight]) == "declip_smooth"
  assert changes_from_default(config.default("declip_smooth")).lines == []


def test_our_own_configs_evaluate_every_method_with_a_text_tower() -> None:
  for name, methods in (("demo", METHODS), ("small", ALL)):
    for method in methods:
      c = get(name, method=method)
      build.build(c)
      assert bool({"zero_shot", "heldout"} & set(c.evals)) == (method != "simclr"), (name, method)


# Published results.


def test_published_results_are_described() -> None:
  known = {"source", "imagenet_top1_percent", "top1_percent", "parameters", "hardware", "second_hand"}
  for name in ENTRIES:
    published = load(name).PUBLISHED
    assert published.keys() <= known, name
    assert re.fullmatch(r".+ et al\. 20\d\d, arXiv 2\d{3}\.\d{5}(, .+)?", published["source"]), name
    values = published.get("imagenet_top1_percent", {"zero_shot": 1}) | published.get("top1_percent", {})
    assert values.keys() <= {"zero_shot", "linear_probe", "fine_tuned"}, name
    assert all(0 < value < 100 for value in values.values()), name
    assert set(published.get("second_hand", ())) <= published.keys(), name


# Top-1 on ImageNet in per cent, typed a second time from the tables of the papers: zero-shot; for SLIP zero-shot,
# linear probe and fine-tuned; for SimCLR the last two. A new result needs no line here.
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
  # Those of SigLIP 2 are in the README of its release.
  "siglip": {
    "siglip_b_16": (73.4,),
    "siglip2_b_16": (79.1,),
    "siglip2_l_16": (82.5,),
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


def test_published_numbers_equal_the_papers() -> None:
  keys = {0: (), 1: ("zero_shot",), 2: ("linear_probe", "fine_tuned"), 3: ("zero_shot", "linear_probe", "fine_tuned")}
  for folder, table in TABLES.items():
    for entry, expected in table.items():
      found = load(f"{folder}/{entry}").PUBLISHED.get("imagenet_top1_percent", {})
      assert found == dict(zip(keys[len(expected)], expected, strict=True)), (folder, entry)


# The same of fine-tuned models; of those of MoCo v3 (its README) on the data set itself.
FINE_TUNED = {
  "slip/finetune_small": 80.3,
  "slip/finetune_base": 82.6,
  "slip/finetune_large": 84.2,
  "mocov3_transfer/cifar10": 98.9,
  "mocov3_transfer/cifar100": 90.5,
  "mocov3_transfer/flowers": 97.7,
  "mocov3_transfer/pets": 93.2,
}


def test_published_numbers_of_fine_tuning_equal_the_papers() -> None:
  for name, expected in FINE_TUNED.items():
    published, init = load(name).PUBLISHED, get(name).init_from.path
    key = "imagenet_top1_percent" if name.startswith("slip/") else "top1_percent"
    assert published[key] == {"fine_tuned": expected}, name
    pretrained = load(f"slip/{init.removeprefix('runs/')}").PUBLISHED["imagenet_top1_percent"]
    assert not name.startswith("slip/") or pretrained["fine_tuned"] == expected, name


@pytest.mark.parametrize(
  ("name", "epochs", "warmup", "rate", "decay", "layer_decay", "drop_path", "erasing", "mixup", "cutmix", "classes"),
  [
    # facebookresearch/SLIP, README: drop path and layer decay; all else are defaults of BeiT's run_class_finetuning.py.
    ("slip/finetune_small", 100, 20, 4e-3, 0.05, 0.65, 0.0, 0.25, 0.8, 1.0, 1000),
    ("slip/finetune_base", 100, 20, 4e-3, 0.05, 0.65, 0.1, 0.25, 0.8, 1.0, 1000),
    ("slip/finetune_large", 50, 5, 4e-3, 0.05, 0.75, 0.1, 0.25, 0.8, 1.0, 1000),
    # facebookresearch/moco-v3, transfer/README.md: 8 GPUs with 128 images each, a rate of 3e-4 for 512 images.
    ("mocov3_transfer/cifar10", 100, 3, 6e-4, 0.1, 1.0, 0.1, 0.0, 0.8, 1.0, 10),
    ("mocov3_transfer/cifar100", 100, 3, 6e-4, 0.1, 1.0, 0.1, 0.0, 0.5, 1.0, 100),
    ("mocov3_transfer/flowers", 100, 3, 6e-4, 0.3, 1.0, 0.1, 0.25, 0.0, 0.0, 102),
    ("mocov3_transfer/pets", 100, 3, 6e-4, 0.1, 1.0, 0.0, 0.0, 0.8, 0.0, 37),
  ],
)
def test_fine_tuning_has_the_settings_of_the_released_commands(
  name: str,
  epochs: int,
  warmup: int,
  rate: float,
  decay: float,
  layer_decay: float,
  drop_path: float,
  erasing: float,
  mixup: float,
  cutmix: float,
  classes: int,
) -> None:
  c = get(name)
  o, recipe = c.optimizer, build.build(c).recipe
  assert (c.duration.epochs, o.warmup.epochs, c.batch_size) == (epochs, warmup, 1024)
  assert o.learning_rate == pytest.approx(rate)
  assert (o.name, o.weight_decay, o.layer_decay, o.decay_mask) == ("adamw", decay, layer_decay, "finetune")
  assert (o.b1, o.b2, o.epsilon, o.gradient_clip) == (0.9, 0.999, 1e-8, 0.0)
  assert (c.model.drop_path, c.model.heads.num_classes) == (drop_path, classes)
  assert (recipe.erase_probability, recipe.mixup, recipe.cutmix, recipe.rand_magnitude) == (erasing, mixup, cutmix, 9.0)
  assert (c.objective.classify.label_smoothing, recipe.strong_scale, recipe.flip_probability) == (0.1, (0.08, 1.0), 0.5)
  assert (c.data.interpolation, c.data.image_size, c.data.evaluation_resize) == ("bicubic", 224, 256)
  assert c.init_from.groups == ("image",)
  assert c.model.mean == architectures.IMAGENET_MEAN


def layers(*widths: int, bias: bool) -> int:
  """Parameters of linear layers of these widths, each but the last followed by a norm with a gain and a bias."""
  return sum(a * b + b * bias for a, b in itertools.pairwise(widths)) + sum(2 * width for width in widths[1:-1])


MOCO_HEADS = layers(768, 4096, 4096, 256, bias=False) + layers(256, 4096, 256, bias=False)
MIM_HEAD = 768 + 2 * 768 + layers(768, 16 * 16 * 3, bias=True)  # the embedding of hidden patches, a norm, the pixels
# For a result without a published count: one that has it, and how many more parameters it has.
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
  LIKE |= {f"declip_paper/{entry}": (one, 0) for entry in others.split()}
for one, others in {
  "clip_base_25ep": "clip_base_cc3m_40ep clip_base_cc12m_35ep simclr_to_clip clip_color clip_crop clip_full",
  "slip_small_25ep": "slip_small_50ep slip_small_100ep",
  "slip_base_25ep": "slip_base_50ep slip_base_100ep slip_base_cc3m_40ep slip_base_cc12m_35ep slip_decoupled",
  "slip_large_25ep": "slip_large_50ep slip_large_100ep",
}.items():
  LIKE |= {f"slip/{entry}": (f"slip/{one}", 0) for entry in others.split()}


def check_parameters(name: str) -> None:
  other, more = LIKE.get(name, (name, 0))
  assert num_parameters(name) == load(other).PUBLISHED["parameters"] + more


@pytest.mark.parametrize(
  "name", [name for name in REPRESENTATIVES if "parameters" in vars(load(name)).get("PUBLISHED", {})]
)
def test_one_result_per_folder_has_the_published_parameter_count(name: str) -> None:
  check_parameters(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ENTRIES if name in LIKE or "parameters" in load(name).PUBLISHED])
def test_every_result_has_the_published_parameter_count(name: str) -> None:
  check_parameters(name)


# The recipes of the sources.


@pytest.mark.parametrize(
  ("entry", "steps", "size", "tokens", "vocabulary"),
  [("siglip_b_16", 274_659, 224, 16, 32_000), ("siglip2_b_16", 1_220_704, 256, 64, 256_000)],
)
def test_siglips_have_the_settings_of_their_papers(
  entry: str, steps: int, size: int, tokens: int, vocabulary: int
) -> None:
  """9 and 40 billion pairs in batches of 32,768; temperature and bias start at 10 and -10, without bounds."""
  c = get(f"siglip/{entry}")
  o, heads, found = c.optimizer, c.model.heads, build.to_steps(c, EPOCH)
  assert (found.total, found.schedule.warmup, found.schedule.schedule) == (steps, 20_000, "cosine")
  assert (o.name, o.learning_rate, o.weight_decay, o.gradient_clip, o.b2) == ("adamw", 1e-3, 1e-4, 1.0, 0.95)
  assert (heads.logit_scale_init, heads.logit_bias_init, o.logit_scale_range) == (np.log(10), -10, ())
  assert (c.data.image_size, c.model.text.context_length, c.model.text.vocab_size) == (size, tokens, vocabulary)
  assert (c.data.squash, c.model.mean, c.model.std) == (True, (0.5,) * 3, (0.5,) * 3)
  assert make_objective(c.objective.to_dict()).weights == {"sigmoid": 1.0}


@pytest.mark.parametrize(
  ("entry", "terms", "width", "rate", "decay"),
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
def test_declips_benchmark_is_its_released_configs(
  entry: str, terms: dict[str, float], width: int, rate: float, decay: float
) -> None:
  c = get(f"declip_yfcc15m/{entry}")
  assert make_objective(c.objective.to_dict()).weights == pytest.approx(terms)
  assert (c.model.heads.embed_dim, c.optimizer.learning_rate, c.optimizer.weight_decay) == (width, rate, decay)
  o = c.optimizer
  assert (o.name, o.b1, o.b2, o.epsilon, o.decay_mask) == ("adamw", 0.9, 0.98, 1e-8, "declip")
  assert (o.gradient_clip, o.layer_decay, o.multipliers, o.logit_scale_range) == (0, 1, (), (3, 6))
  assert o.frozen == (("towers/image/patch_embedding",) if entry.startswith("vit") else ())
  assert c.batch_size == 32 * 128
  heads, nns = c.model.heads, c.objective.nns
  assert heads.norm_groups == heads.bank_groups == 32
  assert (heads.bank_overflow, heads.max_scale) == ("drop", 0 if entry.endswith(("_slip", "_filip")) else 100)
  assert not nns.symmetric
  assert not nns.warmup
  assert (c.objective.filip.top_k, c.model.mlm_attention) == (16, "causal")
  assert (c.model.mean, c.model.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  recipes = {"clip": "clip", "slip": "slip", "filip": "filip_repo", "declip": "declip_repo", "defilip": "declip_repo"}
  assert (c.data.recipe, c.data.caption_weights) == (recipes[entry.split("_")[1]], (1,))
  assert c.data.strong_scale == ((0.2, 1) if entry.endswith("_slip") else None)
  assert (c.data.image_size, c.data.evaluation_resize, c.data.interpolation) == (224, 256, "bilinear")
  steps = build.to_steps(c, epoch_examples=15_388_848)
  assert steps.total == 128_001
  if rate == 1e-3:
    want, schedule = SCHEDULES["declip_release/lr"], schedules.make_schedule(steps.schedule)
    got = [float(schedule(jnp.int32(step - 1))) for step in SCHEDULES["declip_release/steps1"]]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-9)


def test_declips_released_models_are_their_configs() -> None:
  r50, vit = get("declip_88m/r50"), get("declip_88m/vitb32")
  for c in (r50, vit):
    o = c.optimizer
    assert (o.name, o.momentum, o.nesterov, o.learning_rate, o.decay_mask) == ("sgd", 0.9, True, 0.2, "all")
    assert o.logit_scale_range[0] == 3
  four_pairs = {"clip": 0.25, "mvs": 0.75}
  rest = {"simsiam": 0.2, "mlm": 0.2, "nns": 0.2}
  for c, share, pairs in ((r50, 0.4, 128), (vit, 0.6, 64)):
    expected = {**{term: share * weight for term, weight in four_pairs.items()}, **rest}
    assert make_objective(c.objective.to_dict()).weights == pytest.approx(expected)
    assert c.batch_size // c.model.heads.bank_groups == c.batch_size // c.model.heads.norm_groups == pairs
  assert (r50.optimizer.weight_decay, vit.optimizer.weight_decay) == (1e-4, 0)
  assert (r50.model.heads.embed_dim, vit.model.heads.embed_dim) == (1024, 3072)
  assert r50.optimizer.multipliers == (("heads/logit_scale", 0.1),)
  assert "heads/logit_scale" in vit.optimizer.frozen
  steps = build.to_steps(vit, epoch_examples=88_000_000)
  schedule = schedules.make_schedule(steps.schedule)
  assert [float(schedule(jnp.int32(step))) for step in (0, 4999, 300_000)] == pytest.approx([1e-3, 0.2, 0])


@pytest.mark.parametrize("entry", TABLES["slip"])
def test_slips_results_have_its_training_procedure(entry: str) -> None:
  c = get(f"slip/{entry}")
  length = re.search(r"_(\d+)ep", entry)
  epochs = int(length[1]) if length else 25
  method = "clip" if entry == "simclr_to_clip" else entry.split("_")[0]
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
  got = [float(schedule(jnp.int32(step))) for step in (0, warmup - 1, warmup, steps.total)]
  assert got == pytest.approx([1e-6, o.learning_rate, o.learning_rate, 1e-5])


def test_clips_models_have_its_hyperparameters() -> None:
  rates = {"rn50x16": 4e-4, "rn50x64": 3.6e-4, "vit_l_14": 4e-4, "vit_l_14_336px": 2e-5}
  for entry in TABLES["clip_wit"]:
    c, resnet, rate = get(f"clip_wit/{entry}"), entry.startswith("rn"), rates.get(entry, 5e-4)
    assert (c.optimizer.b2, c.optimizer.epsilon) == ((0.999, 1e-8) if resnet else (0.98, 1e-6))
    assert (c.optimizer.learning_rate, c.optimizer.weight_decay, c.batch_size) == (rate, 0.2, 32768)
    assert (c.data.recipe, c.data.interpolation) == ("openai", "bicubic")
    steps = build.to_steps(c, epoch_examples=400_000_000)
    assert (steps.schedule.warmup, steps.total) == (2000, 12_208 if entry.endswith("336px") else 390_625)


def test_the_papers_signals_are_added_one_by_one() -> None:
  objectives = [get(f"declip_paper/cc3m_{entry}").objective for entry in ("clip", "mvs", "mvs_ss", "declip")]
  active = [make_objective(objective.to_dict()).weights for objective in objectives]
  assert [set(after) - set(before) for before, after in itertools.pairwise(active)] == [
    {"mvs"},
    {"simsiam", "mlm"},
    {"nns"},
  ]
  # The share of CLIP, with self-supervision of images and of texts as one.
  assert [weights["clip"] for weights in active] == pytest.approx([1, 0.8, 0.6, 0.4])


@pytest.mark.parametrize(
  ("name", "first", "groups"),
  [
    ("slip/simclr_to_clip", "slip/simclr_base_25ep", ("image",)),
    ("clip_wit/vit_l_14_336px", "clip_wit/vit_l_14", ("image", "text", "heads")),
  ],
)
def test_results_start_from_the_run_that_they_build_on(name: str, first: str, groups: tuple[str, ...]) -> None:
  c = get(name)
  assert f"--workdir {c.init_from.path}\n" in load(first).__doc__
  assert c.init_from.groups == groups
  assert c.model.image == get(first).model.image


@pytest.mark.slow
def test_fine_tuning_takes_the_tower_of_a_run(finished_run: FinishedRun) -> None:
  run = finished_run.config
  c = get("finetune", init=str(finished_run.workdir), data="/mine", test="/val", epochs=10, batch_size=64)
  assert c.model.image.to_dict() == run.model.image.to_dict()
  assert (c.model.mean, c.model.heads.embed_dim, c.data.image_size) == (
    run.model.mean,
    run.model.heads.embed_dim,
    run.data.image_size,
  )
  assert (c.init_from.path, c.evals.test.data) == (str(finished_run.workdir), "webdataset:/val/*.tar")
  assert c.optimizer.learning_rate == pytest.approx(2.5e-4)
  assert (c.duration.epochs, c.optimizer.warmup.epochs) == (10, 2)
  text = get("finetune", init=f"{finished_run.workdir}/checkpoints/8", head="text")
  assert text.model.image.to_dict() == run.model.image.to_dict()
  assert text.model.heads.classify_joint
  assert text.init_from.templates
  assert not c.init_from.templates
  with pytest.raises(ValueError, match="'zero'"):
    get("finetune", head="zero")


def test_the_study_of_stages_changes_the_small_config_in_its_first_stage_only() -> None:
  small, one = get("small"), get("studies/stages", share=0)
  assert one.to_dict() == small.to_dict()
  two = get("studies/stages", patch_dropout=0.75, share=0.5, epochs=4)
  first = two.stages.first
  assert (first.patch_dropout, first.duration.epochs, two.duration.epochs) == (0.75, 2, 4)
  assert (first.learning_rate, first.warmup) == (small.optimizer.learning_rate, small.optimizer.warmup)
  assert two.data.to_dict() == small.data.to_dict()
  with pytest.raises(ValueError, match="share=1"):
    get("studies/stages", share=1)


def test_fine_tuning_recognises_folders(tmp_path: Path) -> None:
  for name in ("cat", "dog"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.jpg").write_bytes(b"")
  assert get("finetune", data=str(tmp_path)).data.train == (f"folder:{tmp_path}",)


def test_decoupled_self_supervision_has_separate_images() -> None:
  data = get("slip/slip_decoupled").data
  assert data.ssl_train
  assert not set(data.ssl_train) & set(data.train)


# Arguments.


def test_folders_are_named_arguments() -> None:
  for name in ENTRIES:
    c = get(name)
    assert c.evals.to_dict() == {}, name
    assert all(spec.startswith("webdataset:data/") for spec in c.data.train), name
    assert get(name, data="/mine").data.train == ("webdataset:/mine/*.tar",), name
    if c.data.recipe == "finetune":
      test = "imagenet" if name.startswith("slip/") else "test"
      c = get(name, **{test: "/val"})
      expected = {"kind": "classify", "data": "webdataset:/val/*.tar", "suite": "", "every": 1}
      assert c.evals[test].to_dict() == expected, name
      assert c.checkpoint.best_metric == f"eval/{test}/top1", name
      continue
    if c.data.recipe == "simclr":  # no text tower to classify with
      with pytest.raises(ValueError, match="'imagenet'"):
        config_files.load(f"{name}:imagenet=/val")
      continue
    c = get(name, imagenet="/val")
    assert c.data.train == get(name).data.train, name
    assert c.evals.imagenet.data == "webdataset:/val/*.tar", name
    assert c.checkpoint.best_metric == "eval/imagenet/top1", name
    assert len(set(c.evals.imagenet.templates)) == (7 if name.startswith("slip/") else 1), name


@pytest.mark.parametrize(
  ("arguments", "method", "architecture", "preset", "source"),
  [
    ("data=data/train", "declip", "ViT-B/32", "paper", "webdataset:data/train/*.tar"),
    ("method=slip_repo,architecture=RN50,data=d", "slip", "RN50", "repo", "webdataset:d/*.tar"),
    ("declip,ViT-B/16,/data/own", "declip", "ViT-B/16", "paper", "webdataset:/data/own/*.tar"),
    ("clip,data=table:/d/a.csv?root=/d", "clip", "ViT-B/32", "paper", "table:/d/a.csv?root=/d"),
    ("clip,data=gs://bucket/train/", "clip", "ViT-B/32", "paper", "webdataset:gs://bucket/train/*.tar"),
  ],
)
def test_pretrain_accepts_any_method_architecture_and_data(
  arguments: str, method: str, architecture: str, preset: str, source: str
) -> None:
  c, expected = config_files.load(f"pretrain:{arguments}"), config.default(method, architecture, preset)
  assert c.data.train == (f"kept:10%,5000:{source}",)
  assert c.evals.retrieval.data == f"heldout:10%,5000:{source}"
  assert c.checkpoint.best_metric == "eval/retrieval/mean_recall"
  assert c.objective.to_dict() == expected.objective.to_dict()
  assert c.optimizer.learning_rate == expected.optimizer.learning_rate
  given, c.batch_size = config.duration(share=0.1), 1024
  found = build.to_steps(choose.choose(c, 10**6), 10**6)
  assert (found.evaluate, found.checkpoint, found.schedule.warmup) == (-(-found.total // 10),) * 3
  assert (c.evaluate_every, c.checkpoint.every, c.optimizer.warmup) == (given,) * 3
  c.optimizer.warmup.share = 0.2
  assert c.evaluate_every.share == 0.1  # each field has a duration of its own


def test_pretrain_recognises_files(tmp_path: Path) -> None:
  def source(data: Path) -> str:
    return load("pretrain").get_config(data=str(data)).data.train[0].removeprefix("kept:10%,5000:")

  table = tmp_path / "pairs.csv"
  table.write_text("image,caption\na.jpg,a\n")
  assert source(table) == f"table:{table}"
  elsewhere = tmp_path / "other.csv"  # may exist on another machine
  assert source(elsewhere) == f"table:{elsewhere}"
  folder = tmp_path / "unknown"
  assert source(folder) == f"webdataset:{folder}/*.tar"
  folder.mkdir()
  for name in ("1.jpg", "1.txt"):
    (folder / name).write_text("x")
  assert source(folder) == f"folder:{folder}"
  (folder / "1.jpg").unlink()
  with pytest.raises(ValueError, match="not recognised"):
    source(folder)


def test_pretrain_evaluates_what_its_method_can() -> None:
  for method in (*ALL, *SUPERVISED):
    c = load("pretrain").get_config(method, data="data/train")
    assert bool(c.evals) == bool(c.checkpoint.best_metric) == (method not in ("simclr", "finetune")), method
  build.check_evals(c.evals, make_objective(c.objective.to_dict()))


@pytest.mark.parametrize(
  ("text", "named"),
  [
    ("demo:method=clap", ["'clap'", "'clip'"]),
    ("pretrain:architecture=ViT-B16", ["ViT-B16", "ViT-B/16"]),
    ("pretrain:metod=clip", ["'metod'", "did you mean method", "method, architecture, data"]),
    ("small:dataset=flickr", ["'flickr'", "'flickr8k'"]),
    ("slip/slip_mim:folder=/d", ["'folder'", "data, imagenet"]),
  ],
)
def test_a_wrong_argument_is_named_with_the_legal_ones(text: str, named: list[str]) -> None:
  with pytest.raises(ValueError, match=named[0]) as raised:
    config_files.load(text)
  assert all(word in str(raised.value) for word in named)

"""Parameter counts of the published models, from shapes alone."""

from functools import partial

import jax
import pytest

from declip_jax import config
from declip_jax.objectives import make_objective
from declip_jax.weights.layout import abstract_variables


def num_parameters(method: str, architecture: str) -> int:
  c = config.default(method, architecture)
  _, variables = abstract_variables(c.model.to_dict(), make_objective(c.objective.to_dict()).heads, c.data.image_size)
  return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


slow = partial(pytest.param, marks=pytest.mark.slow)  # the fast tier has one of each kind


@pytest.mark.parametrize(
  ("architecture", "expected"),
  [
    # From the shapes of OpenAI's released models; ViT-B/32 is also printed in their notebook.
    slow("RN50", 102_007_137),
    slow("RN101", 119_688_033),
    slow("RN50x4", 178_300_601),
    slow("RN50x16", 290_979_217),
    slow("RN50x64", 623_258_305),
    ("ViT-B/32", 151_277_313),
    slow("ViT-B/16", 149_620_737),
    slow("ViT-L/14", 427_616_513),
    slow("ViT-L/14@336px", 427_944_193),
    # Counted on SLIP's models.
    slow("SLIP ViT-S/16", 85_290_369),
    slow("SLIP ViT-B/16", 149_619_969),
    slow("SLIP ViT-L/16", 367_254_017),
    # DeCLIP's CLIP, without the linear layer that its ResNet has and never uses.
    slow("DeCLIP ViT-B/32", 151_278_337),
    slow("DeCLIP RN50", 104_106_849 - 2_098_176),
    # Counted on open_clip 3.3.0, ViT-H-14 and the like, ViT-H-14-CLIPA and ViT-H-14-worldwide.
    slow("ViT-H/14", 986_109_441),
    slow("ViT-g/14", 1_366_678_273),
    slow("ViT-bigG/14", 2_539_567_105),
    slow("ViT-e/14", 4_581_086_465),
    ("CLIPA ViT-L/14", 414_210_561),
    slow("CLIPA ViT-L/14@336px", 414_538_241),
    slow("CLIPA ViT-H/14", 968_235_009),
    slow("CLIPA ViT-H/14@336px", 968_644_609),
    slow("CLIPA ViT-bigG/14", 2_517_223_937),
    slow("CLIPA ViT-bigG/14@336px", 2_517_756_417),
    slow("MetaCLIP 2 ViT-H/14", 1_858_783_745),
    slow("MetaCLIP 2 ViT-H/14@378px", 1_859_389_185),
    slow("MetaCLIP 2 ViT-bigG/14", 3_630_409_985),
    ("MetaCLIP 2 ViT-bigG/14@378px", 3_631_197_057),
    # Trunks counted on timm 1.0.31, text towers and projections as above.
    ("RegNetY-400MF", 3_903_144 + 440 * 512 + 63_428_096 + 1),
    slow("RegNetY-16GF", 80_565_140 + 3024 * 512 + 63_428_096 + 1),
    slow("DeCLIP RegNetY-64GF", 276_457_786 + 4920 * 1024 + 63_691_776 + 1),
  ],
)
def test_clip(architecture: str, expected: int) -> None:
  assert num_parameters("clip", architecture) == expected


@pytest.mark.parametrize(
  ("architecture", "expected"),
  [
    # Counted on transformers 5.23.0, SiglipModel.
    ("SigLIP ViT-B/16", 203_155_970),
    slow("SigLIP ViT-B/16@256px", 203_202_050),
    slow("SigLIP ViT-B/16@384px", 203_447_810),
    slow("SigLIP ViT-B/16@512px", 203_791_874),
    slow("SigLIP ViT-L/16@256px", 652_150_786),
    slow("SigLIP ViT-L/16@384px", 652_478_466),
    slow("SigLIP ViT-So400m/14", 877_415_602),
    ("SigLIP ViT-So400m/14@384px", 877_960_498),
    slow("SigLIP 2 ViT-B/32@256px", 376_856_066),
    slow("SigLIP 2 ViT-B/16", 375_187_970),
    slow("SigLIP 2 ViT-B/16@256px", 375_234_050),
    slow("SigLIP 2 ViT-B/16@384px", 375_479_810),
    slow("SigLIP 2 ViT-B/16@512px", 375_823_874),
    slow("SigLIP 2 ViT-L/16@256px", 881_526_786),
    slow("SigLIP 2 ViT-L/16@384px", 881_854_466),
    slow("SigLIP 2 ViT-L/16@512px", 882_313_218),
    slow("SigLIP 2 ViT-So400m/14", 1_135_463_602),
    slow("SigLIP 2 ViT-So400m/14@384px", 1_136_008_498),
    slow("SigLIP 2 ViT-So400m/16@256px", 1_135_670_962),
    slow("SigLIP 2 ViT-So400m/16@384px", 1_136_039_602),
    slow("SigLIP 2 ViT-So400m/16@512px", 1_136_555_698),
    ("SigLIP 2 ViT-g-opt/16@256px", 1_871_393_906),
    slow("SigLIP 2 ViT-g-opt/16@384px", 1_871_885_426),
  ],
)
def test_siglip(architecture: str, expected: int) -> None:
  assert num_parameters("siglip", architecture) == expected


@pytest.mark.parametrize(
  ("architecture", "expected"),
  [("SLIP ViT-S/16", 104_713_857), slow("SLIP ViT-B/16", 170_616_321), slow("SLIP ViT-L/16", 389_298_945)],
)
def test_slip(architecture: str, expected: int) -> None:
  assert num_parameters("slip", architecture) == expected


@pytest.mark.parametrize(
  ("architecture", "expected"), [("DeCLIP ViT-B/32", 180_306_946), slow("DeCLIP RN50", 133_659_746 - 2_098_176)]
)
def test_declip(architecture: str, expected: int) -> None:
  assert num_parameters("declip", architecture) == expected


def test_architectures_are_copies_and_an_unknown_name_lists_the_known_ones() -> None:
  config.default("clip", "RN50").model.image.width = 1
  assert config.default("clip", "RN50").model.image.width == 64
  with pytest.raises(ValueError, match=r"'RN18': choose one of \['CLIPA ViT-H/14', "):
    config.default("clip", "RN18")

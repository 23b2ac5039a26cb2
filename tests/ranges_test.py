"""The values of single fields: illegal ones are rejected, and the error names the field."""

import math

from clips import describe_any
from ml_collections import ConfigDict
import pytest

from declip_jax import config, config_files
from declip_jax.config_files import fields
from declip_jax.planning import choose
from declip_jax.ranges import _RANGES, check_values
from declip_jax.weights import describe

ILLEGAL = {int: (-1,), float: (math.nan, math.inf, -1.0), str: ("wrong",), tuple: ((None,), (-1, "x"))}
CHECKED = [field for field, *_ in _RANGES]


@pytest.mark.parametrize("architecture", ["ViT-B/32", "RN50", "RegNetY-400MF"])
def test_an_illegal_value_of_each_field_names_the_field(architecture: str) -> None:
  tried = 0
  for field, value in fields(config.default("declip", architecture)):
    value = value if isinstance(value, (int, float, str, tuple)) else None
    for illegal in ILLEGAL.get(type(value), ()) if field in CHECKED else ():
      if field in ("model.heads.logit_scale_init", "model.heads.logit_bias_init") and illegal == -1.0:
        continue
      c = config.default("declip", architecture)
      c.update_from_flattened_dict({field: illegal})
      with pytest.raises(ValueError, match="expected") as raised:
        check_values(c)
      assert f"config.{field}={illegal!r}" in str(raised.value)
      tried += 1
  assert tried > 70


def test_every_checked_field_exists() -> None:
  known = {field for name in ("ViT-B/32", "RN50", "RegNetY-400MF") for field, _ in fields(config.default("clip", name))}
  assert set(CHECKED) <= known


@pytest.mark.parametrize("name", config_files.names())
def test_the_configs_are_legal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(describe, "describe", describe_any)
  needed = ":init=runs/clip" if name == "finetune_pairs" else ""
  c = choose.choose(config_files.load(f"{name}{needed}"), None)
  assert isinstance(c, ConfigDict)
  check_values(c)


def test_a_nickname_gets_a_suggestion() -> None:
  c = config.default()
  for nickname, meant in (("bf16", "bfloat16"), ("fp32", "float32"), ("int32", "float32")):
    c.model.dtype = nickname
    with pytest.raises(ValueError, match=rf"config.model.dtype='{nickname}'.*did you mean .*{meant}"):
      check_values(c)

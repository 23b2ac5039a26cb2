"""What `build` makes of a config, where no test of another module looks at it."""

from pathlib import Path

import pytest

from declip_jax import build, config
from declip_jax.data.deaths import Deaths
from declip_jax.data.pipeline import Reading


def test_evaluations_are_read_with_the_limits_of_the_config(tmp_path: Path) -> None:
  c = config.default("clip")
  c.data.update({"workers": 3, "threads": 2, "max_pixels": 100, "max_seconds": 5.0})
  deaths = Deaths(tmp_path)
  encoders = build.make_encoders(c, build.build(c), deaths).bind({}, {})
  assert encoders.reading == Reading(3, 2, 100, 5.0, deaths)


@pytest.mark.parametrize(
  ("train", "test", "seen"),
  [
    ("table:a.csv", "table:a.csv", True),
    ("table:a.csv", "table:b.csv", False),
    ("table:a.csv", "heldout:10%:table:a.csv", True),
    ("kept:10%:table:a.csv", "table:a.csv", True),
    ("kept:10%:table:a.csv", "heldout:10%:table:a.csv", False),
    ("kept:10%:table:a.csv", "heldout:20%:table:a.csv", True),
    ("heldout:10%:table:a.csv", "heldout:10%:table:a.csv", True),
  ],
)
def test_evaluations_on_training_data_are_named(train: str, test: str, seen: bool) -> None:
  said = build.describe_seen({"other": "table:c.csv", "this": test}, ("table:d.csv", train))
  assert said.partition(":")[0] == ("this" if seen else "")

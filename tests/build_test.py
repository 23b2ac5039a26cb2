"""What `build` makes of a config, where no test of another module looks at it."""

from pathlib import Path

from declip_jax import build, config
from declip_jax.data.deaths import Deaths
from declip_jax.data.pipeline import Reading


def test_evaluations_are_read_with_the_limits_of_the_config(tmp_path: Path) -> None:
  c = config.default("clip")
  c.data.update({"workers": 3, "threads": 2, "max_pixels": 100, "max_seconds": 5.0})
  deaths = Deaths(tmp_path)
  encoders = build.make_encoders(c, build.build(c), deaths).bind({}, {})
  assert encoders.reading == Reading(3, 2, 100, 5.0, deaths)


def test_evaluations_on_training_data_are_named() -> None:
  c = config.default("clip")
  c.data.train = ("scenes:train/30/16",)
  c.evals.update({"other": config.retrieval("scenes:test/30/16"), "same": config.zero_shot(c.data.train[0])})
  assert build.describe_seen(c).startswith("config.evals.same: on the training data")
  del c.evals.same
  assert not build.describe_seen(c)

"""What a run trains differently: compared with its method and architecture, without what does not change training."""

from declip_jax import config
from declip_jax.changes import changes_from_default


def test_a_default_config_has_no_changes() -> None:
  assert changes_from_default(config.default("slip", "SLIP ViT-S/16")) == ("slip", "SLIP ViT-S/16", [])


def test_what_changes_training_is_listed_and_nothing_else() -> None:
  c = config.default("slip", "ViT-Nano/8@32px")
  c.duration, c.optimizer.warmup = config.duration(epochs=1), config.duration(share=0.1)
  c.batch_size = 64
  c.model.heads.bank_size, c.data.text_operations = 8, ()  # which SLIP has not
  c.evals.test = config.retrieval("scenes:test")
  c.evaluate_every, c.log_every, c.checkpoint.keep_last = config.duration(steps=5), 3, 9
  assert changes_from_default(c) == (
    "slip",
    "ViT-Nano/8@32px",
    [
      "config.batch_size: 4096 -> 64",
      "config.duration: 32 epochs -> 1 epoch",
      "config.optimizer.warmup: 2,000 steps -> 0.1 of the run",
    ],
  )


def test_a_run_of_no_method_or_architecture_is_compared_with_clip() -> None:
  c = config.default("clip", "ViT-Nano/8@32px")
  c.objective.simsiam.weight = 0.5
  c.model.text.depth = 5
  method, architecture, lines = changes_from_default(c)
  assert (method, architecture) == ("clip", "ViT-B/32")
  assert {"config.objective.simsiam.weight: 0.0 -> 0.5", "config.model.text.depth: 12 -> 5"} <= set(lines)

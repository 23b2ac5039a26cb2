"""Evaluators: each is a generator of (name, value) over a source and pure encode functions."""

from declip_jax.evals.retrieval import retrieval
from declip_jax.evals.zero_shot import zero_shot

# What the `kind` of an entry of `config.evals` may name; the other fields but `data` are passed on.
EVALUATORS = {"zero_shot": zero_shot, "retrieval": retrieval}

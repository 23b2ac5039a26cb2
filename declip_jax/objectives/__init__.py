"""Objectives: each term is a pure function of outputs and batch, and a method is a choice of weights over `TERMS`."""

from declip_jax.objectives.terms import TERMS, Term
from declip_jax.objectives.total import Objective, make_objective

__all__ = ["TERMS", "Objective", "Term", "make_objective"]

"""The methods: for each name the recipe that makes its views and the weights of its terms."""

from collections.abc import Collection

_DECLIP = {"clip": 0.4, "mvs": 0.2, "simsiam": 0.2, "mlm": 0.2, "nns": 0.2}  # its paper, section 3.2
# The methods of the papers: the recipe that makes their views, and weights of the terms of `declip_jax.objectives`.
METHODS = {
  "clip": ("clip", {"clip": 1.0}),
  "simclr": ("simclr", {"simclr": 1.0}),
  "slip": ("slip", {"clip": 1.0, "simclr": 1.0}),
  "slip_mocov3": ("slip_mocov3", {"clip": 1.0, "moco": 1.0}),
  "slip_byol": ("slip_mocov3", {"clip": 1.0, "byol": 1.0}),
  "slip_mim": ("slip_mim", {"clip": 1.0, "mim": 1.0}),
  "declip": ("declip", _DECLIP),
  "filip": ("filip", {"filip": 1.0}),
  "defilip": ("declip", {**_DECLIP, "filip": 0.2}),
  "siglip": ("clip", {"sigmoid": 1.0}),
}
# Ours: DeCLIP on views that keep what captions describe, with smoothed targets in its contrastive terms. ALIGN (Jia et
# al. 2021) smooths by 0.1; docs/results.md has what 0.5 gains where pairs are few.
OURS = {"declip_smooth": ("declip_smooth", _DECLIP)}
# Options of terms by method, where they are not those of `config.default().objective`.
OPTIONS = {"declip_smooth": dict.fromkeys(("clip", "mvs", "nns"), {"label_smoothing": 0.5})}
# Their ablations: CLIP with more augmentation (SLIP), and DeCLIP's signals, added one by one and each on its own,
# with the weights of its formula (1 - a - b - g) CLIP + a (ISS + TSS) + b MVS + g NNS, where those in use are 0.2.
ABLATIONS = {
  "clip_color": ("clip_color", {"clip": 1.0}),
  "clip_crop": ("clip_crop", {"clip": 1.0}),
  "clip_full": ("clip_full", {"clip": 1.0}),
  "declip_clip": ("declip", {"clip": 1.0}),
  "declip_mvs": ("declip", {"clip": 0.8, "mvs": 0.2}),
  "declip_mvs_ss": ("declip", {"clip": 0.6, "mvs": 0.2, "simsiam": 0.2, "mlm": 0.2}),
  "declip_iss": ("declip", {"clip": 0.8, "simsiam": 0.2}),
  "declip_tss": ("declip", {"clip": 0.8, "mlm": 0.2}),
  "declip_nns": ("declip", {"clip": 0.8, "nns": 0.2}),
}
# Supervised training with labelled images: the fine-tuning of BeiT, which SLIP uses.
SUPERVISED = {"finetune": ("finetune", {"classify": 1.0})}
# The methods of the same names in DeCLIP's released code (Sense-GVT/DeCLIP). Its mean over the 2x2 pairs of views has
# the weight 0.4: a quarter of that for the first pair, three quarters for the others.
_DECLIP_REPO = {"clip": 0.1, "mvs": 0.3, "simsiam": 0.2, "mlm": 0.2, "nns": 0.2}
REPO_METHODS = {
  "clip": METHODS["clip"],
  "slip": METHODS["slip"],
  "declip": ("declip_repo", _DECLIP_REPO),
  "filip": ("filip_repo", {"filip": 1.0}),
  "defilip": ("declip_repo", {**_DECLIP_REPO, "filip": 0.2}),
}
# The methods of pairs, as configs such as `pretrain` name them.
NAMES = (*METHODS, *OURS, *ABLATIONS, *(f"{name}_repo" for name in REPO_METHODS))
PRESETS = {"paper": {**METHODS, **OURS, **ABLATIONS, **SUPERVISED}, "repo": REPO_METHODS}


def name_of(recipe: str, terms: Collection[str]) -> str:
  """The method that has a data recipe and these terms, whatever their weights; the terms if no method has them."""
  for methods in PRESETS.values():
    for name, (own, weights) in methods.items():
      if own == recipe and weights.keys() == set(terms):
        return name
  return "+".join(sorted(terms))

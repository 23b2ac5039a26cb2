"""Every field of a config with its default and its meaning; a file under `configs/` changes some of them.

A duration has the fields `steps`, `epochs`, `examples` and `share`, one of which is set: `--config.duration.epochs=5`,
together with `--config.duration.steps=0` if the config is in steps. `share` is a share of `duration`, the length of the
whole run. `steps_of` converts it once, at the start.
Where the comment of a field says "chosen", that value leaves the field to `planning.choose`, which sets it for the data
and the devices when a run starts.
A field that is a tuple is set on the command line as `--config.data.train="('webdataset:/data/train-*.tar',)"`.
"""

from collections.abc import Callable, Iterator, Mapping
import inspect
import json
import math
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from declip_jax import architectures
from declip_jax.architectures import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD
from declip_jax.methods import OPTIONS, PRESETS
from declip_jax.spelling import did_you_mean


def default(method: str = "clip", architecture: str = "ViT-B/32", preset: str = "paper") -> ConfigDict:
  """An architecture trained by `method` as CLIP was (Radford et al. 2021, tables 18 to 20).

  Locked: only known fields can be set. `architectures.ARCHITECTURES` lists the names.

  With `preset` "paper", normalisation and optimiser are OpenAI's for every method, so that methods differ only in their
  objective and what belongs to it: views, heads, the temperature of `siglip`, and for DeCLIP's methods the bias and the
  mask token of the text tower. "repo" is the method of this name as DeCLIP's released code implements it, see
  `_as_released`.

  Raises:
    ValueError: an unknown preset, method or architecture.
  """
  if preset not in PRESETS:
    raise ValueError(f"preset {preset!r}: choose one of {sorted(PRESETS)}{did_you_mean(preset, PRESETS)}")
  methods = PRESETS[preset]
  if method not in methods:
    hint = did_you_mean(method, methods)
    of_preset = "" if preset == "paper" else f" of preset {preset!r}"
    raise ValueError(f"method {method!r}{of_preset}: choose one of {sorted(methods)}{hint}")
  recipe, weights = methods[method]
  built = architectures.build(architecture)
  c = ConfigDict()
  c.seed = 0  # determines the initial parameters, the shuffle, and every augmentation
  c.objective = _objective()
  for term, weight in weights.items():
    c.objective[term].update({"weight": weight, **OPTIONS.get(method, {}).get(term, {})})
  c.contrast = ConfigDict()
  # How all pairs of a batch are compared: "plain", "chunked" or "ring" of `objectives.blockwise`; "auto" chooses.
  c.contrast.method = "auto"
  c.contrast.block = 0  # candidates compared at once, in a chunk or in a step of the ring; 0 chooses by size
  c.momentum_tower = ConfigDict()
  # Decay of the momentum tower's moving average (MoCo v3, BYOL) at the first step; it rises to 1 along a half cosine.
  c.momentum_tower.decay = 0.996 if method == "slip_byol" else 0.99
  c.batch_size = 4096  # pairs per step over all devices. 0: chosen
  c.micro_batches = 1  # number of micro-batches that the towers encode one by one, for batches larger than memory
  # "cached": the loss sees the whole batch, with the same gradient; "plain": each micro-batch; see `training.gradient`.
  c.micro_batching = "cached"
  c.duration = duration(epochs=32)  # length of the whole run; all of its fields 0: chosen
  # Name -> `stage(...)`: what the run trains on first, such as smaller images, in the order of the names. The last
  # stage is this config itself, with what remains of `duration`.
  c.stages = ConfigDict()
  c.data = _data(recipe, built.image_size)
  c.model = _model(built)
  if recipe in ("declip", "declip_smooth", "declip_repo", "filip_repo"):
    # OpenAI's vocabulary and the mask token, or one more than that of another tokenizer.
    c.model.text.vocab_size = 49409 if c.model.text.tokenizer == "openai" else c.model.text.vocab_size + 1
    c.model.heads.text_bias = True  # as in DeCLIP
  c.init_from = ConfigDict()  # weights to start from; see `weights.initial`
  # A run, one of its checkpoints (RUN/checkpoints/STEP or RUN/checkpoints/best), or any that `declip_jax.load` reads.
  c.init_from.path = ""
  c.init_from.groups = ("image", "text", "heads")  # what to load, see `weights.initial.GROUPS`; the rest is random
  # Settings that the file lacks, such as ("text.activation=gelu", "image.heads=16"). From a run with an average of the
  # weights (optimizer.ema), ("average=False",) loads the weights themselves.
  c.init_from.settings = ()
  # Prompts such as ("a photo of a {}.",) that make the classifier start as the zero-shot classifier of these weights
  # (WiSE-FT); () leaves it random. It then has to read joint embeddings: model.heads.classify_joint.
  c.init_from.templates = ()
  c.lora = _lora()
  c.optimizer = _optimizer()
  c.mesh = ConfigDict({"data": -1, "fsdp": 1})  # number of devices along each axis; -1 means all that remain
  c.safety = _safety()
  c.log_every = 50  # steps between lines of metrics.jsonl, and between measurements of `objectives.diagnostics`
  c.evaluate_every = duration(epochs=1)
  c.evaluate_first = False  # whether the first state is evaluated, too, such as that of weights that are fine-tuned
  c.evaluate_batch_size = 1024
  c.evaluate_cache_gib = 2.0  # GiB of decoded images that each host keeps from one evaluation to the next
  c.evals = ConfigDict()  # name -> `zero_shot(...)`, `retrieval(...)` or another of `EVALUATIONS` in this module
  c.checkpoint = _checkpoint()
  c.trackers = _trackers()
  if weights.get("sigmoid"):  # SigLIP (Zhai et al. 2023), section 3.2 and algorithm 1
    c.model.heads.logit_scale_init = math.log(10)
    c.optimizer.logit_scale_range = ()
  if preset == "repo":
    _as_released(c, method)
  c.lock()
  unlock_extensible(c)
  return c


def unlock_extensible(c: ConfigDict) -> None:
  """Lets fields be added where a config may have its own: stages, evaluations, terms and trackers."""
  for fields in (c.stages, c.evals, c.objective, c.trackers):
    fields.unlock()
  for fields in c.objective.values():
    fields.lock()


def _checkpoint() -> ConfigDict:
  """When checkpoints are saved, and which are kept."""
  c = ConfigDict()
  c.every = duration(epochs=1)
  c.keep_last = 2
  c.keep_every = duration()  # the first checkpoint in each period of this length is never deleted
  c.keep_best = 1
  c.best_metric = ""  # metric such as "eval/zero_shot/top1", higher is better; "" keeps only the last
  return c


def _safety() -> ConfigDict:
  """What a run does about divergence, hangs and lost work."""
  c = ConfigDict()
  # A step is skipped if its loss, gradient or learning rate is not finite, or if its gradient norm exceeds the usual
  # norm by this factor (see `step.is_spike`); 0 turns the comparison off.
  c.spike_factor = 10.0
  c.max_skipped_steps = 20  # consecutive skipped steps after which the run rolls back to the previous checkpoint
  c.max_rollbacks = 3  # rollbacks before the run stops; with 0, it stops when it first diverges
  c.hang_timeout = 1800.0  # seconds after which a step that has not finished ends the process; 0 waits forever
  c.checkpoint_minutes = 30.0  # minutes between checkpoints, in addition to `checkpoint.every`; 0 turns this off
  return c


def _trackers() -> ConfigDict:
  """Where metrics, pictures and config go besides the working directory and its TensorBoard; "" is nowhere.

  A tracker of your own is a function in your config file, `c.trackers.<name> = open_mine`, from a
  `reporting.trackers.TrackedRun` to a `Tracker`.
  """
  c = ConfigDict()
  c.wandb = ""  # project of Weights & Biases
  c.mlflow = ""  # experiment of MLflow
  c.trackio = ""  # project of trackio
  return c


def _objective() -> ConfigDict:
  """The weight of each term of `objectives.TERMS`, its schedule, and the term's options.

  A weight of 0 leaves out the term and its head. A schedule multiplies the weight: pairs of a step and a factor, linear
  between them, such as ((0, 0.0), (2500, 1.0)); () is always 1. The other fields are the keyword arguments of the
  term's function in `declip_jax.objectives`.
  """
  # Without the full gradient the candidates are constants, as in SLIP's released code.
  contrast = {"full_gradient": True, "label_smoothing": 0.0}
  options = {
    "clip": contrast,
    "mvs": contrast,
    "sigmoid": {},
    # Number of tokens selected for the comparison (released code: 16, padding included); 0 compares all but padding.
    "filip": {"top_k": 0, "label_smoothing": 0.0},
    "simclr": {"temperature": 0.1},
    "simsiam": {},
    "moco": {"temperature": 0.2},
    "byol": {},
    "mim": {},
    "mlm": {},
    # `symmetric`: both directions, or image to text only (released code). `warmup`: the loss is 0 until the bank is
    # full; without it the bank starts out as noise (released code).
    "nns": {"symmetric": True, "warmup": True, "label_smoothing": 0.0},
    "classify": {"label_smoothing": 0.1},
  }
  return ConfigDict({term: {"weight": 0.0, "schedule": (), **given} for term, given in options.items()})


def _as_released(c: ConfigDict, method: str) -> None:
  """Makes a config do what Sense-GVT/DeCLIP's code and YFCC15M configs do, where that differs from the paper.

  The masked caption is the first text of every contrastive loss, even without masked language modelling, which is
  causal. Both texts of a pair search the neighbour bank and are stored in it; that loss compares image to text only,
  at full weight from the start. Banks and the heads' batch norms are those of one GPU: 32 of them with 128 pairs each,
  even if the batch size is changed later. The log scale is kept in [3, 6] after each step (in the code also before the
  first backward pass, which only moves its initial value to 3), and FILIP compares 16 selected tokens, padding
  included. A ViT's patch embedding is frozen, and the packed bias of query, key and value is decayed. Of several
  captions the first is used.

  Three things that the code does cannot be configured, since no one would want them: masked language modelling weights
  each GPU's mean equally, regardless of the number of masked tokens there (`objectives.masked_lm`); a random token may
  be a special one; and EDA's swaps and stop words have bugs (`data.text.augment`).
  """
  heads, objective, optimizer = c.model.heads, c.objective, c.optimizer
  objective.nns.symmetric = objective.nns.warmup = False
  objective.filip.top_k = 16
  if method == "slip":
    c.data.strong_scale = (0.2, 1.0)  # as for all its strong views
  c.data.caption_weights = (1.0,)
  c.model.mlm_attention = "causal"
  heads.norm_groups = heads.bank_groups = c.batch_size // 128
  heads.bank_overflow = "drop"
  heads.max_scale = 0.0 if method in ("slip", "filip") else 100.0
  c.model.mean, c.model.std = IMAGENET_MEAN, IMAGENET_STD
  c.data.evaluation_resize = c.data.image_size * 256 // 224
  optimizer.learning_rate, optimizer.weight_decay = (5e-4, 0.5) if method in ("slip", "filip") else (1e-3, 0.1)
  optimizer.epsilon = 1e-8
  optimizer.schedule = "declip_cosine"
  optimizer.warmup, optimizer.warmup_start = duration(steps=2500), 1e-4
  optimizer.decay_mask = "declip"
  optimizer.logit_scale_range = (3.0, 6.0)
  if c.model.image.kind == "vit":
    optimizer.frozen = ("towers/image/patch_embedding",)


def _data(recipe: str, image_size: int) -> ConfigDict:
  c = ConfigDict()
  c.train = ("scenes:train",)  # sources to train on, "kind:location" each, or paths that data.inspect recognises
  c.mixture = (1.0,)  # weight of each source
  # Sources of other images for self-supervision in the same step (SLIP's "decoupled"); () uses those of the pairs.
  c.ssl_train = ()
  c.ssl_mixture = (1.0,)  # weight of each of these sources
  c.recipe = recipe  # a name of `data.recipes.RECIPES`
  c.image_size = image_size
  c.interpolation = "bilinear"  # method for crops and evaluation; OpenAI's CLIP evaluates with "bicubic"
  # Length of the shorter side, in pixels, before evaluation crops the centre; 0 means image_size. DeCLIP: 256.
  c.evaluation_resize = 0
  # Whether whole images are resized to a square, whatever their shape, as SigLIP's: evaluation then cuts nothing off,
  # and random crops have the shape of the image, up to the recipe's aspect ratios.
  c.squash = False
  c.mask_probability = 0.15  # probability that masked language modelling selects a token (BERT: 0.15)
  c.mask_slots = 0  # masked positions kept per caption; 0 derives a bound that is rarely exceeded
  c.mask_whole_words = False  # whether words are masked with all their tokens
  # Probability of the first caption of an example, of the second and so on; (1,) uses the first; () uses all equally.
  c.caption_weights = ()
  c.patch_share = 0.4  # share of an image that masked image modelling hides (BEiT: 0.4)
  # Augmentation. None keeps the recipe's value; `data.recipes.Recipe` explains each field.
  for name in ("weak_scale", "strong_scale", "jitter", "blur_probability", "blur_radius", "solarize_probability"):
    c[name] = placeholder(tuple)
  for name in ("jitter_probability", "grayscale_probability", "flip_probability"):
    c[name] = placeholder(float)
  for name in ("rand_magnitude", "erase_probability", "mixup", "cutmix"):
    c[name] = placeholder(float)
  c.text_operations = placeholder(
    tuple
  )  # ("replace", "insert", "swap", "delete") is all of EDA; () leaves texts as they are
  c.engine = "fast"  # makes the image views; "exact" uses Pillow and equals torchvision bit for bit
  c.augment_on = "host"  # or "device": the host only crops, and the step does the rest
  # Which contrasted texts search the neighbour bank and are stored in it, such as ("raw", "augmented"). None: those of
  # the recipe. Texts that a recipe does not contrast cannot be used: no method has both raw and masked captions.
  c.neighbour_texts = placeholder(tuple)
  c.templates = ()  # captions for examples with a class but no caption, such as ("a photo of a {}.",)
  c.workers = placeholder(int)  # processes that read and augment; 0 uses threads of this process. None: by core count
  c.threads = placeholder(int)  # threads per process. None: by core count
  # Images of more pixels, height x width, are unusable, since each thread may need 10 bytes of memory for each of them.
  # Those of WebP, AVIF, CMYK and 32-bit grey count twice, those of JPEG 2000 four times.
  c.max_pixels = 2**26
  c.max_seconds = 60.0  # for reading one sample, which is unusable if that takes longer; 0 means no limit
  c.max_bad = MAX_BAD  # largest share of unusable samples between two lines of metrics.jsonl before the run stops
  return c


def _model(built: architectures.Architecture) -> ConfigDict:
  c = ConfigDict()
  # Dtype of activations; parameters, softmax, norms and losses are float32. "auto": chosen.
  c.dtype = "bfloat16"
  # What the backward pass recomputes: "none", "dots" (all but the products of linear layers and convolutions; a third
  # of the memory for 0.2 % more FLOPs), "narrow_dots" (these and the wide products of MLPs), "full" (everything inside
  # a block; a quarter more FLOPs), or "auto": chosen.
  c.remat = "dots"
  # The implementation of attention in transformers, one of `models.attention.IMPLEMENTATIONS`; "auto" is the fastest of
  # the backend, and what exports and loaded models always have.
  c.attention = "auto"
  c.unroll = 1  # number of transformer blocks that are unrolled for the compiler; more take longer to compile
  c.mean, c.std = built.mean or OPENAI_MEAN, built.std or OPENAI_STD
  # Drop path of an image ViT in training: the probability with which an image skips the attention, and that with which
  # it skips the MLP, of the last block; linear over depth from 0 in the first. BeiT fine-tunes ViT-B with 0.1.
  c.drop_path = 0.0
  # Patch dropout of an image ViT in training: the share of the patches of each view, drawn anew in each step, that do
  # not enter the transformer, whose FLOPs fall by about as much. FLIP (Li et al. 2023, section 3) drops 0.5 or 0.75 and
  # ends with a short training on whole images, as `stages` do; CLIPA (Li et al. 2023) finds that larger models lose
  # less by it. FILIP compares the kept patches. Evaluation and momentum towers see all patches.
  c.patch_dropout = 0.0
  # What a masked token sees: the whole caption ("bidirectional", as in BERT, in a pass of its own), or the tokens
  # before it ("causal", as in DeCLIP's released code).
  c.mlm_attention = "bidirectional"
  c.image, c.text = built.image, built.text
  c.heads = ConfigDict()
  c.heads.embed_dim = built.embed_dim  # dimension of the joint space
  # Whether a linear layer maps features to the joint space, which otherwise is that of the features: images of SigLIP
  # have none, nor have texts of its So400m/16 for many languages.
  c.heads.image_linear, c.heads.text_linear = built.image_linear, True
  c.heads.image_bias = built.image_bias
  c.heads.text_bias = built.text_bias
  # Initial log inverse temperature of embeddings and of FILIP's tokens (Radford et al. 2021, section 2.5).
  c.heads.logit_scale_init = math.log(1 / 0.07)
  # Initial bias of the sigmoid loss, which also needs logit_scale_init=ln 10 (SigLIP, section 3.2).
  c.heads.logit_bias_init = -10.0
  c.heads.max_scale = 0.0  # largest inverse temperature in the forward pass, 0 for none; see also logit_scale_range
  c.heads.dense_dim = 256  # dimension in which FILIP compares tokens
  c.heads.simclr_projector = (4096, 4096, 256)
  c.heads.simsiam_projector = (1024, 1024, 1024)
  c.heads.simsiam_predictor = (512, 1024)
  c.heads.momentum_projector = (4096, 4096, 256)  # for MoCo v3 and BYOL
  c.heads.momentum_predictor = (4096, 256)
  # Number of groups of the batch that heads normalise separately; 1 is synchronised batch norm. 0: chosen.
  c.heads.norm_groups = 1
  # Number of texts in each bank that nearest-neighbour supervision searches. 0: chosen.
  c.heads.bank_size = 65536
  c.heads.bank_groups = 1  # number of banks, each for its share of the batch. 0: chosen
  c.heads.bank_overflow = "wrap"  # what happens at the end of a bank, see `models.bank.OVERFLOWS`
  c.heads.bank_neighbours = 1  # number of nearest texts to find for each text
  # The classes of the classifier: their number, and their names in the order of the logits. A run takes both from the
  # first source in data.train. Sources without names need the number.
  c.heads.num_classes, c.heads.classnames = 0, ()
  # Whether the classifier reads unit-norm joint embeddings, like a zero-shot classifier, instead of tower features.
  c.heads.classify_joint = False
  c.heads.update(built.heads)
  return c


def _lora() -> ConfigDict:
  """Low-rank adapters (LoRA, Hu et al. 2021) of the towers' blocks, see `models.lora`.

  They are trained in place of the towers and their projections; the other heads, temperature and bias among them, are
  trained as usual. A model that is loaded or exported has the adapters in its kernels.
  """
  c = ConfigDict()
  c.rank = 0  # width of the adapters, such as 8; 0 means none
  c.alpha = 16.0  # alpha / rank is the factor of the product of an adapter
  c.targets = ("query", "key", "value", "out")  # kernels with adapters, of `lora.TARGETS`; "fc1", "fc2" are the MLP's
  c.towers = ("image", "text")  # towers with adapters; the others are not trained at all
  # Paths of parameters of towers and projections that are trained besides, such as ("heads/text_projection",).
  c.trained = ()
  return c


def _optimizer() -> ConfigDict:
  c = ConfigDict()
  c.name = "adamw"  # one of `optim.OPTIMIZERS`
  c.learning_rate = 5e-4  # peak learning rate
  c.schedule = "cosine"  # one of `schedules.SCHEDULES`
  c.warmup = duration(steps=2000)
  c.warmup_start = 0.0  # learning rate of the first step
  c.end_learning_rate = 0.0  # learning rate that the schedule decays to
  c.milestones = ()  # for the schedule "step": pairs of a step and a factor
  c.cooldown = duration()  # for the schedule "cooldown": length of the decay at the end
  c.cooldown_power = 1.0  # exponent of that decay; 1 is linear
  c.weight_decay = 0.2  # AdamW's is decoupled from the moments
  c.sgd_side = "image"  # side that "adamw_sgd" trains with SGD, one of `models.paths.SIDES`
  c.sgd_weight_decay = 0.0  # weight decay of that side, added to the gradient
  c.decay_mask = "weights"  # parameters that are decayed, one of `optim.DECAY_MASKS`
  c.b1, c.b2, c.epsilon = 0.9, 0.98, 1e-6  # for AdamW
  c.momentum, c.nesterov = 0.9, False  # for SGD and LARS
  c.trust_coefficient = 0.001  # for LARS
  c.gradient_clip = 0.0  # largest global norm of the gradient; 0 means no clipping
  # Factors of the learning rate of parameters at or below paths, such as (("heads/logit_scale", 0.1),).
  c.multipliers = ()
  c.layer_decay = 1.0  # factor of the learning rate per block of an image ViT, counted from its end
  # Paths of parameters that are not trained: ("towers/image",) is a locked image tower (LiT), and DeCLIP freezes
  # ("towers/image/patch_embedding",). ("towers/image/transformer/blocks[:-2]",) are all blocks but the last two.
  c.frozen = ()
  # Range of the log inverse temperatures after each step; () means no limits.
  c.logit_scale_range = (0.0, math.log(100))
  # Decay of an exponential moving average of the weights, such as 0.9999; 0 means none. Evaluations, exports and
  # init_from read the average, if there is one. It needs as much memory as the parameters; see `step.update_average`.
  c.ema = 0.0
  return c


def stage(**fields: Any) -> ConfigDict:
  """A stage that a run trains before its last one: `c.stages.low = config.stage(duration=..., image_size=112)`.

  A field that is None, and a duration that is empty, are those of the config. The schedule of the learning rate starts
  anew in each stage, with its warm-up and its decay, and milestones count from the start of the stage; schedules of
  terms and the decay of a momentum tower go through the whole run. A share is one of the whole run, also that of a
  warm-up. The last step of a stage is logged, saved and evaluated. Evaluations are always at the resolution of the
  config. `data.blur_radius` remains a number of pixels.

  Raises:
    AttributeError: an unknown field.
  """
  c = ConfigDict()
  c.duration = duration()  # length of the stage
  c.image_size = placeholder(int)  # data.image_size
  c.patch_dropout = placeholder(float)  # model.patch_dropout, the share of the patches of these images
  c.context_length = placeholder(int)  # model.text.context_length, at most that of the config; longer texts are cut
  c.batch_size = placeholder(int)  # batch_size
  c.micro_batches = placeholder(int)  # micro_batches
  c.learning_rate = placeholder(float)  # optimizer.learning_rate, the peak
  c.warmup = duration()  # optimizer.warmup
  c.evaluate_every = duration()  # evaluate_every
  c.lock()
  for name, value in fields.items():
    setattr(c, name, value)
  return c


def term(
  loss: Callable[..., Any],
  *,
  weight: float,
  schedule: tuple[tuple[int, float], ...] = (),
  heads: tuple[str, ...] = ("joint",),
  needs: tuple[str, ...] = ("image", "text"),
  views: tuple[str, ...] = ("pair",),
  **options: Any,
) -> ConfigDict:
  """A term of your own, defined in your config file: `c.objective.<name> = config.term(loss, weight=0.5)`.

  `config.json` records only the name of its function. Resuming the run requires the config file; loading or evaluating
  the trained model does not.

  Args:
    loss: function `(outputs, batch, *, option=default, ...) -> (loss, metrics)`; its argument `method`, if any, is
      how all pairs of a batch are compared.
    weight: weight of the term.
    schedule: factor of the weight over the steps, see `default`.
    heads: names of `models.heads.HEADS` that have to exist.
    needs: entries of `types.Outputs` that the loss reads.
    views: roles of `views.Views` that the recipe has to make; "pair" is the first contrastive view of each modality.
    options: values of the loss's options other than their defaults.

  Raises:
    ValueError: `loss` is not a plain function, has an option without a default, or lacks one of `options`.
  """
  if not inspect.isfunction(loss):
    raise ValueError(
      f"config.term: loss={loss!r} must be a function defined with def, since config.json records its name"
    )
  parameters = list(inspect.signature(loss).parameters.values())[2:]
  defaults = {parameter.name: parameter.default for parameter in parameters if parameter.name != "method"}
  if unknown := sorted(set(options) - set(defaults)):
    raise ValueError(f"config.term: {loss.__name__} has the options {sorted(defaults)}, not {unknown}")
  if missing := sorted(name for name, default in defaults.items() if default is inspect.Parameter.empty):
    raise ValueError(f"config.term: {loss.__name__} has options without defaults: {missing}")
  own = {"loss": loss, "heads": heads, "needs": needs, "views": views}
  return ConfigDict({"weight": float(weight), "schedule": schedule, **own, **defaults, **options})


MAX_BAD = 0.05  # see `config.data.max_bad`
TEMPLATES = ("a photo of a {}.",)  # prompts for zero-shot classification


def zero_shot(data: str, templates: tuple[str, ...] = TEMPLATES) -> ConfigDict:
  """Zero-shot classification of a source with class names, by prompts averaged over `templates`."""
  return _evaluation("zero_shot", data, templates=templates)


def retrieval(data: str, equal_texts: bool = False, prefix: str = "", folds: int = 1) -> ConfigDict:
  """Image-text retrieval over a source.

  Args:
    data: the source.
    equal_texts: whether equal captions match each other's images.
    prefix: text before every caption, such as "a photo of ".
    folds: number of parts that are searched separately; 5 for COCO 1K.
  """
  return _evaluation("retrieval", data, equal_texts=equal_texts, prefix=prefix, folds=folds)


def composition(data: str) -> ConfigDict:
  """The choice between right and wrong captions or images, over SugarCrepe, Winoground or WinoGAViL."""
  return _evaluation("composition", data)


def linear_probe(data: str, train: str = "", val: str = "", features: str = "pooled") -> ConfigDict:
  """Logistic regression on features of `train`, whose strength is chosen on `val`, by default a part of `train`."""
  return _evaluation("linear_probe", data, train=train, val=val, features=features)


def sgd_probe(
  data: str,
  train: str = "",
  val: str = "",
  rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
  epochs: int = 100,
  batch_size: int = 1024,
  optimizer: str = "sgd",
  features: str = "pooled",
) -> ConfigDict:
  """A linear head trained by gradient descent with the one of `rates` that is best on `val`.

  `optimizer` is "sgd" (SLIP, MoCo v3), or "adamw", that of CLIP_benchmark, which takes rates=(0.1,), epochs=10 and
  batch_size=64.
  """
  options = {"rates": rates, "epochs": epochs, "batch_size": batch_size, "optimizer": optimizer, "features": features}
  return _evaluation("sgd_probe", data, train=train, val=val, **options)


def few_shot(
  data: str,
  train: str = "",
  shots: tuple[int, ...] = (1, 2, 4, 8, 16),
  seeds: tuple[int, ...] = (0, 1, 2),
  method: str = "logistic",
  strength: float = 0.316,
  features: str = "pooled",
) -> ConfigDict:
  """Classification after training on `shots` images per class: by "logistic" regression (CLIP), or "ridge".

  `strength` is C of logistic regression; 0 chooses it on as many further images of each class.
  """
  options = {"shots": shots, "seeds": seeds, "method": method, "strength": strength, "features": features}
  return _evaluation("few_shot", data, train=train, **options)


def knn(
  data: str,
  train: str = "",
  neighbours: tuple[int, ...] = (10, 20, 100, 200),
  headline: int = 20,
  temperature: float = 0.07,
  features: str = "pooled",
) -> ConfigDict:
  """Classification by the nearest images of `train`, reported in full for `headline` neighbours."""
  options = {"neighbours": neighbours, "headline": headline, "temperature": temperature, "features": features}
  return _evaluation("knn", data, train=train, **options)


def nearest_mean(data: str, train: str = "", features: str = "pooled") -> ConfigDict:
  """Classification by the nearest mean feature of a class of `train`."""
  return _evaluation("nearest_mean", data, train=train, features=features)


def classify(data: str) -> ConfigDict:
  """Classification of a labelled source by the classifier of a fine-tuned model."""
  return _evaluation("classify", data)


def _evaluation(kind: str, data: str, **fields: Any) -> ConfigDict:
  """An entry of `c.evals`, which takes part in each evaluation of a run, or in each `every`-th.

  With `suite`, the name of a suite such as "slip26", or "all", `data` is a data file (`evals.data_files`), and the
  entry means those of its data sets that are in the suite, with its prompts, classes and metrics.
  """
  return ConfigDict({"kind": kind, "data": data, "suite": "", "every": 1, **fields})


# The functions that make an entry of `c.evals`, by its `kind`.
EVALUATIONS = {
  "zero_shot": zero_shot,
  "retrieval": retrieval,
  "composition": composition,
  "linear_probe": linear_probe,
  "sgd_probe": sgd_probe,
  "few_shot": few_shot,
  "knn": knn,
  "nearest_mean": nearest_mean,
  "classify": classify,
}


def duration(*, steps: int = 0, epochs: float = 0, examples: int = 0, share: float = 0) -> ConfigDict:
  """A duration in one of four units; the others are 0."""
  return ConfigDict({"steps": steps, "epochs": float(epochs), "examples": examples, "share": float(share)})


def without_shares(c: ConfigDict) -> ConfigDict:
  """A copy of a config in which durations given as shares are converted to the unit of `duration`.

  Raises:
    ValueError: a share is not between 0 and 1, is given together with another unit, or is that of the run itself.
  """
  c = c.copy_and_resolve_references()
  if c.duration.share:
    raise ValueError(f"config.duration.share={c.duration.share}: the run is the whole; set steps, epochs or examples")
  for name, length in durations(c).items():
    if not length.share:
      continue
    if not 0 < length.share <= 1:
      raise ValueError(f"config.{name}.share={length.share}: expected a share of the run, more than 0 and at most 1")
    _only_unit(length, name)
    steps, epochs, examples = (c.duration[unit] for unit in ("steps", "epochs", "examples"))
    whole = {"steps": math.ceil(length.share * steps), "examples": math.ceil(length.share * examples)}
    length.update({**whole, "epochs": length.share * epochs, "share": 0.0})
  return c


def durations(c: ConfigDict) -> dict[str, ConfigDict]:
  """The durations of a config besides that of the whole run, by the names of their fields."""
  found = {"evaluate_every": c.evaluate_every}
  stages = {f"stages.{name}": fields for name, fields in c.stages.items() if isinstance(fields, ConfigDict)}
  for parent, fields in {"checkpoint": c.checkpoint, "optimizer": c.optimizer, **stages}.items():
    found |= {f"{parent}.{name}": value for name, value in fields.items() if isinstance(value, ConfigDict)}
  return found


def steps_of(length: ConfigDict, *, name: str, batch_size: int, epoch_examples: int) -> int:
  """Converts a duration that is not a share, see `without_shares`, to steps, rounding up; all units 0 gives 0.

  Raises:
    ValueError: more than one unit is set, or one is negative or not finite.
  """
  _only_unit(length, name)
  examples = examples_of(length, epoch_examples)
  return length.steps or math.ceil(examples / batch_size)


def _only_unit(length: ConfigDict, name: str) -> None:
  """Rejects a duration with more than one unit, or with one that is negative or not finite."""
  given = {unit: value for unit, value in length.items() if value}
  if len(given) > 1 or not all(0 <= value < math.inf for value in given.values()):
    other = next((unit for unit in reversed(given) if unit != "steps"), "epochs")
    hint = f"set one of steps, epochs, examples, share, and the others to 0, such as --config.{name}.{other}=0"
    raise ValueError(f"config.{name}={given}: {hint}")


def examples_of(length: ConfigDict, epoch_examples: int) -> float:
  """The number of examples in a duration in epochs or examples, 0 for one in steps."""
  return length.examples or length.epochs * epoch_examples


# Fields of old config.json files and their current names; "*" is any name. Fields below a path move with it.
RENAMED = {
  "weights.*": "objective.*.weight",
  "weight_schedule.*": "objective.*.schedule",
  "terms.*": "objective.*",
  "contrast.form": "contrast.method",
  "momentum": "momentum_tower.decay",
  "optimizer.end": "optimizer.end_learning_rate",
  "optimizer.decayed": "optimizer.decay_mask",
  "max_skipped_in_a_row": "safety.max_skipped_steps",
  "divergence.spike": "safety.spike_factor",
  "divergence.rollbacks": "safety.max_rollbacks",
  "hang_timeout": "safety.hang_timeout",
  "checkpoint.minutes": "safety.checkpoint_minutes",
  "init_from.parts": "init_from.groups",
}
# Subtrees whose fields depend on the config: the names of stages, of evaluations and of a user's own terms and
# trackers, and the kind of tower. An older config lacks the terms and trackers that were added since it was written.
_OPEN = ("stages", "evals", "objective", "trackers", "model.image")
_GROWING = ("objective", "trackers")


def from_json(text: str) -> ConfigDict:
  """A config as `to_json_best_effort` wrote it, with the current names of its fields.

  Fields that were added since it was written have their defaults.

  Raises:
    ValueError: a field that neither the current version nor an older one has.
  """
  fields, known = parse_json(text), default().to_dict()
  of_stages = fields.get("stages", {})
  in_stages = _unknown(of_stages, dict.fromkeys(of_stages, stage().to_dict()), "stages.")
  if unknown := sorted([*_unknown(fields, known), *in_stages]):
    raise ValueError(f"config.json has unknown fields {unknown}: it was written by another version of declip_jax")
  _add_missing(fields, known)
  add_missing_of_model(fields["model"])
  for entry in of_stages.values():
    _add_missing(entry, stage().to_dict())
  for entry in fields.get("evals", {}).values():
    if isinstance(entry, dict) and entry.get("kind") in EVALUATIONS:
      _add_missing(entry, EVALUATIONS[entry["kind"]]("").to_dict())
  return ConfigDict(fields).lock()


def add_missing_of_model(model: dict[str, Any]) -> None:
  """Gives an older `config.model`, its towers and its heads the fields that were added since it was written."""
  model.setdefault("attention", "auto")
  added = {"text": architectures.text(64), "heads": ConfigDict({"image_linear": True, "text_linear": True})}
  if model["image"].get("kind") == "vit":
    added["image"] = architectures.vit(1, 1, 1, 1)
  for part, fields in added.items():
    model[part] = {**fields.to_dict(), **model[part]}


def changeable(saved: ConfigDict) -> ConfigDict:
  """A saved config for another run, whose fields can be set like those of `default`.

  Raises:
    ValueError: it has a user's own term or tracker, of which it records only the name of the function.
    TypeError: the type of a field is not that of its default.
  """
  c = default()
  fields = saved.to_dict()
  for subtree, kind in (("objective", "term"), ("trackers", "tracker")):
    if own := sorted(set(fields.get(subtree, {})) - set(c[subtree])):
      raise ValueError(f"{subtree}.{own[0]} is a {kind} of your own: pass the config file that defines it")
  with c.unlocked():
    c.stages = ConfigDict({name: stage(**_given(entry)) for name, entry in fields.pop("stages", {}).items()})
    c.evals = ConfigDict(fields.pop("evals", {}))
    c.model.image = ConfigDict(fields["model"].pop("image"))  # its fields depend on the kind of tower
  unlock_extensible(c)
  c.update(fields)
  return c


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a saved stage that are not None, with durations as configs."""
  return {name: ConfigDict(x) if isinstance(x, dict) else x for name, x in fields.items() if x is not None}


def parse_json(text: str) -> dict[str, Any]:
  """The fields of a config, as `to_json_best_effort` wrote them, under their current names; they are not checked."""
  fields = with_tuples(json.loads(text))
  for old, new in RENAMED.items():
    _rename(fields, old.split("."), new.split("."))
  return fields


def with_tuples(value: Any) -> Any:
  """Converts lists to tuples: JSON has no tuples, and all its lists were tuples."""
  if isinstance(value, dict):
    return {name: with_tuples(entry) for name, entry in value.items()}
  return tuple(map(with_tuples, value)) if isinstance(value, list) else value


def _rename(fields: dict[str, Any], old: list[str], new: list[str]) -> None:
  """Moves the field or subtree at a path of `RENAMED` to its new path, and drops what is empty afterwards."""
  parent = fields
  for name in old[:-1]:
    parent = parent.get(name)
    if not isinstance(parent, dict):
      return
  for name in list(parent) if old[-1] == "*" else [old[-1]] if old[-1] in parent else []:
    target, value = fields, parent[name]
    *above, last = [name if part == "*" else part for part in new]
    del parent[name]
    for part in above:
      target = target.setdefault(part, {})
    if isinstance(value, dict) and last in target:
      target[last].update(value)
    else:
      target[last] = value
  if old[:-1] and not parent:
    del fields[old[0]]


def _add_missing(fields: dict[str, Any], known: Mapping[str, Any], path: str = "") -> None:
  for name, value in known.items():
    field = f"{path}{name}"
    if field in _OPEN and field not in _GROWING:
      fields.setdefault(name, {})
      continue
    if isinstance(value, dict):
      _add_missing(fields.setdefault(name, {}), value, f"{field}.")
    else:
      fields.setdefault(name, value)


def _unknown(fields: Mapping[str, Any], known: Mapping[str, Any], path: str = "") -> Iterator[str]:
  for name, value in fields.items():
    field = f"{path}{name}"
    if name not in known:
      yield field
    elif isinstance(value, dict) and isinstance(known[name], dict) and field not in _OPEN:
      yield from _unknown(value, known[name], f"{field}.")

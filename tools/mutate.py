"""Measures what the fast tests catch: changes one line of the package at a time and runs the tests that cover it.

  python tools/mutate.py               # every mutation against its own tests, and these tests without a mutation
  python tools/mutate.py bank spike    # the mutations whose file or subject contains one of these words
  python tools/mutate.py --all         # every mutation against all fast tests, which takes hours

Every mutation is applied to a copy of the repository, never in place. A mutation is caught if a test fails. The exit
status is 0 if at least 90 % are caught.
"""

import argparse
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("declip_jax", "tests", "configs", "launch", "colabs", "docs", "benchmarks", "tools")
LEAST_CAUGHT = 0.9


class Mutation(NamedTuple):
  """A bug: `old`, which occurs once in `file`, becomes `new`.

  Attributes:
    subject: the bug in a few words.
    file: path below `declip_jax/`.
    old, new: text.
    tests: test file below `tests/` that should fail, or FILE::TEST, or several with spaces between them.
  """

  subject: str
  file: str
  old: str
  new: str
  tests: str


_CONTRASTIVE, _FILIP = "objectives/contrastive_test.py", "objectives/filip_test.py"
_BANK, _OPTIM = "models/bank_test.py", "training/optim_test.py"
_TOKENIZER, _TEXTS = "data/text/tokenizer_test.py", "data/text/augment_test.py"
_BATCH_NORM, _BLOCKWISE = "models/batch_norm_test.py", "objectives/blockwise_test.py"
_PIPELINE, _STEP = "data/pipeline_test.py", "training/step_test.py"
_WEIGHTS = "weights/layout_test.py weights/read_test.py"
_METRICS, _RANKS = "evals/metrics_test.py evals/zero_shot_test.py", "evals/ranks_test.py"
_PROBE, _PROTOCOLS = "evals/linear_probe_test.py", "evals/wrong_variants_test.py"
_SEARCH = "image_search/server_test.py"
_SIGLIP = "weights/siglip_test.py"
_ONNX = "weights/onnx_test.py"
_ATTENTION = "models/attention_test.py"
# fmt: off
MUTATIONS = [
  # Terms.
  Mutation("constant candidates have a gradient", "objectives/contrastive.py",
           "constant = (lambda side: side) if full_gradient else jax.lax.stop_gradient\n  queries",
           "constant = lambda side: side\n  queries", "objectives/gradients_test.py"),
  Mutation("sign of label smoothing", "objectives/contrastive.py",
           "self.loss + label_smoothing * self.smoothing",
           "self.loss - label_smoothing * self.smoothing", _CONTRASTIVE),
  Mutation("sign of label smoothing, whole matrix", "objectives/contrastive.py",
           "logits.shape[0] - logits.mean())", "logits.shape[0] + logits.mean())", _FILIP),
  Mutation("multi-view contrast also has the first pair", "objectives/contrastive.py",
           ".ravel()[1:].mean()", ".ravel().mean()", _CONTRASTIVE),
  Mutation("accuracy along the wrong axis", "objectives/contrastive.py",
           "jnp.argmax(logits, axis=1) ==", "jnp.argmax(logits, axis=0) ==", _FILIP),
  Mutation("sums of rows and of columns swapped", "objectives/blockwise.py",
           "return sums(x, constant(y), 3), sums(constant(x), y, 2) if columns else None",
           "return sums(x, constant(y), 2), sums(constant(x), y, 3) if columns else None",
           _BLOCKWISE),
  Mutation("a chunk's candidates are counted from 0", "objectives/blockwise.py",
           "loss.forward(_products(x, part), row, column + start)", "loss.forward(_products(x, part), row, column)",
           _BLOCKWISE),
  Mutation("merged sums relative to different maxima", "objectives/blockwise.py",
           "self.total * jnp.exp(self.top - top) + other.total * jnp.exp(other.top - top)",
           "self.total + other.total * jnp.exp(other.top - top)", _BLOCKWISE),
  Mutation("the ring passes candidates the wrong way", "objectives/blockwise.py",
           "(device - 1) % count", "(device + 1) % count", _BLOCKWISE),
  Mutation("sign of the sigmoid bias", "objectives/blockwise.py",
           "jnp.broadcast_to(bias, (len(x), 1))", "jnp.broadcast_to(-bias, (len(x), 1))", "objectives/sigmoid_test.py"),
  Mutation("padding counts as a candidate", "objectives/filip.py",
           "jnp.where(valid[None, None], likeness, -jnp.inf)", "likeness", _FILIP),
  Mutation("padding counts in the mean over a text", "objectives/filip.py",
           "0).sum(axis=-1) / count", "0).mean(axis=-1)", _FILIP),
  Mutation("the last of equal tokens gets the gradient", "objectives/filip.py",
           "place, size).min(axis)", "place, -1).max(axis)", _FILIP),
  Mutation("tokens selected by their own side", "objectives/filip.py",
           "partner.sum(axis=1), precision", "tokens.sum(axis=1), precision", _FILIP),
  Mutation("masked tokens without their mask", "objectives/masked_lm.py",
           "return (loss * weight).sum() / total,", "return loss.mean(),", "objectives/masked_lm_test.py"),
  Mutation("gradient into hidden pixels", "objectives/masked_image.py",
           "jax.lax.stop_gradient(outputs.mim_target)", "outputs.mim_target", "objectives/gradients_test.py"),
  Mutation("gradient into MoCo's targets", "objectives/momentum.py",
           "jax.lax.stop_gradient(unit_norm(outputs.momentum_target))[::-1]",
           "unit_norm(outputs.momentum_target)[::-1]", "objectives/gradients_test.py"),
  Mutation("MoCo's targets of the same view", "objectives/momentum.py",
           "jax.lax.stop_gradient(unit_norm(outputs.momentum_target))[::-1]",
           "jax.lax.stop_gradient(unit_norm(outputs.momentum_target))", "objectives/momentum_test.py"),
  Mutation("BYOL's epsilon", "objectives/momentum.py",
           "unit_norm(outputs.momentum_prediction, 1e-6)", "unit_norm(outputs.momentum_prediction)",
           "objectives/momentum_test.py"),
  Mutation("momentum falls instead of rises", "objectives/momentum.py",
           "(1 + jnp.cos(jnp.pi * step / total_steps))", "(1 - jnp.cos(jnp.pi * step / total_steps))",
           "objectives/momentum_test.py"),
  Mutation("moving average the wrong way round", "objectives/momentum.py",
           "momentum * o + (1 - momentum) * n", "momentum * n + (1 - momentum) * o", "objectives/momentum_test.py"),
  Mutation("neighbours count before the bank is full", "objectives/neighbours.py",
           "outputs.neighbour_ready * loss if warmup else loss", "loss", "objectives/neighbours_test.py"),
  Mutation("anchors are their own candidates", "objectives/simclr.py",
           "without_self=True", "without_self=False", "objectives/simclr_test.py"),
  Mutation("gradient into SimSiam's targets", "objectives/simsiam.py",
           "jax.lax.stop_gradient(unit_norm(outputs.simsiam_projection))",
           "unit_norm(outputs.simsiam_projection)", "objectives/gradients_test.py"),
  Mutation("SimSiam's targets of the same view", "objectives/simsiam.py",
           "target[::-1]", "target", "objectives/simsiam_test.py"),
  Mutation("default epsilon of unit rows", "unit_norm.py",
           "epsilon: float = 1e-12", "epsilon: float = 1e-8", "models/heads_test.py"),
  Mutation("a schedule multiplies nothing", "objectives/total.py",
           "return weight * jnp.interp(", "return jnp.interp(", "objectives/terms_test.py"),
  Mutation("scale of the deviation", "objectives/diagnostics.py",
           "* rows.shape[-1] ** 0.5", "* rows.shape[0] ** 0.5", "objectives/diagnostics_test.py"),
  Mutation("smoothing takes from the right class only", "objectives/classify.py",
           "label_smoothing / classes + (1 - label_smoothing) *", "label_smoothing / classes +",
           "objectives/classify_test.py"),
  # Models.
  Mutation("attention and MLP of a block are dropped together", "models/transformer.py",
           "_scaled(hidden, branch_scale[:, 1])", "_scaled(hidden, branch_scale[:, 0])", "models/vit_test.py"),
  Mutation("a head of the attention kernel sees the lanes of others", "models/attention_kernel.py",
           "weights = _weights(place.only(query), key", "weights = _weights(query, key", _ATTENTION),
  Mutation("the attention kernel's gradient of the softmax has no mean", "models/attention_kernel.py",
           "(to_weights - mean)", "to_weights", _ATTENTION),
  Mutation("the attention kernel ignores hidden keys", "models/attention_kernel.py",
           "jnp.where(visible > 0, scores, _HIDDEN)", "scores", _ATTENTION),
  Mutation("the attention kernel sees one position ahead", "models/attention_kernel.py",
           "row >= column", "row + 1 >= column", _ATTENTION),
  Mutation("a step does not know its mesh", "build.py",
           "jax.jit(traced_over(built.mesh, step)", "jax.jit(step", _ATTENTION),
  Mutation("encoders do not know their mesh", "evals/encoders.py",
           "jax.jit(traced_over(mesh, function)", "jax.jit(function", _ATTENTION),
  Mutation("each device has all rows of attention", "sharding.py",
           "  rows = PartitionSpec((DATA, FSDP))", "  rows = PartitionSpec()", _ATTENTION),
  Mutation("the bank writes one entry late", "models/bank.py",
           "index, end = bank.pointer + jnp.arange(new)", "index, end = bank.pointer + 1 + jnp.arange(new)", _BANK),
  Mutation("the bank's pointer lags by one", "models/bank.py",
           "end % size", "(end - 1) % size", _BANK),
  Mutation("the bank counts more entries than it has", "models/bank.py",
           "jnp.minimum(bank.filled + new, size)", "bank.filled + new", _BANK),
  Mutation("age of neighbours off by one", "models/bank.py",
           "// written + 1, 0)", "// written, 0)", _BANK),
  Mutation("DeCLIP's bank that a batch fills exactly", "models/bank.py",
           "jnp.where(end >= size, 0, end)", "jnp.where(end > size, 0, end)", _BANK),
  Mutation("the bank is full one text too early", "models/heads/bank.py",
           "current.filled == self.bank_size", "current.filled >= self.bank_size - 1", "models/heads_test.py"),
  Mutation("the views of a text enter the bank in order", "models/heads/bank.py",
           "in reversed(queries)", "in queries",
           "weights/golden_test.py::test_declips_bank_stores_both_texts"),
  Mutation("the last end-of-text token", "models/text.py",
           "jnp.argmax(tokens == self.eot, axis=-1)",
           "tokens.shape[1] - 1 - jnp.argmax(tokens[:, ::-1] == self.eot, axis=-1)", "models/text_test.py"),
  Mutation("several hosts trim to the shortest of their longest texts", "training/trimming.py",
           "jax.jit(jnp.max,", "jax.jit(jnp.min,", "training/trimming_test.py"),
  Mutation("trimming ignores which positions are predicted", "training/trimming.py",
           'if "mlm_position" in batch', "if False", "training/trimming_test.py"),
  Mutation("a later program counts as compiled", "runtime/clock.py",
           "return self._program in self._compiled", "return bool(self._compiled)", "loop_test.py"),
  Mutation("texts see what follows", "models/text.py", "causal=self.causal", "causal=False", "models/text_test.py"),
  Mutation("SigLIP's texts do not see what follows", "models/text.py", "causal=self.causal", "causal=True", _SIGLIP),
  Mutation("SigLIP's texts have the feature of their first token", "models/text.py",
           "states[:, -1]", "states[:, 0]", _SIGLIP),
  Mutation("SigLIP's pooling has no residual branch", "models/vit.py",
           "return attended + dense(width", "return dense(width", _SIGLIP),
  Mutation("SigLIP's GELU is the exact one", "models/transformer.py",
           "jax.nn.gelu(x, approximate=True)", "jax.nn.gelu(x, approximate=False)", _SIGLIP),
  Mutation("big_vision's kernels of attention are not transposed", "weights/big_vision.py",
           "part.reshape(len(part), -1).T", "part.reshape(len(part), -1)", _SIGLIP),
  Mutation("epsilon of the text tower's last norm", "models/text.py",
           "nn.LayerNorm(epsilon=self.epsilon,", "nn.LayerNorm(epsilon=1e-6,", "models/text_test.py"),
  Mutation("image tokens one position early", "models/vit.py",
           "x[:, int(self.has_class_token) :]", "x[:, : x.shape[1] - int(self.has_class_token)]",
           "models/vit_test.py"),
  Mutation("constant of QuickGELU", "models/transformer.py", "1.702 * x", "1.7 * x",
           "weights/golden_test.py::test_openai"),
  Mutation("heads of queries, keys and values mixed", "models/transformer.py",
           '"f (three h e) -> three f h e"', '"f (h three e) -> three f h e"',
           "weights/golden_test.py::test_openai"),
  Mutation("running variance is the biased one", "models/batch_norm.py",
           "(count / max(count - 1, 1))", "1.0", _BATCH_NORM),
  Mutation("momentum of running statistics swapped", "models/batch_norm.py",
           "self.momentum * running.value + (1 - self.momentum) *",
           "(1 - self.momentum) * running.value + self.momentum *",
           _BATCH_NORM),
  Mutation("epsilon of batch norms", "models/batch_norm.py",
           "epsilon: float = 1e-5", "epsilon: float = 1e-4", _BATCH_NORM),
  Mutation("mean and deviation of pixels swapped", "models/towers.py",
           "for x in (self.mean, self.std))\n    return (images.astype",
           "for x in (self.std, self.mean))\n    return (images.astype",
           "models/towers_test.py"),
  Mutation("hidden patches by the biased variance", "models/towers.py", "ddof=1", "ddof=0", "models/towers_test.py"),
  Mutation("the end of a text counts as padding", "models/towers.py",
           "<= self.text.end(tokens)", "< self.text.end(tokens)", "models/towers_test.py"),
  Mutation("no gradient beyond the largest scale", "models/heads/joint.py",
           "scale - jax.lax.stop_gradient(jnp.maximum(scale - self.max_scale, 0))",
           "jnp.minimum(scale, self.max_scale)",
           "weights/golden_test.py::test_the_forward_clamp_of_the_temperature_keeps_the_gradient"),
  Mutation("adapters are scaled by alpha", "models/lora.py", "return self.alpha / self.rank", "return self.alpha",
           "models/lora_test.py"),
  Mutation("adapters of other parts of the packed kernel", "models/lora.py",
           "len(parts)) for target in parts]", "len(parts)) for target in parts[::-1]]", "models/lora_test.py"),
  Mutation("adapters are frozen", "models/lora.py", " and not _is_adapter(path)]", "]", "models/lora_test.py"),
  # Training.
  Mutation("biases decay", "training/optim.py",
           '_all_except(params, ("bias", "scale", *TEMPERATURES))',
           '_all_except(params, ("scale", *TEMPERATURES))', _OPTIM),
  Mutation("DeCLIP's biases do not decay", "training/optim.py",
           "jax.tree.map(operator.or_, packed,", "jax.tree.map(operator.and_, packed,", _OPTIM),
  Mutation("stacked layers share a rate of LARS", "training/optim.py",
           "range(int(is_stacked(path)), param.ndim)", "range(param.ndim)", _OPTIM),
  Mutation("layer-wise decay off by one", "training/optim.py",
           "np.arange(depth, 0, -1)", "np.arange(depth - 1, -1, -1)", _OPTIM),
  Mutation("warm-up one step longer", "training/schedules.py",
           "step / max(warmup - 1, 1)", "step / max(warmup, 1)", "training/schedules_test.py"),
  Mutation("DeCLIP's cosine one step later", "training/schedules.py",
           "settings.warmup - 1, settings.total_steps - 1)", "settings.warmup, settings.total_steps - 1)",
           "training/schedules_test.py"),
  Mutation("milestones counted from 0", "training/schedules.py",
           "{step - 1: factor", "{step: factor", "training/schedules_test.py"),
  Mutation("a gradient that is not finite is taken", "training/step.py",
           "jnp.isfinite(loss) & jnp.isfinite(gradient_norm) &", "jnp.isfinite(loss) &", _STEP),
  Mutation("an update that is not finite is taken", "training/step.py",
           "jnp.where(good & jnp.isfinite(new), new, old)", "jnp.where(good, new, old)", _STEP),
  Mutation("a spike is not skipped", "training/step.py",
           "jnp.isfinite(learning_rate) & ~spike", "jnp.isfinite(learning_rate)", _STEP),
  Mutation("consecutive skipped steps never end", "training/step.py",
           'jnp.where(good, 0, state.skipped["in_a_row"] + 1)', 'state.skipped["in_a_row"] + ~good',
           _STEP),
  Mutation("spikes are detected one step late", "training/step.py",
           "(measured >= _SPIKE_WINDOW)", "(measured > _SPIKE_WINDOW)", _STEP),
  Mutation("the sum over micro-batches, not their mean", "training/gradient.py",
           "sum_ + new / micro_batches", "sum_ + new", "training/gradient_test.py"),
  Mutation("all views of an image are drawn alike", "training/augment.py",
           "draw(jax.random.fold_in(example, view), ", "draw(example, ", "training/augment_test.py"),
  Mutation("the last of equal axes is split", "sharding.py", "(shape[axis], -axis)", "(shape[axis], axis)",
           "sharding_test.py"),
  Mutation("CutMix's labels have the weight before the box is clipped", "training/mixing.py",
           "drawn.cuts, mask.mean(), ", "drawn.cuts, drawn.kept, ", "training/mixing_test.py"),
  Mutation("each image is its own partner", "training/mixing.py",
           "images[::-1].astype", "images.astype", "training/mixing_test.py"),
  Mutation("branches that are kept do not make up for others", "training/drop_path.py",
           "bernoulli(key, kept) / kept", "bernoulli(key, kept) / 1.0", "training/drop_path_test.py"),
  Mutation("the same patches of all views are kept", "training/patch_dropout.py",
           "jax.random.uniform(key, (*shape, patches))",
           "jnp.tile(jax.random.uniform(key, (shape[0], 1, patches)), (1, shape[1], 1))",
           "training/patch_dropout_test.py"),
  Mutation("kept patches are off by one", "models/vit.py",
           "jnp.pad(kept + 1, ((0, 0), (1, 0)))", "jnp.pad(kept, ((0, 0), (1, 0)))", "models/vit_test.py"),
  # Data.
  Mutation("HTML is decoded once", "data/text/cleaning.py",
           "html.unescape(_with_short_numbers(html.unescape(_with_short_numbers(text))))",
           "html.unescape(_with_short_numbers(text))", _TOKENIZER),
  Mutation("texts are cut one token early", "data/text/tokenizer.py",
           "*ids[: self._most], self.eot", "*ids[: self._most - 1], self.eot", _TOKENIZER),
  Mutation("random words may be special tokens", "data/text/tokenizer.py",
           "ids += ids >= index", "ids += ids > index", f"{_TOKENIZER} {_TEXTS}"),
  Mutation("positions of masked tokens off by one", "data/text/augment.py",
           "selected = first + np.flatnonzero(rng", "selected = np.flatnonzero(rng", _TEXTS),
  Mutation("too many tokens become the mask", "data/text/augment.py",
           "np.where(fate < 0.8, tokenizer.mask", "np.where(fate < 0.9, tokenizer.mask", _TEXTS),
  Mutation("a word is swapped with itself", "data/text/augment.py", "    j += j >= i\n", "", _TEXTS),
  Mutation("two deviations of slots", "data/text/augment.py", "3 * math.sqrt(n", "2 * math.sqrt(n", _TEXTS),
  Mutation("sources share their permutation", "data/mixture.py",
           "seed=hashed(seed, number)", "seed=hashed(seed, 0)", _PIPELINE),
  Mutation("the larger of two numbers of samples is held out", "data/sources/heldout.py",
           "cut = min(", "cut = max(", "data/sources/heldout_test.py"),
  Mutation("damaged TFRecord data are read", "data/storage/tfrecords.py",
           "if not _is_intact(data,", "if False and not _is_intact(data,",
           "data/storage/tfrecords_test.py data/sources/tfrecord_test.py"),
  Mutation("negative integers of an Example are large", "data/storage/tf_examples.py",
           "if number >= 2**63 else", "if number >= 2**64 else", "data/storage/tf_examples_test.py"),
  Mutation("a feature of an Example may be defined twice", "data/storage/tf_examples.py",
           "    if key in found:", "    if False and key in found:", "data/storage/tf_examples_test.py"),
  Mutation("a slice of a TFDS split starts at its file", "data/sources/tfds.py",
           "start + part.skip + part.take", "start + part.take", "data/sources/tfds_test.py"),
  Mutation("chosen images share the index of all", "data/sources/webdataset.py",
           "version = _INDEX_FORMAT if images == _IMAGES else [_INDEX_FORMAT, images]", "version = _INDEX_FORMAT",
           "data/sources/webdataset_test.py"),
  Mutation("each machine converts all files", "data/convert.py",
           "range(part.index, shards, part.count)", "range(shards)", "data/convert_test.py"),
  Mutation("snapshots of the hub are mixed", "data/guess.py",
           "if not names and (snapshot := _snapshot(folder)):", "if not names and (snapshot := None):",
           "data/inspect_test.py"),
  Mutation("a resumed stream repeats a sample", "data/pipeline.py",
           "samples[self._next_index :]", "samples[max(self._next_index - 1, 0) :]", _PIPELINE),
  Mutation("hosts read the same samples", "data/readers.py",
           "((batch * self.hosts + self.host) * self.count", "(batch * self.hosts * self.count", _PIPELINE),
  Mutation("height and width of a crop swapped", "data/images/geometry.py",
           "round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))",
           "round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))", "data/images_test.py"),
  Mutation("the centre is rounded down", "data/images/geometry.py",
           "return round((whole - part) / 2)", "return (whole - part) // 2", "data/images_test.py"),
  Mutation("blocks of patches may exceed their number", "data/patches.py",
           "new if len(new) <= missing else rng.choice(new, missing, replace=False)", "new", "data/patches_test.py"),
  Mutation("squashed crops have the aspect ratio of others", "data/images/geometry.py",
           "relative = (ratio[0] * width / height, ratio[1] * width / height)", "relative = ratio",
           "data/images_test.py"),
  # Evaluation and weights.
  Mutation("results of the last batch are fetched twice", "evals/features.py",
           "left = max(left - len(pending[0][\"label\"]), 0)", "left = len(rows)", "evals/features_test.py"),
  Mutation("labels of a source are taken for classes", "evals/features.py",
           "np.where(label < 0, -1, self.classes[label])", "np.where(label < 0, -1, label)", "evals/features_test.py"),
  Mutation("a source is encoded for each evaluation", "evals/jobs.py",
           "if id(source) not in features:", "if True:", "evals/evaluation_test.py"),
  Mutation("the view does not change the features", "evals/feature_cache.py",
           "**half, \"view\": view}", "**half}", "evals/feature_cache_test.py"),
  Mutation("features in float16 are those in float32", "evals/feature_cache.py",
           "**data, **half,", "**data,", "evals/feature_cache_test.py"),
  Mutation("texts of other weights count", "evals/text_cache.py",
           "\"weights\": weights, ", "", "evals/text_cache_test.py"),
  Mutation("a mixture has the share of the other weights", "weights/interpolate.py",
           "(1 - share) * start + share * end", "share * start + (1 - share) * end", "weights/interpolate_test.py"),
  Mutation("the time of fits counts as that of encoding", "reporting/progress.py",
           "self._bar.start_t += seconds", "self._bar.start_t += 0", "reporting/progress_test.py"),
  Mutation("damaged features are read", "evals/feature_cache.py",
           "if checksum != zlib.crc32", "if 0 > zlib.crc32", "evals/feature_cache_test.py"),
  Mutation("an entry is continued a block too late", "evals/feature_cache.py",
           "min(self._done * BLOCK, self._count)", "min((self._done + 1) * BLOCK, self._count)",
           "evals/feature_cache_test.py"),
  Mutation("features in use are removed", "evals/feature_cache.py",
           "if entry not in used and", "if", "evals/feature_cache_test.py"),
  Mutation("results of other weights count", "evals/evaluation.py",
           "[self.model.weights[\"hash\"], ", "[", "evals/evaluation_test.py"),
  Mutation("results of other options count", "evals/evaluation.py",
           "job.kind, job.options, data", "job.kind, data", "evals/evaluation_test.py"),
  Mutation("a probe sees features after the projection", "evals/probes.py",
           "found.pooled if kind == \"pooled\"", "found.embedding if kind == \"pooled\"", "evals/probes_test.py"),
  Mutation("the metric of the data set is not the headline", "evals/scoring.py",
           "[data.metric] if data.metric else []", "[]", "evals/probes_test.py"),
  Mutation("a mean lacks a data set", "evals/catalogue.py",
           "if not all(key in values for key in keys):", "if not any(key in values for key in keys):",
           "evals/suites_test.py"),
  Mutation("few shots are averaged over unequal numbers of images", "evals/catalogue.py",
           "used = [key for key in keys if sizes.get(key) == most]", "used = list(keys)", "evals/suites_test.py"),
  Mutation("a mean in a report is over unequal numbers of neighbours", "evals/report/compared.py",
           "in sizes.items() if size == most]", "in sizes.items()]", "evals/report_test.py"),
  Mutation("published scores are compared with ours by other prompts", "evals/report/published.py",
           "if prompts == row.prompts or not row.prompts:", "if True:", "evals/report_test.py"),
  Mutation("no bootstrapped p-value is below 0.001", "evals/comparison.py",
           "max(normal, 2.0 ** (1 - examples))", "max(normal, 0.001)", "evals/comparison_test.py"),
  Mutation("a line without a slope gives stars", "evals/report/shifts.py",
           "return not self.doubts and not", "return not", "evals/report_test.py"),
  Mutation("effective robustness has no error of the test images", "evals/robustness.py",
           "if ends is None:", "if True:", "evals/robustness_test.py"),
  Mutation("the worst group is called the best", "evals/report/groups.py",
           "return max(self.scores, key", "return min(self.scores, key", "evals/groups_test.py"),
  Mutation("ties count in favour of the model", "evals/ranks.py", "~(scores < best)", "(scores > best)", _RANKS),
  Mutation("recall at k is that at k + 1", "evals/ranks.py", "(rank < k)", "(rank <= k)", _RANKS),
  Mutation("folds are searched together", "evals/ranks.py",
           "np.where(query_fold[:, None] == key_fold, relevance, np.int8(_EXCLUDED))", "relevance", _RANKS),
  Mutation("images without a text are candidates", "evals/ranks.py",
           "images, owner = np.unique(image_of_text, return_inverse=True)",
           "images, owner = np.arange(num_embeddings(image)), image_of_text", _RANKS),
  Mutation("equal scores of captions are right", "evals/composition.py",
           '"accuracy": right > wrong', '"accuracy": right >= wrong', "evals/composition_test.py"),
  Mutation("an image is its own duplicate", "evals/overlap.py",
           " & (first + number != own[:, None])", "", "evals/overlap_test.py"),
  Mutation("the accuracy on all images is the null hypothesis", "evals/overlap.py",
           'binomtest(hits, number, found["accuracy_clean"]', 'binomtest(hits, number, found["accuracy_all"]',
           "evals/overlap_test.py"),
  Mutation("classes without an image count", "evals/metrics.py",
           "sum(axis=-1) / present.sum(axis=-1)", "mean(axis=-1)", _METRICS),
  Mutation("a true class whose logit is NaN is right", "evals/metrics.py",
           "np.where(np.isnan(own[:, 0]), classes, before.sum(axis=1))", "before.sum(axis=1)", _METRICS),
  Mutation("groups without examples count", "evals/metrics.py",
           "hits / np.maximum(totals, 1), np.inf)", "hits / np.maximum(totals, 1), 0)", _METRICS),
  Mutation("difficult objects are ranked", "evals/metrics.py",
           "labels[:, index] != 0", "labels[:, index] < 5", _METRICS),
  Mutation("tied pairs count as right", "evals/metrics.py", "negatives / 2", "negatives", _METRICS),
  Mutation("distinct examples are drawn alike", "evals/intervals.py",
           "part / part.sum(), size", "np.full(len(part), 1 / len(part)), size", "evals/intervals_test.py"),
  Mutation("classes are not resampled apart", "evals/intervals.py",
           "np.split(number, ends[:-1])", "np.split(number, [])", "evals/intervals_test.py"),
  Mutation("no model is extrapolated", "evals/robustness.py",
           "np.less(accuracy, self.lowest)", "np.less(accuracy, 0)", "evals/robustness_test.py"),
  Mutation("scores that were not measured are extrapolated", "evals/scaling.py",
           "np.where(reached.any(axis=1), between, np.inf)", "between", "evals/scaling_test.py"),
  Mutation("prompts are averaged before they are normalised", "evals/prompts.py",
           "unit = unit_rows(embedding)", "unit = embedding", "evals/prompts_test.py"),
  Mutation("classifiers are not of unit length", "evals/prompts.py",
           "return unit_rows(np.stack([unit[own].mean(axis=0, dtype=np.float64) for own in rows]))",
           "return np.stack([unit[own].mean(axis=0, dtype=np.float64) for own in rows])", "evals/prompts_test.py"),
  Mutation("two classes are a softmax", "evals/linear_probe.py",
           "tuple(present) if len(present) == 2 else None", "None", _PROBE),
  Mutation("of equal scores the largest strength is chosen", "evals/linear_probe.py", "score, -index)", "score, index)",
           _PROBE),
  Mutation("the bias is that of centred features", "evals/linear_probe.py",
           "bias = bias - self.axes.mean.astype(np.float64) @ kernel", "pass", _PROBE),
  Mutation("the penalty does not depend on the number of rows", "evals/logistic_regression.py",
           "1 / (strength * _count(inputs.data.target))", "1 / strength", _PROBE),
  Mutation("classes without training rows are answered", "evals/logistic_regression.py",
           "logits = jnp.where(answered[None, None], logits, -jnp.inf)", "pass", _PROBE),
  Mutation("a vector that all classes have in common remains", "evals/logistic_regression.py",
           "x - _mean(x, inputs.answered)", "x", _PROBE),
  Mutation("nearest neighbours have equal weights", "evals/nearest.py",
           "+= weight[:, place]", "+= 1", "evals/nearest_test.py"),
  Mutation("rows without a label are searched", "evals/nearest.py",
           "jnp.where(number[None] >= 0, everyone @ keys.T, -jnp.inf)", "everyone @ keys.T", "evals/nearest_test.py"),
  Mutation("columns of a ridge regression are not centred", "evals/few_shot.py",
           "(x - mean) / std", "x / std", "evals/few_shot_test.py"),
  Mutation("the learning rate of an SGD probe changes in each step", "evals/sgd_probe.py",
           "if recipe.cosine_by_epoch else steps", "if False else steps", "evals/sgd_probe_test.py"),
  Mutation("a run is read without its adapters", "weights/read.py",
           "params = jax.device_get(merge(params, lora)) if lora else params", "params = params",
           "finetune_pairs_test.py"),
  # Protocols.
  Mutation("classes are matched by their position", "evals/suites.py",
           "found = {name: align(entry, source.classnames, specs[name]) for name, source in sources.items()}",
           "found = {name: np.arange(len(source.classnames)) for name, source in sources.items()}",
           "evals/suites_test.py"),
  Mutation("hyperparameters are chosen on the test split", "evals/probes.py",
           "val=_labelled(data.val, features)", "val=found.test", _PROTOCOLS),
  Mutation("a probe under shift answers other classes", "evals/probes.py",
           "logits if data.parent is None else merge_classes(logits, data.parent.ids)",
           "logits if data.parent is None else logits[:, : len(data.classnames)]", "evals/shifts_test.py"),
  Mutation("a probe under shift is trained on its classes alone", "evals/suites.py",
           "if len(parent.classes) == len(entry.classes) or", "if True or", "evals/shifts_test.py"),
  Mutation("a fine-tuned model answers the first of its classes", "evals/classify.py",
           "merge_classes(logits, found)", "logits[:, : len(found)]", "evals/classify_test.py"),
  Mutation("classes that are merged have the mean of their logits", "evals/metrics.py",
           "logits[:, list(own)].max(axis=1, initial=-np.inf)", "logits[:, list(own)].mean(axis=1)", _PROTOCOLS),
  Mutation("synonyms of a class do not count", "evals/catalogue.py",
           "for one in same) for same in names)", "for one in same[:1]) for same in names)", _PROTOCOLS),
  Mutation("the last of equal logits is answered", "evals/metrics.py",
           "np.arange(classes) < label[:, None]", "np.arange(classes) > label[:, None]", _PROTOCOLS),
  Mutation("Kinetics is the top-5 accuracy", "evals/metrics.py",
           "(accuracy(top1, times) + accuracy(top5, times)) / 2", "(accuracy(top5, times) + accuracy(top5, times)) / 2",
           _PROTOCOLS),
  Mutation("the score of two classes is one logit", "evals/scoring.py",
           "logits[:, 1].astype(np.float64) - logits[:, 0]", "logits[:, 1].astype(np.float64)", _PROTOCOLS),
  Mutation("average precision at 101 recalls", "evals/metrics.py",
           "np.linspace(0, 1, 11) - 1e-12", "np.linspace(0, 1, 101) - 1e-12", _PROTOCOLS),
  Mutation("cosines of different images are compared", "evals/zero_shot.py",
           "logits = log_softmax(_SCALE * logits.astype(np.float64), axis=1)", "pass", _PROTOCOLS),
  Mutation("images of ImageNet-ReaL without labels count", "evals/scoring.py",
           "rows = _rows(used & (labels > 0).any(axis=1))", "rows = np.arange(len(labels))", _PROTOCOLS),
  Mutation("an image has to find all of its texts", "evals/ranks.py",
           "jnp.where(relevance == _MATCH, scores, -jnp.inf).max(axis=1, keepdims=True)",
           "jnp.where(relevance == _MATCH, scores, jnp.inf).min(axis=1, keepdims=True)", _PROTOCOLS),
  Mutation("the nearest mean may be that of no rows", "evals/nearest.py",
           "np.where(counts > 0, cosine, -np.inf)", "cosine", _PROTOCOLS),
  Mutation("Winoground's ties are right", "evals/composition.py",
           "(own > other_text).all(axis=1)", "(own >= other_text).all(axis=1)", "evals/composition_test.py"),
  Mutation("WinoGAViL's ties are right", "evals/composition.py",
           "(~(scores < scores[:, None])).sum(axis=1) - 1", "(scores > scores[:, None]).sum(axis=1)",
           "evals/composition_test.py"),
  # The search page.
  Mutation("subtracted terms of a query are added", "image_search/searcher.py",
           "total = _sum(added) - _sum(subtracted)", "total = _sum(added) + _sum(subtracted)", _SEARCH),
  Mutation("images that cannot be read are found", "image_search/index.py",
           "embedding, np.flatnonzero(readable)", "embedding, np.arange(len(readable))", "image_search/index_test.py"),
  Mutation("a short text is cut although it is long", "image_search/searcher.py",
           "tokens[:, :_SHORT] if is_short else tokens", "tokens[:, :_SHORT]", _SEARCH),
  Mutation("a site whose name leads to this machine is answered", "image_search/requests.py",
           "if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):", "if len(hosts) != 1:", _SEARCH),
  Mutation("each byte of a request prolongs it", "image_search/server.py",
           "left = self._deadline - time.monotonic()", "left = _SECONDS", _SEARCH),
  Mutation("linear layers are not transposed", "weights/layout.py",
           '"linear": (_transposed, _transposed)', '"linear": (_same, _same)', _WEIGHTS),
  Mutation("height and width of kernels swapped", "weights/layout.py",
           "return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])",
           "return x.transpose(3, 2, 1, 0).reshape(-1, x.shape[0])",
           _WEIGHTS),
  Mutation("DeCLIP's special tokens in its own order", "weights/dialects.py",
           '"to": [1, 2, 0]', '"to": [0, 1, 2]', _WEIGHTS),
  Mutation("the activation of SigLIP's trunks of timm", "weights/model_configs.py",
           '"gelu" if kind in EXACT_IN_TIMM', '"gelu" if kind in TANH_IN_TIMM', "weights/model_configs_test.py"),
  Mutation("SigLIP's pictures are cropped", "weights/model_configs.py",
           '"do_center_crop": False', '"do_center_crop": True', _SIGLIP),
  Mutation("SigLIP's padding is that of other tokenizers", "data/text/tokenizer.py",
           'ids["pad"] or 0, encoder', "0, encoder", _TOKENIZER),
  Mutation("Hugging Face's end of text is taken as it is", "weights/model_configs.py",
           "if eot == 2 and kind ==", "if eot == -2 and kind ==",
           "weights/model_configs_test.py"),
  Mutation("the largest id as the end of text", "weights/recognise.py",
           "eot=OPENAI_EOT if vocab_size in OPENAI_VOCABULARIES else vocab_size - 1",
           "eot=vocab_size - 1", "weights/read_test.py"),
  Mutation("an activation that the file does not tell is guessed", "weights/recognise.py",
           'kind == "torch" else None', 'kind == "torch" else "gelu"', "weights/read_test.py"),
  Mutation("an end of text that the file does not tell is guessed", "weights/recognise.py",
           'if "text" in sides and model["text"]["vocab_size"] not in OPENAI_VOCABULARIES:', "if False:",
           "weights/read_test.py"),
  Mutation("an index of weights names files of other folders", "weights/tensor_files.py",
           r"[\w-][\w.-]*", r"[\w./-]*", "weights/tensor_files_test.py"),
  Mutation("a file has other tensors than its index says", "weights/tensor_files.py",
           "if wrong := found.tensors.keys() ^", "if wrong := set() and found.tensors.keys() ^",
           "weights/tensor_files_test.py"),
  Mutation("a negative view is read with the wrong sign", "weights/tensor_files.py",
           "array = -array", "array = +array", "weights/tensor_files_test.py"),
  Mutation("weights on the hub are downloaded before their configs are checked", "weights/hub.py",
           "if folder and name == weights[0]:", "if False:", "weights/hub_test.py"),
  Mutation("a user sees each attempt to reach the hub", "weights/hub.py",
           "return not _RETRIES.search(record.getMessage())", "return True", "weights/hub_test.py"),
  Mutation("an interrupted download counts as a model in the cache", "weights/hub.py",
           "[*parts, file]", "[file, *parts]", "weights/hub_test.py"),
  Mutation("a repository is public although nobody asked for it", "weights/hub.py",
           "private=not public", "private=False", "weights/push_test.py"),
  Mutation("an upload replaces a model card that was edited", "weights/hub.py",
           "[CARD] if is_kept else None", "None", "weights/push_test.py"),
  Mutation("a model card has results of other steps", "model_card.py",
           "== (weights_hash, view)]", "!= ()]", "weights/push_test.py"),
  Mutation("embeddings of an interrupted command are computed again", "embed.py",
           "if part.images.exists():", "if False:", "embed_test.py"),
  Mutation("each machine writes all embeddings", "embed.py",
           "[shard.index :: shard.count]", "[:]", "embed_test.py"),
  Mutation("integers become weights", "weights/read.py",
           "elif key in expected and tensor.dtype not in _FLOATS:", "elif False:", "weights/read_test.py"),
  Mutation("a typo in OpenAI's mean", "architectures.py", "0.4578275", "0.4587275", "config_test.py"),
  Mutation("durations are rounded down", "config.py",
           "math.ceil(examples / batch_size)", "math.floor(examples / batch_size)", "config_test.py"),
  # Running.
  Mutation("a run that resumes chooses its batch anew", "planning/choose.py",
           "if value is not None}", "if False}", "planning/choose_test.py"),
  Mutation("warm-up of a try is that of the run", "planning/choose.py",
           "scaled(schedule.warmup)", "schedule.warmup", "planning/choose_test.py"),
  Mutation("a resumed run is a new one for trackers", "reporting/trackers/base.py",
           "if start and path.exists()", "if not start and path.exists()", "reporting/trackers_test.py"),
  Mutation("trackers receive every picture again", "reporting/metrics.py",
           "if before.get(path) != written:", "if True:", "reporting/trackers_test.py"),
  Mutation("a tracker learns that a killed run has finished", "reporting/metrics.py",
           "self.close(finished=kind is None)", "self.close()", "reporting/trackers_test.py"),
  Mutation("a slow tracker delays the run", "reporting/trackers/background.py",
           "self._calls.put_nowait(call)", "self._calls.put(call, timeout=2)", "reporting/trackers_test.py"),
  Mutation("each stage reads its input from the start", "train.py",
           "_open_batches(run, part, position)) as batches", "_open_batches(run, part, None)) as batches",
           "stages_test.py"),
  Mutation("the schedule of a stage starts with the run", "build.py",
           "own.batches(own.since) - own.since - stage.first", "own.batches(own.since) - own.since", "stages_test.py"),
  Mutation("examples of earlier batches of another size do not end a stage", "stages.py",
           "own.step(examples)", "begin + -(-examples_of(of_stage.duration, epoch_examples) // of_stage.batch_size)",
           "stages_test.py"),
  Mutation("usual gradient norms of the stage before", "training/step.py",
           "jnp.where(state.step == first_step, 0,", "jnp.where(state.step < first_step, 0,", "stages_test.py"),
  Mutation("small images train the first position embeddings", "models/positions.py",
           "resized.reshape(size - first, -1)])", "positions[first:size]])", "models/positions_test.py"),
  Mutation("ONNX takes the other branch", "weights/onnx_primitives.py",
           '"Where", condition, yes, no', '"Where", condition, no, yes', _ONNX),
  Mutation("ONNX embeddings are not of unit norm", "weights/write.py",
           "return unit_norm(model.text_features(**params, tokens=tokens))",
           "return model.text_features(**params, tokens=tokens)", _ONNX),
  Mutation("ONNX repeats the first layer", "weights/onnx_primitives.py",
           "constant(tensor.content[index])", "constant(tensor.content[0])", _ONNX),
  Mutation("ONNX windows are averaged", "weights/onnx_primitives.py",
           "constant(np.float32(math.prod(window)))", "constant(np.float32(1))", _ONNX),
  Mutation("the worst checkpoints are kept", "runtime/retention.py",
           "not math.isnan(score)), reverse=True)", "not math.isnan(score)))", "runtime/checkpoint_test.py"),
  Mutation("the last checkpoint of an interval is kept", "runtime/retention.py",
           "for checkpoint in checkpoints), reverse=True)", "for checkpoint in checkpoints))",
           "runtime/checkpoint_test.py"),
  Mutation("a rollback goes too far", "runtime/rollback.py", "if step <= healthy]", "if step < healthy]",
           "runtime/rollback_test.py"),
  Mutation("the oldest checkpoint is restored", "runtime/checkpoint.py",
           "for step in reversed(self.steps()):", "for step in self.steps():", "runtime/checkpoint_test.py"),
]
# fmt: on


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("words", nargs="*", help="choose mutations by their file or subject")
  parser.add_argument("--all", action="store_true", help="run all fast tests for each mutation")
  parser.add_argument(
    "--check", action="store_true", help="only check that every mutation still applies to the package"
  )
  parser.add_argument("--jobs", type=int, default=2, help="mutations at the same time")
  parser.add_argument("--no-baseline", action="store_true", help="do not check that the tests pass without a mutation")
  arguments = parser.parse_args()
  chosen = [m for m in MUTATIONS if not arguments.words or any(w in f"{m.file} {m.subject}" for w in arguments.words)]
  check(chosen)
  if arguments.check:
    return
  with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
    copies: queue.Queue[Path] = queue.Queue()
    for number in range(arguments.jobs):
      copies.put(copy(Path(folder) / str(number)))

    def run(mutation: Mutation | None, tests: Sequence[str]) -> str:
      place = copies.get()
      try:
        return outcome(place, mutation, tests)
      finally:
        copies.put(place)

    with ThreadPoolExecutor(arguments.jobs) as pool:
      if not arguments.no_baseline:
        tests = sorted({test for mutation in chosen for test in mutation.tests.split()})
        passed = pool.map(lambda test: run(None, [test]) == "survived", tests)
        bad = [test for test, ok in zip(tests, passed, strict=True) if not ok]
        if bad:
          sys.exit(f"These fail without any mutation: {bad}")
      started = time.monotonic()
      outcomes = pool.map(lambda m: run(m, [""] if arguments.all else m.tests.split()), chosen)
      missed = report(chosen, outcomes)
  caught, seconds = len(chosen) - len(missed), time.monotonic() - started
  print(f"\n{caught} of {len(chosen)} caught, in {seconds:.0f} seconds. Missed: {', '.join(missed) or 'none'}")
  sys.exit(caught < LEAST_CAUGHT * len(chosen))


def check(mutations: Sequence[Mutation]) -> None:
  """Exits if a mutation no longer applies to the package, or names tests that do not exist."""
  wrong = []
  for mutation in mutations:
    path = ROOT / "declip_jax" / mutation.file
    found = path.read_text().count(mutation.old) if path.exists() else 0
    if found != 1:
      wrong.append(f"{mutation.file}: {mutation.old!r} occurs {found} times ({mutation.subject})")
    wrong += [
      f"no file tests/{test} ({mutation.subject})"
      for test in mutation.tests.split()
      if not (ROOT / "tests" / test.split("::")[0]).exists()
    ]
  if wrong:
    sys.exit("\n".join(["Update MUTATIONS of tools/mutate.py:", *wrong]))


def copy(folder: Path) -> Path:
  """A copy of the repository's files that tests read."""
  folder.mkdir(parents=True)
  ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "interop")
  for path in ROOT.iterdir():
    if path.name in COPIED:
      shutil.copytree(path, folder / path.name, symlinks=True, ignore=ignored)
    elif path.is_file():
      shutil.copy2(path, folder)
  return folder


def outcome(folder: Path, mutation: Mutation | None, tests: Sequence[str]) -> str:
  """Runs tests in a copy with a mutation, and undoes it: "caught", "survived", or "broken" if no test could run."""
  path = folder / "declip_jax" / mutation.file if mutation else None
  if path:
    original = path.read_text()
    _write(path, original.replace(mutation.old, mutation.new))
  # Mutated programs do not enter the compile cache; the others come from it.
  environment = os.environ | {
    "PYTHONPATH": str(folder),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9",
  }
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
  try:
    paths = [str(folder / "tests" / test) for test in tests]
    process = subprocess.run([*command, *paths], cwd=folder, env=environment, capture_output=True, text=True)
  finally:
    if path:
      _write(path, original)
  return {0: "survived", 1: "caught"}.get(process.returncode, "broken")


def _write(path: Path, source: str) -> None:
  """Writes a module and deletes its bytecode, which would count as current within a second of the last change."""
  path.write_text(source)
  for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
    compiled.unlink()


def report(mutations: Sequence[Mutation], outcomes: Iterable[str]) -> list[str]:
  """Prints a line for each mutation as soon as its outcome is known, and returns the subjects of those not caught."""
  missed = []
  for mutation, found in zip(mutations, outcomes, strict=True):
    print(f"{found:<9} {mutation.subject:<48} {mutation.file:<26} {mutation.tests}", flush=True)
    if found != "caught":
      missed.append(mutation.subject)
  return missed


if __name__ == "__main__":
  main()

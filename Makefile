# make demo          pretrains DeCLIP on rendered scenes (three to eight minutes on two cores)
# make test          the fast tests: four minutes on two cores
# make test-all      the fast tests, then the slow ones, which need neither other packages nor a GPU
# make test-interop  exchanges weights with PyTorch, open_clip and transformers, in .venv-interop
# make test-trackers tests Weights & Biases, MLflow and trackio, offline, in .venv-trackers
# make test-browser  the search page in Chromium, with usearch, in .venv-browser; SCREENSHOTS=FOLDER keeps pictures of it
# make chromium      installs Playwright's Chromium for it, where the system has none, and the libraries that it needs
# make test-wheel    the wheel, installed into empty environments without and with the extra train
# make wheel         builds the wheel into dist/
# make test-device   the tests that need a GPU or TPU; they are skipped where there is none
# make mutate        inserts bugs into a copy of the package, one at a time, and counts those that the fast tests catch
# make fuzz          reads 20,000 mutated folders of seven kinds: right tensors or a clear error; fifteen minutes
# make docs          builds the documentation into site/, in .venv-docs; fails with any warning, such as a dead link
# make docs-notebooks  executes the notebooks, whose outputs the next make docs shows; NOTEBOOKS="demo methods" only some
# make check         what CI runs: format, lint, types, fast tests, and slow tests until SLOW_SECONDS are over
# make bench-input   compares the input pipeline with torchvision and open_clip, in .venv-bench
# make bench-scale   memory and time of InfoNCE by each method for batches up to 128k, compared with open_clip's
# make bench-open-clip  compares CLIP's train step with open_clip's, in .venv-bench
# make bench-probe   compares the sweep of the linear probe with scikit-learn's, in .venv-bench
# make bench-clip-benchmark  compares evaluation with CLIP_benchmark, in .venv-clip-benchmark
# make released-weights  writes docs/released_weights.md, which released models are read, in .venv-interop: 40 minutes
# Each installs what it needs first. ARGS are further arguments, such as make test ARGS="tests/data -x".
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo

# Large pages for the arrays of a step: the demo takes a fifth less time. Only glibc reads this.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-slow test-all test-interop test-trackers test-browser chromium test-wheel test-device wheel fuzz \
	mutate docs docs-notebooks lint check clean

demo: $(VENV)/installed
	$(VENV)/bin/python -m declip_jax.train --config=demo --workdir $(RUN)

# Consecutive tests share what they have computed, so each core takes one half, and then what remains of the other's.
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist worksteal

test: $(VENV)/installed-dev
	$(PYTEST) -m "not slow" $(ARGS)

# One test at a time in the order of tests/conftest.py, most valuable first.
test-slow: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -n 2 --dist load --maxschedchunk 1 -m slow $(ARGS)

test-all: test test-slow

fuzz: $(VENV)/installed-dev
	$(PYTEST) tests/weights/reader_fuzz_test.py --mutations=20000 $(ARGS)

test-interop: $(VENV)-interop/installed
	$(VENV)-interop/bin/python -m pytest -n 2 tests/interop $(ARGS)

test-trackers: $(VENV)-trackers/installed
	$(VENV)-trackers/bin/python -m pytest tests/reporting/trackers_test.py $(ARGS)

test-browser: $(VENV)-browser/installed
	$(VENV)-browser/bin/python -m pytest tests/image_search $(ARGS)

chromium: $(VENV)-browser/installed
	$(VENV)-browser/bin/python -m playwright install --with-deps chromium

test-device: $(VENV)/installed-dev
	JAX_PLATFORMS= $(VENV)/bin/python -m pytest tests/device_test.py $(ARGS)

test-wheel: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest tests/wheel_test.py $(ARGS)

wheel: $(VENV)/installed-dev
	rm -rf build dist
	$(VENV)/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir=dist .

mutate: $(VENV)/installed-dev
	$(VENV)/bin/python tools/mutate.py $(ARGS)

# NO_MKDOCS_2_WARNING hides Material's notice that its maintenance ends in May 2027; it names Zensical as its successor.
# The hook imports tools.notebooks, which python -m finds.
docs: $(VENV)-docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict $(ARGS)

# Some of them download weights or data. Each runs in a folder of its own, so that nothing of an earlier run is left, with
# what it reads of a checkout; the one of the plan needs libtpu.
NOTEBOOKS ?= $(basename $(notdir $(wildcard colabs/*.ipynb)))

docs-notebooks: $(VENV)-docs/installed
	set -e; for name in $(NOTEBOOKS); do \
	  rm -rf runs/notebooks/$$name && mkdir -p runs/notebooks/$$name/colabs docs/notebooks; \
	  ln -s $(CURDIR)/configs $(CURDIR)/docs $(CURDIR)/setup.py runs/notebooks/$$name; \
	  cp colabs/$$name.ipynb runs/notebooks/$$name/colabs; \
	  (cd runs/notebooks/$$name/colabs && $(abspath $(VENV))-docs/bin/jupyter-execute --inplace $$name.ipynb); \
	  mv runs/notebooks/$$name/colabs/$$name.ipynb docs/notebooks; \
	done

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python tools/mutate.py --check
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python

SLOW_SECONDS ?= 360

check: lint test
	$(MAKE) test-slow ARGS="--stop-after=$(SLOW_SECONDS)"

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[train]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)-interop/installed: setup.py constraints.txt tests/interop/requirements.txt
	$(PYTHON) -m venv $(VENV)-interop
	$(VENV)-interop/bin/python -m pip install --quiet torch torchvision -c tests/interop/requirements.txt
	$(VENV)-interop/bin/python -m pip install --quiet -r tests/interop/requirements.txt
	$(VENV)-interop/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)-trackers/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)-trackers
	$(VENV)-trackers/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,wandb,mlflow]'
	$(VENV)-trackers/bin/python -m pip install --quiet -e '.[trackio]'  # replaces Pillow, see constraints.txt
	touch $@

$(VENV)-docs/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet -c constraints.txt -e '.[train,docs]'
	touch $@

$(VENV)-browser/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)-browser
	$(VENV)-browser/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,search]' playwright
	touch $@

.PHONY: released-weights
released-weights: $(VENV)-interop/installed $(VENV)-interop/big_vision
	$(VENV)-interop/bin/python benchmarks/released_weights.py $(ARGS)

$(VENV)-interop/big_vision: | $(VENV)-interop/installed
	rm -rf $@.part
	git clone --quiet https://github.com/google-research/big_vision $@.part
	git -C $@.part checkout --quiet 0127fb6b337ee2a27bf4e54dea79cff176527356
	mv $@.part $@

# Compared with torchvision and OpenAI's tokenizer; make bench-input ARGS="--quick" only shows that it works.
.PHONY: bench-input bench-open-clip bench-scale bench-probe bench-clip-benchmark
bench-input: $(VENV)-bench/installed
	$(VENV)-bench/bin/python benchmarks/input.py $(ARGS)

bench-open-clip: $(VENV)-bench/installed
	$(VENV)-bench/bin/python benchmarks/beside_open_clip.py $(ARGS)

bench-scale: $(VENV)/installed
	$(VENV)/bin/python benchmarks/scale.py $(ARGS)

bench-probe: $(VENV)-bench/installed
	$(VENV)-bench/bin/python benchmarks/linear_probe.py $(ARGS)

bench-clip-benchmark: $(VENV)-clip-benchmark/installed
	$(VENV)-clip-benchmark/bin/python benchmarks/beside_clip_benchmark.py $(ARGS)

$(VENV)-clip-benchmark/installed: setup.py constraints.txt tests/interop/requirements.txt
	$(PYTHON) -m venv $(VENV)-clip-benchmark
	$(VENV)-clip-benchmark/bin/python -m pip install --quiet torch -c tests/interop/requirements.txt
	$(VENV)-clip-benchmark/bin/python -m pip install --quiet -r tests/interop/requirements.txt
	$(VENV)-clip-benchmark/bin/python -m pip install --quiet -c constraints.txt -e '.[train]'
	$(VENV)-clip-benchmark/bin/python -m pip install --quiet 'numpy<2.4'  # its `accuracy` fails with later releases
	touch $@

$(VENV)-bench/installed: setup.py constraints.txt benchmarks/requirements.txt tests/interop/requirements.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet torch -c tests/interop/requirements.txt  # first: nothing else chooses
	$(VENV)-bench/bin/python -m pip install --quiet -r benchmarks/requirements.txt
	$(VENV)-bench/bin/python -m pip install --quiet -c constraints.txt -e '.[train]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-interop $(VENV)-bench $(VENV)-clip-benchmark $(VENV)-trackers $(VENV)-browser $(VENV)-docs runs site build dist

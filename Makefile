# make demo   installs into .venv and pretrains DeCLIP on the embedded scenes (a few minutes on two cores)
# make test   installs into .venv and runs the tests, without those of test-slow
# make test-interop  installs PyTorch, open_clip and transformers into .venv-interop and exchanges weights with them
# make bench-input  installs torchvision and open_clip into .venv-bench and measures the input pipeline beside them
# make bench-scale  prints memory and time of InfoNCE in each form for batches up to 128k, beside open_clip's forms
# make bench-open-clip  installs as bench-input and times CLIP's train step beside open_clip's
# make test-slow  runs the tests that take minutes each
# make check  what CI runs: formatting, lint, all tests
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo

# Large pages for the arrays of a step: the demo takes a fifth less time. Only glibc reads this.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-slow test-interop check clean

demo: $(VENV)/installed
	$(VENV)/bin/python -m declip_jax.train --config configs/demo.py --workdir $(RUN)

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -m slow

test-interop: $(VENV)-interop/installed
	$(VENV)-interop/bin/python -m pytest -n 2 tests/interop

check: $(VENV)/installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(MAKE) test
	$(MAKE) test-slow

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)-interop/installed: setup.py constraints.txt tests/interop/requirements.txt
	$(PYTHON) -m venv $(VENV)-interop
	$(VENV)-interop/bin/python -m pip install --quiet torch==2.13.0  # first, so that nothing else chooses another
	$(VENV)-interop/bin/python -m pip install --quiet -r tests/interop/requirements.txt
	$(VENV)-interop/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Beside torchvision and OpenAI's tokenizer; make bench-input ARGS="--quick" only shows that it works.
.PHONY: bench-input bench-open-clip bench-scale
bench-input: $(VENV)-bench/installed
	$(VENV)-bench/bin/python benchmarks/input.py $(ARGS)

bench-open-clip: $(VENV)-bench/installed
	$(VENV)-bench/bin/python benchmarks/beside_open_clip.py $(ARGS)

bench-scale: $(VENV)/installed
	$(VENV)/bin/python benchmarks/scale.py $(ARGS)

$(VENV)-bench/installed: setup.py constraints.txt benchmarks/requirements.txt tests/interop/requirements.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet torch -c tests/interop/requirements.txt  # first: nothing else chooses
	$(VENV)-bench/bin/python -m pip install --quiet -r benchmarks/requirements.txt
	$(VENV)-bench/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-interop $(VENV)-bench runs

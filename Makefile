# make demo   installs into .venv and pretrains DeCLIP on the embedded scenes (a few minutes on two cores)
# make test   installs into .venv and runs all tests
# make check  what CI runs: formatting, lint, tests
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo

# Large pages for the arrays of a step: the demo takes a fifth less time. Only glibc reads this.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test check clean

demo: $(VENV)/installed
	$(VENV)/bin/python -m declip_jax.train --config configs/demo.py --workdir $(RUN)

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -n 2

check: $(VENV)/installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(MAKE) test

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs

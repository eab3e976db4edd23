# `make demo` and `make test` first set up .venv when it is missing or out of date.
# In an environment that has the package already (a cluster's, a container's): make demo PYTHON=python

ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/.ready
# Stale too: an interpreter that is gone, or a package that points to another checkout.
INSTALLED := $(shell { .venv/bin/python -I -c 'import importlib.util as u; print(u.find_spec("scaled_rope").origin)'; } 2>/dev/null)
ifneq ($(INSTALLED),$(CURDIR)/scaled_rope/__init__.py)
STALE := stale
endif
endif
export PYTHON

.PHONY: help demo test test-slow check lint types units base smollm2 smollm2-16k paper-mini clean stale

help:
	@echo "make demo        extend the embedded model from 256 to 2048 tokens, evaluate it, write out/demo/report.html"
	@echo "make test        lint, types and tests"
	@echo "make test-slow   the few tests that take more than a minute each, which make test leaves out"
	@echo "make check       lint and types only"
	@echo "make smollm2     evaluate a real model, SmolLM2-135M, under the scalings, without training (under 20 minutes)"
	@echo "make smollm2-16k train it from 8k to 16k by YaRN, PI and others, and measure all (about 20 hours on 2 cores)"
	@echo "make paper-mini  test the paper's claims on the embedded model, with seeds (two hours on 2 busy cores)"
	@echo "make base        train the embedded model again, from random weights (100 minutes on 2 cores)"
	@echo "make clean       remove out/ (runs and reports); .venv and downloaded data stay"
	@echo "Add PYTHON=python to use the active environment instead of .venv."

.venv/.ready: setup.py constraints.txt $(STALE)
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: python3 is $$(python3 -V 2>&1); Python 3.11 or newer is needed"; exit 2; }
	@test -x .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1 || python3 -m venv --clear .venv
	.venv/bin/python -m pip install --progress-bar off --disable-pip-version-check --no-compile -c constraints.txt \
		-e '.[train,eval,dev]'
	@# Bytecode by all processors, as pip would make it by one. Templates that are no Python stay as they are.
	-@.venv/bin/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib >/dev/null
	-.venv/bin/python -m scaled_rope.texts.corpora fetch demo --output data/cache/demo # the demo then needs no network
	@touch $@

demo: $(READY)
	./train.sh demo
	./eval.sh demo

check: lint types

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(READY)
	$(PYTHON) -m mypy

# Workers with one thread each, one more than processors of a small machine, since many tests wait for programs that they
# start; a file's tests stay together, since they share what is costly to make.
JOBS ?= 3
PYTEST = $(PYTHON) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: lint
	@$(MAKE) --no-print-directory -j 2 types units # mypy uses one processor

units: $(READY)
	$(PYTEST)

test-slow: $(READY)
	$(PYTEST) --slow -m slow

base: $(READY)
	./train.sh tiny-base-text
	./eval.sh tiny-base-text
	@echo "to embed it: $(PYTHON) data/install_base.py out/tiny-base-text --output models/tiny-llama-256"

smollm2: $(READY)
	./benchmarks/smollm2.sh

smollm2-16k: $(READY)
	$(PYTHON) benchmarks/smollm2_16k.py --output out/smollm2-16k/rows.jsonl --training out/smollm2-16k/training.jsonl
	$(PYTHON) benchmarks/smollm2_16k_report.py --rows out/smollm2-16k/rows.jsonl \
		--training out/smollm2-16k/training.jsonl --standalone out/smollm2-16k

paper-mini: $(READY)
	$(PYTHON) benchmarks/paper_mini.py --output out/paper-mini/rows.jsonl --training out/paper-mini/training.jsonl
	$(PYTHON) benchmarks/paper_mini.py --output out/paper-mini/rows.jsonl --training out/paper-mini/training.jsonl \
		--show --figures out/paper-mini

clean:
	rm -rf out

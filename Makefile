# make setup        the environment in .venv (again only when the requirements change)
# make quickstart   tokenizer, shards, AR baseline, TextVAE, TextDiT, samples, scores, report; continues where it stopped
#                   RECIPE=default|textldm_paper|cola|ldlm  NUM_PROCESSES=1  CORPUS=PATH  TEACHER=Qwen/Qwen3-1.7B
# make small        the same at a larger scale: about an hour on 2 cores
# make test         the tests (TESTS="-m 'not slow'", TESTS=tests/flow)
# make check        ruff and mypy

PYTHON ?= python3
VENV ?= .venv
RECIPE ?= default
NUM_PROCESSES ?= 1
CORPUS ?=
TEACHER ?=
TESTS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
RUN := $(BIN)/python launch/quickstart.py --recipe $(RECIPE) --num_processes $(NUM_PROCESSES) \
	$(if $(CORPUS),--corpus "$(CORPUS)") $(if $(TEACHER),--teacher $(TEACHER))
# A torch that already runs on this machine's GPU is taken as it is, whatever its version.
GPU_TORCH = $(shell $(PYTHON) -c "import torch; print(torch.cuda.is_available() or '')" 2>/dev/null)

.PHONY: setup quickstart small test check
.DELETE_ON_ERROR:

setup: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(if $(GPU_TORCH),--system-site-packages) $(VENV)
	$(BIN)/python -m pip install --upgrade pip setuptools
	$(if $(GPU_TORCH),,$(BIN)/python -m pip install $$(grep '^torch==' requirements.txt))
	grep -v '^torch==' requirements.txt > $(VENV)/requirements.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-build-isolation -r $(VENV)/requirements.txt -r requirements-dev.txt
	# where the system has DeepSpeed too, pip leaves this environment without its launcher
	test -x $(BIN)/deepspeed || DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-build-isolation --no-deps \
		--ignore-installed $$(grep '^deepspeed==' requirements.txt)
	$(BIN)/python -m pip install --no-build-isolation --no-deps --editable .
	touch $@

quickstart: setup
	$(RUN) --configs launch/configs/quickstart

small: setup
	$(RUN) --configs launch/configs/small

# in their own order: by their number of tests the file of three long ones would start last, alone
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(TESTS)

check: setup
	$(BIN)/python -m ruff check
	$(BIN)/python -m mypy

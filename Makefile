# `make demo` and `make test`; `make help` lists everything. Runs with GNU make 3.81 (macOS) and later.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := checkpoints/smollm2-135m-instruct

.PHONY: help demo test test-slow test-gpu docs clean
# `make -j demo test` would run two pips in one environment.
.NOTPARALLEL:

help:
	@echo "make demo    chat with a small real model: installs into $(VENV), fetches the model (93 MB)"
	@echo "make test    ruff, mypy, shellcheck and pytest: installs into $(VENV), no other download"
	@echo "make test-slow  tests of memory, of two hosts, of other CPUs and long computations: about six minutes"
	@echo "make test-gpu BIN=/path/to/env/bin"
	@echo "             tests and speed on a GPU in five minutes, in an environment whose torch has CUDA; writes gpu-report.json"
	@echo "make docs    the documentation as a web site in site/: installs into $(VENV)"
	@echo "make clean   removes $(VENV), caches and build artefacts; keeps checkpoints/"
	@echo "Another Python (3.10 or newer): make demo PYTHON=/path/to/python3"

demo: $(VENV)/.installed-convert
	@PYTHON=$(BIN)/python ./download.sh demo
	@echo "== text completion"
	$(BIN)/torchrun --nproc_per_node 1 example_text_completion.py --ckpt_dir $(DEMO)
	@echo "== chat completion"
	$(BIN)/torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_dir $(DEMO) --max_gen_len 64

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports
	$(BIN)/shellcheck download.sh .ci/run
	$(BIN)/python -m pytest -n 4 --dist worksteal -m 'not slow'

# Many of these tests measure memory or time, so nothing else should run.
test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# Installs nothing, because the user must choose a CUDA build of torch.
test-gpu:
	@$(BIN)/python tests/gpu.py $(ARGS)

# --strict: a broken link or anchor is an error.
docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Python compiles modules when they are first imported, unless it may not write bytecode. pip would compile all 20,000.
NO_COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)
# The stamp of an extra is written last, so a failed or interrupted install is repeated.
$(VENV)/.installed-%: pyproject.toml requirements.txt | $(VENV)/.created
	@rm -f $@
	@echo "Installing llama-runner[$*] into $(VENV): about 2 minutes, longer the first time where torch must be downloaded"
	@$(BIN)/python -m pip install -qq $(NO_COMPILE) --no-input --disable-pip-version-check -c requirements.txt -e '.[$*]' || \
		{ echo "make: the install failed, the reason is above; fix it, then run make again" >&2; exit 1; }
	@touch $@

# A working .venv is kept, whoever created it. A broken one (its Python was removed, a run was interrupted) is recreated.
# On Debian without python3-venv, Python has no ensurepip: there PYTHON's own pip installs a pip into the environment.
$(VENV)/.created:
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
			echo "make: Python 3.10 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name one: make demo PYTHON=/path/to/python3" >&2; \
			exit 1; }; \
		echo "Making $(VENV) with $$($(PYTHON) --version)"; \
		if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
			$(PYTHON) -m venv --clear $(VENV); \
		else \
			pip_dir=$$($(PYTHON) -c 'import os, pip; print(os.path.dirname(os.path.dirname(pip.__file__)))') && \
			$(PYTHON) -m venv --clear --without-pip $(VENV) && \
			PYTHONPATH=$$pip_dir $(BIN)/python -m pip install -qq --ignore-installed --disable-pip-version-check pip; \
		fi; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './checkpoints/*' -prune -exec rm -rf {} +
	@echo "checkpoints/ is kept; remove it yourself to fetch the models again"

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
EDITABLE := --config-settings editable_mode=strict -e '.[dev]'
# Strict editable mode links file by file, so that type checkers see the mapped folders; hence a new file needs a new link.
LINKED := find server runtime compress protos \( -name '*.py' ! -name '*_pb2*.py' -o -name '*.proto' \)
METADATA := pyproject.toml constraints.txt
GPU_DEVICE ?= cuda
GPU_PYTHON_VERSION ?= 3.12

.PHONY: help demo test check gpu-bundle gpu dev clean

help:
	@echo 'make demo    press the example model, serve it, stream from it, print what it costs (sets up .venv by itself)'
	@echo 'make test    the default test suite, under 15 minutes on two cores'
	@echo 'make check   ruff, mypy --strict, and buf for the protos'
	@echo 'make gpu-bundle   collect the wheels that a GPU machine without a network needs, into build/gpu-bundle'
	@echo 'make gpu          there: install them beside its own Python, run the GPU tests and measure (GPU_DEVICE=cpu: a dry run)'
	@echo 'make dev     install into .venv; does nothing while the list of files is unchanged'
	@echo 'make clean   remove .venv and build'

demo: dev
	@$(BIN)/python examples/demo.py

# Two processes of a file of tests each: most of the time goes to servers that start, and to one thread of a compiler.
test: dev
	@$(BIN)/python -m pytest -n 2 --dist loadfile

check: dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/buf lint protos
	@$(BIN)/buf format protos --diff --exit-code
	@$(BIN)/buf breaking protos --against tests/protos/promise.proto

gpu-bundle: dev
	@$(BIN)/python tests/gpu/bundle.py --python $(GPU_PYTHON_VERSION)

# With the machine's own Python and PyTorch: no `dev`, no .venv. GPU_BENCH holds options of tests/bench/gpu.py.
gpu:
	@$(PYTHON) tests/gpu/run.py --device $(GPU_DEVICE) -- $(GPU_BENCH)

dev:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "pressd needs Python >= 3.11; try: make PYTHON=python3.12 ...")'
	@mkdir -p build
	@flock build/.lock sh -ec ' \
	  [ -x $(BIN)/python ] || { echo "creating .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }; \
	  deps=$$(cat $(METADATA) | sha256sum); links=$$({ $(LINKED) | LC_ALL=C sort; cat protos/build.py protos/pressd/v1/*.proto; } | sha256sum); \
	  if [ "$$deps" != "$$(cat .venv/.deps 2>/dev/null)" ]; then echo "installing pressd and what it needs (a few minutes the first time)"; $(INSTALL) $(EDITABLE); \
	  elif [ "$$links" != "$$(cat .venv/.links 2>/dev/null)" ]; then echo "linking changed files"; $(INSTALL) --no-deps $(EDITABLE); fi; \
	  echo "$$deps" > .venv/.deps; echo "$$links" > .venv/.links'

clean:
	rm -rf .venv build pressd.egg-info

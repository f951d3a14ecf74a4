# Everything runs in a virtual environment of its own, .venv.
#   make demo                     install, compare the shipped world with its truth, say where the page is
#   make test                     install, lint, run the tests
#   make demo PYTHON=python3.12   another interpreter (3.10 to 3.13)
#   make demo TORCH=torch==2.9.1  another torch; a torch that the environment already has is kept

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := out/demo

GPU := $(shell command -v nvidia-smi 2>/dev/null)
# Without an NVIDIA GPU the tested release; with one, whatever build the GPU's driver and index call for.
TORCH ?= $(if $(GPU),torch>=2.9,torch==2.13.0)
# On Linux the default index holds builds with CUDA, which run without a GPU but are large; PyTorch's own index of
# CPU builds can be named here.
TORCH_INDEX ?=

.PHONY: demo test lint install clean

demo: install
	$(BIN)/worldstride compare courtyard --worlds 2 --out $(DEMO)
	@echo "open $(DEMO)/index.html in a browser"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)" $(addprefix --extra-index-url ,$(TORCH_INDEX))
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO)

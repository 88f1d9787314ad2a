# The few commands people type. `make help` lists them.
PYTHON  ?= python3.11
VENV    ?= .venv
MODELS  ?=
VARIANTS ?=
SUITE   ?=
PIP_ARGS ?=
BENCH   ?=
CUTS    ?= 1 2
ARM64   ?= $(wildcard artifacts/smollm2-135m/variants/*)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
READY   := $(VENV)/.ready
# A file's tests share what is made for them, so a file stays on one worker; tests/conftest.py puts long ones first.
PYTEST  := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
comma   := ,
empty   :=
space   := $(empty) $(empty)

.PHONY: help shell demo repro validate-release bench bench-quality bench-engine rehearsal crosscheck gpu-check arm64 show check test test-long test-ray lint clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

shell: $(READY)  ## how to use `dvc` and `python -m pipeline` in your shell
	@echo 'source $(VENV)/bin/activate'

demo: $(READY)  ## the whole pipeline on the embedded small model, then its table
	dvc repro
	python -m pipeline show
	@echo; echo 'Commands of the pipeline in this shell: source $(VENV)/bin/activate'

set = $(if $(2),-S 'configs/pipeline.yaml:$(1)=$(2)')
list = $(if $(strip $(1)),[$(subst $(space),$(comma),$(strip $(1)))])
CHANGES = $(strip $(call set,models,$(call list,$(if $(MODELS),smollm2-135m $(MODELS)))) \
  $(call set,variants,$(call list,$(VARIANTS))) $(call set,suite,$(SUITE)))

repro: $(READY)  ## dvc repro; MODELS="mimo-8b phi-4" for these models too, VARIANTS="q4 q4_k_m" and SUITE=release instead
	$(if $(CHANGES),dvc exp run $(CHANGES),dvc repro)
	python -m pipeline show

validate-release: $(READY)  ## the release's evidence: 65,000 tokens, 570 to 2,850 MMLU questions, 164 HumanEval problems
	dvc exp run -S 'configs/pipeline.yaml:suite=release'
	python -m pipeline show

bench: $(READY)  ## full-size models converted, loaded and run; searches beside their peers: benchmarks/README.md
	python -m pip install --no-compile --quiet $(PIP_ARGS) -r requirements-bench.txt -c constraints.txt
	python -m benchmarks.searches --out benchmarks/results/searches.json
	python -m benchmarks.conversion $(BENCH)
	python -m benchmarks.reference
	python -m benchmarks.generation
	python -m benchmarks.tables

bench-quality: $(READY)  ## our quantized files beside ONNX Runtime's and llama.cpp's, at the same download and memory: benchmarks/README.md
	python -m pip install --no-compile --quiet $(PIP_ARGS) -r requirements-bench.txt -c constraints.txt
	python -m benchmarks.quality.matrices
	python -m benchmarks.quality
	python -m benchmarks.tables

bench-engine: $(READY)  ## each stage by threads, one Ray node and two; workers killed on the way: docs/scale.md, after make demo
	python -m pip install --no-compile --quiet $(PIP_ARGS) -r requirements-ray.txt -c constraints.txt
	python -m benchmarks.engine --kills 20
	python -m benchmarks.tables

rehearsal: $(READY)  ## a full-size model that talks (MODELS=mimo-8b) through all stages to bundles that speak: benchmarks/README.md
	set -e; $(foreach model,$(or $(MODELS),mimo-8b),$(foreach layers,$(CUTS), \
	  python -m benchmarks.rehearsal --model $(model) --layers $(layers) --kills 0;) \
	  python -m benchmarks.rehearsal --model $(model) $(VARIANTS:%=--variant %);)
	python -m benchmarks.tables

crosscheck: $(READY)  ## MMLU prompts, scores and cost beside lm-evaluation-harness, on SmolLM2 at full precision
	python -m pip install --no-compile --quiet $(PIP_ARGS) -r requirements-crosscheck.txt -c constraints.txt
	python -m benchmarks.crosscheck_mmlu artifacts/smollm2-135m/reference --out benchmarks/results/mmlu.json

gpu-check: $(READY)  ## what a GPU computes of full-precision passes beside the CPU, and how fast: minutes, after make demo
	python -m benchmarks.gpu_check

arm64: $(READY)  ## artifacts in the arm64 build of ONNX Runtime under QEMU, beside x86-64: Debian or Ubuntu, no root
	python -m benchmarks.arm64 $(ARM64) --out benchmarks/results/arm64.json
	python -m pytest -m arm64
	python -m benchmarks.tables

show: $(READY)  ## the table of the last run
	@python -m pipeline show

check: lint  ## before a commit: ruff, mypy, and the tests that take a minute together
	mypy & $(PYTEST) -m "not slow and not long and not arm64" && wait $$!

test: lint  ## ruff, mypy, and all tests but the long ones
	mypy & $(PYTEST) && wait $$!

test-long: $(READY)  ## tests that take minutes by nature
	$(PYTEST) -m long

test-ray: $(READY)  ## units of work on two local Ray nodes: the same bytes, also when workers are killed
	python -m pip install --quiet $(PIP_ARGS) -r requirements-ray.txt -c constraints.txt
	python -m pytest tests/engine -m ""

lint: $(READY)  ## ruff
	ruff check .
	ruff format --check .

clean:  ## remove the environment; keeps the store, the DVC cache and artifacts/
	rm -rf $(VENV)

$(READY): requirements.txt requirements-dev.txt constraints.txt $(wildcard pipeline/keys/dvc_hook/*)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --no-compile --quiet $(PIP_ARGS) -r requirements-dev.txt -c constraints.txt
	touch $@

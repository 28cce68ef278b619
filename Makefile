# make demo | compare | test | test-full | fuzz | check | bench | learning | ablation | theorems | aot | ptxas | gpu | gpu-learning
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0

.PHONY: help demo compare test test-full fuzz check bench learning ablation theorems aot ptxas gpu gpu-learning clean

help:
	@echo "make demo [SEED=n]     fine-tune a real language model on real text, from nothing; under five minutes on 2 cores"
	@echo "make demo ADAPTER=lora the same with LoRA, or ADAPTER=prefix; TensorBoard logs in runs/"
	@echo "make compare [SEED=n]  the same, and ZO-SGD with as many forward passes"
	@echo "make test              the default test suite, without a GPU and without a network"
	@echo "make test-full         all tests that need no GPU"
	@echo "make fuzz              random damage to journals for ten minutes, other damage each time; SECONDS=n"
	@echo "make check             ruff, mypy on jaguar/, import layering"
	@echo "make bench             one optimizer step on the CPU against MeZO's loop"
	@echo "make learning          every method with as many forward passes, settings searched: a small model, then SmolLM2 (3 hours; goes on)"
	@echo "make ablation          where momentum acts: JAGUAR's loss against beta, by coordinates and update (1 hour)"
	@echo "make theorems          both theorems of the paper on functions with known constants: measured slopes (9 minutes)"
	@echo "make aot               compile every Triton kernel for sm_80 and sm_90, check and tabulate them (3 minutes)"
	@echo "make ptxas             compile every CUDA kernel with nvcc, tabulate registers and spills; needs no GPU"
	@echo "make gpu               GPU tests, compute-sanitizer and benchmarks with this machine's own torch and triton (9 minutes)"
	@echo "make gpu-learning      make learning's reviews with every method on a GPU, nine minutes at a time; MODEL=folder PART=i/n"

# pip's own messages go to a log: without a network they are pages, and one line says it better.
define install
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(1) (once, into $(VENV))"
	@{ $(BIN)/python -m pip install --disable-pip-version-check --retries 1 -c constraints.txt torch \
	   && $(BIN)/python -m pip install --disable-pip-version-check --retries 1 -c constraints.txt -e '.[$(1)]' \
	      $(2); } > $(VENV)/install.log 2>&1 \
	   || { echo "error: installation failed. Connect this machine to a package index and run the same command again;" \
	             "what pip said is in $(VENV)/install.log" >&2; exit 1; }
	@touch $@
endef

# torch first and alone: resolved together with the rest, another build of it may be chosen.
$(VENV)/.demo: pyproject.toml setup.py constraints.txt
	$(call install,demo)

# Triton for the tests: the one that this torch brings, else the oldest that is supported.
$(VENV)/.dev: pyproject.toml setup.py constraints.txt
	$(call install,$(comma_dev),$$($(BIN)/python -c 'import triton' 2> /dev/null || echo triton==3.6.0))

comma := ,
comma_dev := test$(comma)dev

demo: $(VENV)/.demo
	@$(BIN)/python demo/demo.py --seed $(SEED) $(if $(ADAPTER),--adapter $(ADAPTER))

compare: $(VENV)/.demo
	@$(BIN)/python demo/demo.py --seed $(SEED) --compare

# Two processes, a file of tests each: fixtures that compile are made once.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-full: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu"

SECONDS ?= 600

fuzz: $(VENV)/.dev
	FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest -s tests/engine/test_journal_fuzz.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/laws/test_layering.py

bench: $(VENV)/.demo
	$(BIN)/python bench step

learning: $(VENV)/.demo
	$(BIN)/python bench learning --work bytes reviews

ablation: $(VENV)/.demo
	$(BIN)/python bench ablation

theorems: $(VENV)/.demo
	$(BIN)/python bench theorems

aot: $(VENV)/.dev
	$(BIN)/python bench aot

ptxas: $(VENV)/.dev
	$(BIN)/python bench ptxas

# With the Python that is there: a machine with a GPU brings its own torch and triton, and often no network.
# COMMIT says which one this is where there is no git repository.
gpu:
	@$(PYTHON) bench gpu $(if $(COMMIT),--commit $(COMMIT))

# The demo's model and rows, which may have been copied here: nothing is downloaded. The same command goes on.
MODEL ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/jaguar/SmolLM2-135M-Instruct

build/.gpu-learning: $(shell find jaguar triton_kernels csrc -type f -not -name '*.pyc')
	@$(PYTHON) bench gpu --stages build $(if $(COMMIT),--commit $(COMMIT)) || test -d build/gpu/jaguar
	@touch $@

LEARNING ?= --work reviews sst2 --all --minutes 7.5

gpu-learning: build/.gpu-learning
	@PYTHONPATH=build/gpu:$(PYTHONPATH) $(PYTHON) bench learning --passes 600 --processes 12 --model $(MODEL) \
	  --out bench/results/learning-gpu $(LEARNING) $(if $(PART),--part $(PART)) $(if $(COMMIT),--commit $(COMMIT))

clean:
	rm -rf $(VENV) build runs *.egg-info

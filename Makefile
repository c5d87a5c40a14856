# One command for everything; each sets up what it needs in .venv and does nothing where nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO := build/demo
PEERS := build/peers

.DEFAULT_GOAL := help
.PHONY: help demo test lint format samples nightly bench-score bench-latency bench-interpreter bench-paper bench-retrain bench-zoo bench-flow bench-flow-channels study-flow peers bench-oneshot bench-speech bench-large clean

help:  ## Show what there is.
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("relief-onnx needs Python 3.11 or newer; run make PYTHON=python3.12, for example" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(PIP) --editable ".[dev,retrain]"
	@touch $@

$(VENV)/.samples: $(VENV)/.dev
	@$(PIP) --editable ".[samples]"
	@touch $@

$(VENV)/.bench: $(VENV)/.samples
	@$(PIP) --editable ".[bench]"
	@touch $@

demo: $(VENV)/.installed  ## Prune a sample model and compare it with the original on digits that it has not seen.
	@mkdir -p $(DEMO)
	$(BIN)/relief-onnx prune sample_models/lenet5.onnx --data sample_models/digits/calib -o $(DEMO)/lenet5.pruned.onnx --json $(DEMO)/report.json --force
	$(BIN)/relief-onnx compare sample_models/lenet5.onnx $(DEMO)/lenet5.pruned.onnx --data sample_models/digits/test

# A process for each core, each with one BLAS thread: on the small matrices of the tests two would mostly wait for each other.
test: lint  ## Lint, types and tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.dev  ## Lint, format check and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

format: $(VENV)/.dev  ## Format the code and fix what can be fixed.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

samples: $(VENV)/.samples  ## Train the sample models again, into their folder; needs torch.
	$(BIN)/python sample_models/build.py

nightly: test bench-score  ## Everything that takes longer than a commit should wait for.
	RELIEF_ONNX_EXAMPLES=5000 $(BIN)/python -m pytest tests/test_random_graphs.py

bench-score: $(VENV)/.dev  ## Measure scoring speed, memory and file sizes; prints the ratios.
	$(BIN)/python -m benchmarks.score

bench-latency: $(VENV)/.dev  ## Measure how much faster pruned channels make a model in onnxruntime; prints the speed-ups.
	$(BIN)/python -m benchmarks.latency $(LATENCY_OPTIONS)

bench-interpreter: $(VENV)/.dev  ## Measure a training step through the interpreter beside a plain nn.Module; prints the ratios.
	$(BIN)/python -m benchmarks.interpreter $(INTERPRETER_OPTIONS)

bench-paper: $(VENV)/.samples  ## Prune and retrain LeNets on MNIST as in the paper, the schedule shortened; hours; prints a table.
	$(BIN)/python -m benchmarks.paper $(PAPER_OPTIONS)

bench-retrain: $(VENV)/.dev  ## Retrain a pruned ResNet-20 for a few epochs on CIFAR-10; prints accuracy by share kept.
	$(BIN)/python -m benchmarks.retrain_resnet $(RETRAIN_OPTIONS)

bench-zoo: $(VENV)/.dev  ## Prune and check all real models of ../shared/models; prints a table.
	$(BIN)/python -m benchmarks.zoo $(ZOO_OPTIONS)

# onnx2torch asks for torchvision, which has no CPU build beside this torch: it and Torch-Pruning come without their requirements.
$(PEERS)/.installed: Makefile
	@echo "Setting up $(PEERS) ..."
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy onnx==1.23.2 onnxruntime==1.31.1 onnxsim==0.8.1
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps onnx2torch==1.5.15 torch-pruning==1.6.1
	@touch $@

bench-flow: $(VENV)/.bench $(PEERS)/.installed  ## Compare accuracy at the same share of weights kept with other criteria; prints tables.
	$(BIN)/python -m benchmarks.flow $(FLOW_OPTIONS)

study-flow: $(VENV)/.bench  ## Compare the choices inside flow on calibration data only; prints tables.
	$(BIN)/python -m benchmarks.flow_study $(STUDY_OPTIONS)

bench-flow-channels: $(VENV)/.dev $(PEERS)/.installed  ## Measure the accuracy of ResNets without whole channels, beside the other pruners.
	$(BIN)/python -m benchmarks.flow_channels --peers $(PEERS)/bin/python $(FLOW_CHANNELS_OPTIONS)

bench-oneshot: $(VENV)/.bench $(PEERS)/.installed  ## Compare accuracy after one cut and a repair without training with other pruners; prints tables.
	$(BIN)/python -m benchmarks.oneshot $(ONESHOT_OPTIONS)

bench-speech: $(VENV)/.dev  ## Measure how speech models that carry states agree with the original at half of their weights.
	$(BIN)/python -m benchmarks.speech $(SPEECH_OPTIONS)

bench-large: $(VENV)/.dev  ## Measure time and memory of a model over 2 GB; takes hours and some 25 GB of disk.
	$(BIN)/python -m benchmarks.large $(LARGE_OPTIONS)

peers: $(PEERS)/.installed  ## Measure what Torch-Pruning and onnxsim can remove from the same models, for bench-zoo's table.
	$(PEERS)/bin/python -m benchmarks.peers $(ZOO_OPTIONS)

clean:  ## Remove what was built, and .venv.
	rm -rf build dist $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

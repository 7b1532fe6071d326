# make demo       train the embedded demo on a CPU, and report
# make quick      the tests that train nothing, in a minute   make test    all tests
# make lint       check style and imports                     make format  put the style right
# make docs       the documentation as a site, in site/
# make pictures   the README's pictures, from the demo        make gpu-check  needs a GPU
# make soak       the long tests, for an hour or so: faults, hostile input: docs/reliability.md
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
DEMO_FLAGS ?=

.NOTPARALLEL:
.PHONY: demo quick test lint format docs pictures soak gpu-check
demo: $(VENV)/.cpu
	$(VENV)/bin/python train_model.py recipes/demo.yaml --overwrite $(DEMO_FLAGS)
	$(VENV)/bin/python report_run.py recipes/demo.yaml $(DEMO_FLAGS)

quick: $(VENV)/.cpu $(VENV)/.dev
	$(VENV)/bin/python -m pytest -q -rs -m "not slow"

test: $(VENV)/.cpu $(VENV)/.dev $(VENV)/.unsloth
	$(VENV)/bin/python -m pytest -q -rs

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

pictures: $(VENV)/.cpu $(VENV)/.dev
	$(VENV)/bin/python train_model.py recipes/demo.yaml --overwrite --output_root runs/pictures
	$(VENV)/bin/python report_run.py recipes/demo.yaml --output_root runs/pictures --out runs/pictures/report
	$(VENV)/bin/python benchmarks/screenshots.py runs/pictures/report docs/images

soak: $(VENV)/.cpu $(VENV)/.dev $(VENV)/.unsloth
	$(VENV)/bin/python reliability/resume_proof.py
	$(VENV)/bin/python reliability/soak.py --rounds 20
	$(VENV)/bin/python reliability/fuzz.py
	$(VENV)/bin/python reliability/soak_rewards.py
	$(VENV)/bin/python tests/injected.py --unsloth "$$(mktemp -d)" 2 4

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cpu: requirements-cpu.txt | $(VENV)/bin/python
	@echo "Installing requirements-cpu.txt into $(VENV): a few minutes, once"
	$(PIP) -r requirements-cpu.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt | $(VENV)/bin/python
	@echo "Installing requirements-dev.txt into $(VENV)"
	$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/.unsloth: requirements-unsloth-cpu.txt | $(VENV)/.cpu
	@echo "Installing Unsloth without its GPU dependencies into $(VENV), for the tests"
	$(PIP) --no-deps -r requirements-unsloth-cpu.txt
	@touch $@

$(VENV)/.docs: requirements-docs.txt | $(VENV)/bin/python
	@echo "Installing requirements-docs.txt into $(VENV)"
	$(PIP) -r requirements-docs.txt
	@touch $@

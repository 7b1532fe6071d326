# make demo   train the embedded demo on a CPU, and report     make test       run all tests
# make pictures   the README's pictures, from the demo         make gpu-check  needs a GPU
# make soak   the long tests, for an hour or so: faults, hostile input: docs/reliability.md
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
DEMO_FLAGS ?=

.PHONY: demo test pictures soak gpu-check
demo: $(VENV)/.cpu
	$(VENV)/bin/python train_model.py recipes/demo.yaml --overwrite $(DEMO_FLAGS)
	$(VENV)/bin/python report_run.py recipes/demo.yaml $(DEMO_FLAGS)

test: $(VENV)/.unsloth
	$(VENV)/bin/python -m pytest -q -rs

pictures: $(VENV)/.cpu
	$(VENV)/bin/python train_model.py recipes/demo.yaml --overwrite --output_root runs/pictures
	$(VENV)/bin/python report_run.py recipes/demo.yaml --output_root runs/pictures --out runs/pictures/report
	$(VENV)/bin/python benchmarks/screenshots.py runs/pictures/report docs/images

soak: $(VENV)/.unsloth
	$(VENV)/bin/python reliability/resume_proof.py
	$(VENV)/bin/python reliability/soak.py --rounds 20
	$(VENV)/bin/python reliability/fuzz.py
	$(VENV)/bin/python reliability/soak_rewards.py
	$(VENV)/bin/python tests/injected.py --unsloth "$$(mktemp -d)" 2 4

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

$(VENV)/.cpu: requirements-cpu.txt
	@echo "Installing requirements-cpu.txt into $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-cpu.txt
	@touch $@

$(VENV)/.unsloth: $(VENV)/.cpu requirements-unsloth-cpu.txt
	@echo "Installing Unsloth without its GPU dependencies into $(VENV), for the tests"
	$(PIP) --no-deps -r requirements-unsloth-cpu.txt
	@touch $@

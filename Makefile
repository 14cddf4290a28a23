# Each target sets up .venv when there is none (or when the pinned versions changed) and is quick when there is one.
PYTHON ?= python3
BIN = .venv/bin
PIP = -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=-c %)
RUN ?=

.PHONY: setup quickstart check lint types test test-real docs mutants faults golden

setup: .venv/ready

# Pinned versions; CONSTRAINTS= takes the newest.
.venv/ready: CONSTRAINTS ?= constraints.txt
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) -e '.[dev,docs]'
	# Only its model of the arm is used; what it depends on is neither needed nor compatible with the newest MuJoCo.
	$(BIN)/python $(PIP) --no-deps gym-hil
	touch $@

# OTQL and the plain BC flow on OGBench's scene task 1: collects data, trains, evaluates, draws, films, compares.
quickstart: .venv/ready
	$(BIN)/python -m experiments.quickstart $(RUN)

test: .venv/ready
	$(BIN)/python -m pytest -q -x -n 2 --dist=loadfile --no-loadscope-reorder --durations=10 $(RUN)

# The robot bridge: LeRobot, torch and JAX side by side, on Python 3.12.
test-real: real/.venv/ready
	real/.venv/bin/python -m pytest -q -x --durations=10 real/tests

# The documentation as a site: build/site/index.html. Any warning is an error.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Faults planted one at a time, each of which must make its tests fall: make mutants RUN='coupling --jobs=2'
mutants: .venv/ready
	$(BIN)/python tests/mutants.py --baseline $(RUN)

# Runs disturbed at random moments (killed, interrupted, a full disk, a simulator that hangs or crashes) must end in the
# numbers of undisturbed ones: make faults RUN='--trials=8'. A full disk takes root, to mount a small one.
faults: .venv/ready
	$(BIN)/python tests/faults.py $(RUN)

# A change of the code that must not move a number: make golden RUN='record DIR' before it, RUN='compare DIR' after it.
golden: .venv/ready
	$(BIN)/python tests/golden.py $(RUN)

PLUGINS = real/lerobot_policy_otql real/lerobot_env_otql
# LeRobot needs Python 3.12 or newer.
REAL_PYTHON ?= $(firstword $(shell for p in $(PYTHON) python3.12 python3.13 $(HOME)/.pyenv/versions/3.12.*/bin/python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p"; done))

real/.venv/ready: CONSTRAINTS ?= real/constraints.txt
real/.venv/ready: pyproject.toml real/constraints.txt $(PLUGINS:=/pyproject.toml)
	@test -n "$(REAL_PYTHON)" || { echo "error: LeRobot needs Python 3.12; install it, or name it: make test-real REAL_PYTHON=…" >&2; exit 2; }
	$(REAL_PYTHON) -m venv real/.venv
	real/.venv/bin/python $(PIP) $(PLUGINS:%=-e %) -e '.[robot,smolvla]' 'lerobot[async]' pytest
	real/.venv/bin/python $(PIP) --no-deps gym-hil
	touch $@

# What to run before a commit: a minute or two.
check: lint types
	$(BIN)/python -m pytest -q -x -n 2 --dist=loadfile --no-loadscope-reorder -m check

lint: .venv/ready
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

types: .venv/ready
	$(BIN)/mypy

# Each target sets up .venv when there is none (or when the pinned versions changed) and is quick when there is one.
PYTHON ?= python3
BIN = .venv/bin
RUN ?=

.PHONY: quickstart test test-real mutants faults lint types setup

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# Only its model of the arm is used; what it depends on is neither needed nor compatible with the newest MuJoCo.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gym-hil
	touch $@

# OTQL and the plain BC flow on OGBench's scene task 1: collects data, trains, evaluates, draws, films, compares.
quickstart: .venv/ready
	$(BIN)/python -m experiments.quickstart $(RUN)

test: .venv/ready
	$(BIN)/python -m pytest -q -x -n 2 --dist=loadfile --durations=10

# The robot bridge: LeRobot, torch and JAX side by side, which LeRobot's versions allow and `constraints.txt` does not.
test-real: real/.venv/ready
	real/.venv/bin/python -m pytest -q -x --durations=10 real/tests

# Faults planted one at a time, each of which must make its tests fall: make mutants RUN='coupling --jobs=2'
mutants: .venv/ready
	$(BIN)/python tests/mutants.py --baseline $(RUN)

# Runs disturbed at random moments (killed, interrupted, a full disk, a simulator that hangs or crashes) must end in the
# numbers of undisturbed ones: make faults RUN='--trials=8'. A full disk takes root, to mount a small one.
faults: .venv/ready
	$(BIN)/python tests/faults.py $(RUN)

PLUGINS = real/lerobot_policy_otql real/lerobot_teleoperator_otql_reset real/lerobot_robot_otql_sim

real/.venv/ready: pyproject.toml real/constraints.txt $(PLUGINS:=/pyproject.toml)
	$(PYTHON) -m venv real/.venv
	real/.venv/bin/python -m pip install --quiet --disable-pip-version-check -c real/constraints.txt \
		$(PLUGINS:%=-e %) -e '.[robot,smolvla]' pytest
	real/.venv/bin/python -m pip install --quiet --disable-pip-version-check -c real/constraints.txt --no-deps gym-hil
	touch $@

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

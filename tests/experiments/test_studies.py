"""Invalid input of the studies of couplings and of runs."""

import numpy as np
import pytest

from experiments import coupling_study, diagnose
from utils.errors import UserError
from utils.rollout.evaluator import Evaluator


@pytest.mark.check
def test_the_coupling_study_needs_a_validation_set(monkeypatch):
    monkeypatch.setattr(coupling_study, "load_dataset", lambda *_, **__: ({}, None, "no more"))
    with pytest.raises(UserError, match=r"^cube-single-play-singletask-task2-v0 has no validation set in /nowhere"):
        coupling_study.main(["coupling", "--env_name=cube-single-play-singletask-task2-v0", "--dataset_dir=/nowhere"])


@pytest.mark.check
def test_an_environment_without_success_cannot_be_diagnosed():
    class Silent(Evaluator):
        def __init__(self):
            pass

        def evaluate(self, *_):
            return {"return": np.ones(2), "length": np.ones(2), "return_mean": 1.0, "length_mean": 1.0}

    diagnose.FLAGS(["diagnose"])
    with pytest.raises(UserError, match="reports no success"):
        diagnose.success({"params": np.zeros(1)}, Silent())

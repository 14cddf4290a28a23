"""Runs become LeRobot policy directories."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load, load_file
from tiny_runs import BC, OTQL, POINTMAZE, call, contents, refused, run_dir, run_main

from real import export
from utils.run import checkpoints
from utils.run.loading import load_run

FEATURES = "--features=observation.state:1,observation.environment_state:1"


@pytest.fixture(scope="module")
def trained(pointmaze, tmp_path_factory):
    """A tiny finished run with two checkpoints."""
    save_dir = tmp_path_factory.mktemp("exp")
    flags = (f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", f"--save_dir={save_dir}")
    own = ("--agent.best_of_n=3", "--agent.flow_tau=0.5")
    run_main(*OTQL[:-1], *own, *flags, "--offline_steps=4", "--save_interval=2")
    return run_dir(save_dir)


@pytest.fixture
def directory(trained, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.check
def test_a_finished_run(trained, tmp_path):
    """Settings, parameters and a card; the same command again changes nothing."""
    out = tmp_path / "policies" / "policy"
    said = run_main(str(trained), str(out), FEATURES, program=export).out
    assert "OTQL, step 4 of 4 (finished)" in said and "success rate" in said and "normalisation: none" in said
    agent, settings, _ = load_run(trained)
    config = json.loads((out / "config.json").read_text())
    width = sum(feature["shape"][0] for feature in config["input_features"].values())
    assert width == settings["observation_dim"] and config["type"] == "otql"
    assert [f["type"] for f in config["input_features"].values()] == ["STATE", "ENV"]
    assert config["chunk_size"] * config["action_dim"] == settings["chunk_dim"]
    assert (config["flow_steps"], config["best_of_n"], config["num_qs"]) == (2, 3, 2)
    tensors = load_file(out / "model.safetensors")
    for name, params in {
        "actor": agent.targets["flow"]["MLP_0"],
        "critic": agent.params["critic"]["VmapMLP_0"],
    }.items():
        for i in range(3):
            kernel = params[f"Dense_{i}"]["kernel"]
            np.testing.assert_array_equal(tensors[f"model.{name}.kernels.{i}"].reshape(kernel.shape), kernel)
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: lerobot\n") and "| `lam` | 2 |" in text and POINTMAZE in text
    before = contents(out)
    run_main(str(trained), str(out), FEATURES, program=export)
    assert contents(out) == before and [path.name for path in out.parent.iterdir()] == ["policy"]


def test_unfinished_runs_and_earlier_checkpoints(directory, tmp_path):
    """Exported and said so."""
    assert "step 2 of 4 (earlier)" in run_main(str(directory), str(tmp_path / "a"), "--step=2", program=export).out
    (directory / "summary.json").unlink()
    assert "step 4 of 4 (not finished)" in run_main(str(directory), str(tmp_path / "b"), program=export).out
    path = checkpoints.path_of(directory / "checkpoints", 4)
    path.write_bytes(path.read_bytes()[:-1])
    outcome = call(str(directory), str(tmp_path / "c"), program=export)
    assert outcome.code == 0 and "step 2 of 4 (not finished)" in outcome.out
    assert "wrong checksum, truncated or damaged; step 2 is used instead" in outcome.err


def test_runs_that_cannot_be_exported(directory, tmp_path):
    """No run, no such checkpoint, none that is intact; nothing is written."""
    out = str(tmp_path / "out")
    assert "not the directory of a run" in refused(str(tmp_path), out, program=export)
    assert "no checkpoint of step 3" in refused(str(directory), out, "--step=3", program=export)
    assert "give two directories" in refused(str(directory), program=export)
    for path in (directory / "checkpoints").iterdir():
        path.write_bytes(b"")
    assert "truncated" in refused(str(directory), out, "--step=4", program=export)
    outcome = call(str(directory), out, program=export)
    assert outcome.code == 2 and outcome.err.endswith("has no valid checkpoint\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("observation.state:3", "add up to 3, the run observes 2 values"),
        ("observation.state:1,observation.state:1", "named once"),
        ("observation.state,observation.images.top", "names 1 cameras, the run has 0"),
        ("state:2", "must be a state"),
        ("observation.state,observation.environment_state", "name:size"),
        ("observation.state:four", "name:size"),
    ],
)
def test_features_that_do_not_fit(features, message, trained, tmp_path):
    """One line says what to write."""
    line = refused(str(trained), str(tmp_path / "out"), f"--features={features}", program=export)
    assert message in line and not (tmp_path / "out").exists()


def test_a_run_that_sees(tmp_path):
    """Its cameras are named in their order; another number, and what is no camera's name, is refused."""
    random, path = np.random.default_rng(0), tmp_path / "data.npz"
    images = random.integers(0, 256, (24, 2, 8, 12, 3), np.uint8)
    arrays = {name: random.uniform(-1, 1, (24, 3)).astype(np.float32) for name in ("observations", "actions")}
    last = np.arange(24) % 12 == 11
    np.savez(path, **arrays, images=images, rewards=last - 1.0, terminals=last * 1.0, timeouts=last * 0.0)
    own = (f"--save_dir={tmp_path}", "--offline_steps=1", "--agent.encoder=impala_tiny", "--agent.batch_size=4")
    run_main(*BC, "--env_name=robot:try", f"--dataset={path}", *own)
    run, out = str(run_dir(tmp_path)), tmp_path / "out"
    state, front, wrist = "observation.state", "observation.images.front", "observation.images.wrist"
    for features, message in [
        ((state,), "names 0 cameras, the run has 2; name one observation.images.<name> for each"),
        ((state, front), "names 1 cameras, the run has 2"),
        ((state, front, front), "named once"),
        ((state, front, f"{wrist}:8"), "must be the name of a camera alone"),
        ((front, wrist), "add up to 0, the run observes 3 values"),
    ]:
        assert message in refused(run, str(out), f"--features={','.join(features)}", program=export)
    run_main(run, str(out), f"--features={front},{state},{wrist}", program=export)
    config = json.loads((out / "config.json").read_text())
    shapes = {name: feature["shape"] for name, feature in config["input_features"].items()}
    assert shapes == {state: [3], front: [3, 8, 12], wrist: [3, 8, 12]}
    assert (config["encoder_patch"], config["encoder_widths"], config["encoder_features"]) == (4, [16, 16], 128)
    kernel = load_run(run)[0].targets["flow"]["encoder"]["camera_1"]["stack_0"]["Conv_2"]["kernel"]
    weight = load_file(out / "model.safetensors")["model.encoders.actor.1.convs.2.weight"]
    np.testing.assert_array_equal(weight, np.transpose(kernel, (3, 2, 0, 1)))


def test_a_directory_with_other_content(trained, tmp_path):
    """Is left as it is."""
    out = tmp_path / "out"
    run_main(str(trained), str(out), program=export)
    before = contents(out)
    assert "has other content" in refused(str(trained), str(out), FEATURES, program=export)
    assert contents(out) == before
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(str(trained), str(tmp_path / "file"), program=export)
    empty = tmp_path / "empty"
    empty.mkdir()
    run_main(str(trained), str(empty), program=export)
    assert contents(empty) == before


def test_normalisation(trained, tmp_path):
    """Statistics of the dataset go into both processors; a file that does not fit is refused."""
    path, out = tmp_path / "data.normalisation.json", tmp_path / "out"
    stats = {
        "observation.state": {"mean": [1, 2], "std": [1, 2]},
        "action": {"min": [-2, -3], "max": [2, 3]},
    }
    content = {"norm_map": {"STATE": "MEAN_STD", "ACTION": "MIN_MAX"}, "stats": stats}
    path.write_text(json.dumps(content))
    said = run_main(str(trained), str(out), f"--normalisation={path}", program=export).out
    assert f"normalisation: statistics of {path}" in said
    for name in ("policy_preprocessor", "policy_postprocessor"):
        steps = json.loads((out / f"{name}.json").read_text())["steps"]
        (state,) = [step["state_file"] for step in steps if "state_file" in step]
        np.testing.assert_array_equal(load((out / state).read_bytes())["action.max"], [2, 3])
    for change, message in [
        ({"norm_map": {"STATE": "QUANTILES"}}, "'QUANTILES' is unknown"),
        ({"stats": {"action": stats["action"]}}, "has no statistics of observation.state"),
        ({"stats": stats | {"action": {"min": [0], "max": [1]}}}, "min of action must be 2 finite numbers"),
        ({"stats": stats | {"action": {"mean": [0, 0]}}}, "is no file of normalisation: KeyError at 'min'"),
    ]:
        path.write_text(json.dumps(content | change))
        line = refused(str(trained), str(tmp_path / "other"), f"--normalisation={path}", program=export)
        assert message in line
    path.write_text("{")
    assert "is damaged" in refused(str(trained), str(tmp_path / "other"), f"--normalisation={path}", program=export)
    missing = refused(str(trained), str(tmp_path / "other"), "--normalisation=nowhere.json", program=export)
    assert "there is no file nowhere.json" in missing


def test_the_file_beside_the_dataset(directory, pointmaze, tmp_path):
    """Is used without being named; a dataset that is gone is no reason to send normalised actions to a robot."""
    dataset, settings = tmp_path / "data.npz", json.loads((directory / "flags.json").read_text())
    settings["flags"]["dataset"] = str(dataset)
    (directory / "flags.json").write_text(json.dumps(settings))
    line = refused(str(directory), str(tmp_path / "a"), program=export)
    assert "does not exist" in line and "--normalisation=data.normalisation.json" in line
    assert (
        "normalisation: none"
        in run_main(str(directory), str(tmp_path / "b"), "--normalisation=none", program=export).out
    )
    shutil.copy(pointmaze, dataset)
    assert "normalisation: none" in run_main(str(directory), str(tmp_path / "c"), program=export).out
    content = {"norm_map": {"ACTION": "MEAN_STD"}, "stats": {"action": {"mean": [1, 2], "std": [3, 4]}}}
    (tmp_path / "data.normalisation.json").write_text(json.dumps(content))
    assert "data.normalisation.json" in run_main(str(directory), str(tmp_path / "d"), program=export).out


OWN = """
import jax
from agents import bc
from agents.bc import PRESETS, get_config
class Agent(bc.Agent):
    def loss(self, params, batch, key):
        return super().loss(params, batch, key)
"""
ACTS = """
    def propose(self, observations, key):
        return 0.5 * super().propose(observations, key)
"""


def test_an_agent_of_one_s_own(pointmaze, tmp_path):
    """Is exported if it acts as one of agents/, and refused if it does not."""
    flags = (f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", "--offline_steps=1", *BC[1:])
    for name, code in {"inherits": OWN, "acts": OWN + ACTS}.items():
        path = tmp_path / f"{name}.py"
        path.write_text(code)
        run_main(f"--agent={path}", f"--save_dir={tmp_path / name}", *flags)
    run_main(str(run_dir(tmp_path / "inherits")), str(tmp_path / "out"), program=export)
    line = refused(str(run_dir(tmp_path / "acts")), str(tmp_path / "other"), program=export)
    assert "acts by a propose of its own, which the LeRobot policy has not" in line

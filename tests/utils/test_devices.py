"""Devices of a command: what --devices asks for, and where runs lie. Several devices: tests/four_devices.py."""

import os
import subprocess
import sys

import jax
import pytest

from utils.devices import BATCH, Layout, parse_devices, pick_devices
from utils.errors import UserError
from utils.system.files import ROOT


@pytest.mark.parametrize(
    ("text", "asked"), [("all", None), ("2", 2), ("0,2", (0, 2)), ("3, 1", (3, 1)), ("1,", (1,)), ("0,", (0,))]
)
def test_devices_are_all_a_count_or_numbers(text, asked):
    assert parse_devices(text) == asked


@pytest.mark.parametrize("text", ["", "0", "-1", "two", "1,1", "0,x", ",", "1.5", "0,,2"])
def test_other_texts_are_errors(text):
    with pytest.raises(UserError, match="give all, a count such as 2, or different numbers from 0 such as 0,2"):
        parse_devices(text)


def test_devices_that_are_not_there_are_errors():
    with pytest.raises(UserError, match="--devices=2: JAX finds 1 × CPU here, only number 0"):
        pick_devices("2")
    assert pick_devices("all") == pick_devices("1") == (jax.local_devices()[0],)


@pytest.mark.parametrize(
    ("num_runs", "devices", "used", "own", "slots"),
    [(8, 4, 4, 2, 8), (6, 4, 3, 2, 6), (5, 4, 3, 2, 6), (3, 2, 2, 2, 4), (1, 4, 0, 1, 1), (7, 8, 7, 1, 7)],
)
def test_runs_are_on_as_few_devices_as_make_training_fast(num_runs, devices, used, own, slots):
    """⌈L/D⌉ runs on each; copies only up to a multiple of the devices. 0: the default device alone."""
    layout = Layout.spread(num_runs, jax.local_devices() * devices)  # The same device, that often.
    assert (len(layout.devices), layout.own_runs, layout.slots, layout.parts) == (used, own, slots, 1)


def test_the_default_device_alone_has_no_layout():
    """So its programs and their inputs are those of a machine with one device."""
    layout = Layout.spread(3, jax.local_devices())
    assert layout.devices == () and layout.slots == layout.own_runs == 3 and layout.describe(1) == ""
    assert Layout.spread(1, jax.local_devices(), BATCH) == Layout(1)
    tree = {"a": jax.numpy.ones((3, 2))}
    assert layout.stacked(tree) is tree and layout.rows(tree) is tree and layout.split(tree) is tree


def test_what_is_said_of_the_devices():
    two = tuple(jax.local_devices() * 2)
    assert Layout(3, two).describe(4) == "3 runs on 2 of 4 devices, at most 2 on each"
    assert Layout(1).describe(4) == "1 run on 1 of 4 devices, 1 on each; --shard_batch spreads its batches"
    assert Layout(1, two, BATCH).describe(2) == "each batch is spread over 2 of 2 devices"
    assert Layout(1, two, BATCH).parts == 2


def test_four_devices(pointmaze):
    """JAX decides on its devices when it starts, so another process has four."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "tests/four_devices.py"]
    variables = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "POINTMAZE": str(pointmaze)}
    done = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]

"""Locks between processes, with and without a file system's help."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading

import ml_collections
import pytest
from filelock import SoftFileLock

from utils.errors import UserError
from utils.run.directory import RunDirectory, RunSpec
from utils.system import locks
from utils.system.files import ROOT

HOLD = """
import pathlib, sys, time
from utils.system import locks

lock = locks.take(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(99)
"""
# As on a file system that has none.
WITHOUT = "import fcntl\ndef flock(*_): raise OSError(38, 'Function not implemented')\nfcntl.flock = flock\n"


@pytest.fixture(params=errno.errorcode.keys() & set(locks.NO_LOCKS))
def no_locks(request, monkeypatch):
    """A file system without flock, in this process."""

    def flock(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    locks._say_soft.cache_clear()


@pytest.fixture
def holder(tmp_path):
    """Returns a function that starts a process which holds a lock, killed in the end."""
    started = []

    def start(path, code=HOLD):
        command = [sys.executable, "-c", code, str(path)]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.check
@pytest.mark.parametrize("code", [HOLD, WITHOUT + HOLD])
def test_a_live_holder_is_named_and_a_killed_one_holds_nothing(code, holder, tmp_path, monkeypatch):
    path = tmp_path / "new" / ".lock"
    if code != HOLD:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
    process, spec = holder(path, code), RunSpec(0, ml_collections.ConfigDict(), {}, path.parent)
    assert locks.is_held(path)
    with pytest.raises(UserError, match=rf"{path.parent}; wait .* \(process {process.pid} on {socket.gethostname()}\)"):
        RunDirectory(spec, {})
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not locks.is_held(path)
    files = RunDirectory(spec, {})
    assert locks.is_held(path)
    del files  # As at a program's end.
    assert not locks.is_held(path)


def test_without_locks_another_host_is_believed_and_the_line_says_what_to_remove(no_locks, tmp_path, capsys):
    path = tmp_path / ".lock"
    soft = tmp_path / ".lock.soft"
    locks.take(path).release()
    assert not soft.exists()
    assert capsys.readouterr().err.count("this file system has no locks") == 1
    soft.write_text("12\nelsewhere\n")
    with pytest.raises(locks.Held, match=f"process 12 on elsewhere; if that has ended, remove {soft}"):
        locks.take(path, 0)
    soft.unlink()
    locks.take(path).release()
    assert capsys.readouterr().err == ""


def test_other_faults_are_not_another_process(monkeypatch, tmp_path):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(UserError, match="Input/output error: cannot write"):
        locks.take(tmp_path / ".lock")


def test_looking_makes_no_files(tmp_path):
    assert not locks.is_held(tmp_path / ".lock") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("soft", [False, True])
def test_only_one_waits_and_says_for_whom(soft, tmp_path, capsys, request):
    if soft:
        monkeypatch = request.getfixturevalue("monkeypatch")
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "")))
    path, order = tmp_path / "x.lock", []
    held = locks.take(path)
    assert isinstance(held, SoftFileLock) == soft

    def second():
        with locks.exclusive_lock(path):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.5)
    order.append("first")
    held.release()
    thread.join(10)
    assert order == ["first", "second"]
    assert (
        f"Waiting: another process holds {path} (process {os.getpid()} on {socket.gethostname()})."
        in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())

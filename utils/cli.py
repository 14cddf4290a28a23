"""The command line: flags with one-line errors, and signals that end a run cleanly."""

import contextlib
import functools
import hashlib
import os
import platform
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from utils import platforms
from utils.agent_files import find_modules_in
from utils.errors import Diverged, UserError, failure, is_users, traceback_note


class Interrupted(Exception):
    """SIGTERM or SIGINT was received; `signum` says which."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class Signals:
    """Notes the first SIGTERM or SIGINT, so that the run can stop at the next safe point; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before = {signum: signal.signal(signum, self._note) for signum in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, signum: int, _: Any) -> None:
        self.received = signum
        signal.signal(signum, signal.SIG_DFL)
        print(f"\n{signal.Signals(signum).name}: saving at the next step boundary", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raises `Interrupted` if a signal came."""
        if self.received:
            raise Interrupted(self.received)

    def release(self) -> None:
        """Lets signals act as they did before."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def parse(argv: Sequence[str], values: flags.FlagValues) -> dict[str, str]:
    """Parses a command line into `values`, and returns what `--agent.<field>=<value>` set as field → text.

    Raises:
        UserError: an unknown flag, a value that does not fit, or a stray argument.
        SystemExit: with code 0, after --help was answered.
    """
    overrides, rest, arguments = {}, [argv[0]], list(argv[1:])
    if {"--help", "-h"}.intersection(arguments):
        print(sys.modules["__main__"].__doc__ or "", values.get_help(), sep="\n")
        sys.exit(0)
    while arguments:
        argument = arguments.pop(0)
        if argument.startswith("--agent."):
            field, equals, value = argument.removeprefix("--agent.").partition("=")
            if not equals and arguments and not arguments[0].startswith("--"):
                value = arguments.pop(0)
            overrides[field] = value
        else:
            rest.append(argument)
    try:
        stray = values(rest)[1:]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    if stray:
        raise UserError(f"stray argument '{stray[0]}'; flags are written --name=value")
    return overrides


def parse_arguments(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Parses a command line of flags and arguments, in any order, into `values`; returns the arguments.

    Raises:
        UserError: an unknown flag, or a value that does not fit.
        SystemExit: with code 0, after --help was answered.
    """
    if {"--help", "-h"}.intersection(argv):
        parse(argv, values)
    values.set_gnu_getopt()
    try:
        return values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error


def run_program(command: Sequence[str], name: str, end: int = signal.SIGTERM) -> None:
    """Runs another program to its end; on SIGTERM, it gets the signal `end`.

    Raises:
        UserError: it is not there, or failed. Interrupted: it was ended by a signal.
        SystemExit: with code 2, as it did: it has said in one line what the user's mistake is.
    """
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from error
    with child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.send_signal(end))
        try:
            code = child.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    if code < 0 or code > 128:
        raise Interrupted(-code if code < 0 else code - 128)
    if code == 2:
        sys.exit(2)
    if code:
        raise UserError(f"{name} ended with exit code {code}; start the same command again to go on")


_otherwise: Callable[..., None] = warnings.showwarning  # Shows what `_show_warning` does not.


def keep_compiled() -> None:
    """Lets later processes take what XLA compiles from ~/.cache/otql, unless JAX_COMPILATION_CACHE_DIR is set."""
    global _otherwise
    if warnings.showwarning is not _show_warning:
        _otherwise, warnings.showwarning = warnings.showwarning, _show_warning
    config: Any = jax.config  # Its options are added at run time.
    if config.jax_compilation_cache_dir:
        return
    # Code for one processor may be none for another, and a home directory is often shared.
    cpu, about = [platform.machine()], Path("/proc/cpuinfo")
    with contextlib.suppress(OSError):
        lines = about.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu += [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    digest = hashlib.sha256("".join(sorted(set(cpu))).encode()).hexdigest()[:12]
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(root / "otql" / f"compiled-{digest}"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _show_warning(message: Warning | str, *arguments: Any, **keywords: Any) -> None:
    """Shows a warning; those of JAX on the cache of compiled code, one a program and file, as a single line."""
    if "persistent compilation cache" not in str(message):
        _otherwise(message, *arguments, **keywords)
    else:
        config: Any = jax.config
        _say_uncached(str(config.jax_compilation_cache_dir), str(message).rpartition(": ")[2])


@functools.cache
def _say_uncached(directory: str, reason: str) -> None:
    advice = "JAX_COMPILATION_CACHE_DIR names another place"
    print(f"compiled anew, as {directory} is damaged or cannot be written ({reason}); {advice}", file=sys.stderr)


def discard_output() -> None:
    """Lets what is still to be flushed to stdout go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a program: invalid input ends in one line on stderr and exit code 2.

    Training that diverges ends in exit code 1, a signal in 128 + its number.
    """
    platforms.set_jax()
    keep_compiled()
    with contextlib.suppress(FileNotFoundError):  # Whose working directory is gone finds nothing there.
        find_modules_in(os.getcwd())
    try:
        platforms.check_xla_flags()
        main(sys.argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Diverged as divergence:
        print(divergence, file=sys.stderr)
        sys.exit(1)
    except Interrupted as interruption:
        print(f"{interruption}; start the same command again to go on", file=sys.stderr)
        sys.exit(128 + interruption.signum)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        if main is getattr(sys.modules["__main__"], "main", None):
            # XLA may be compiling, and would crash in the interpreter's teardown.
            sys.stderr.flush()
            os._exit(130)
        sys.exit(130)
    except BrokenPipeError:
        discard_output()  # Who reads it, such as `head`, has seen enough.
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        # Of the machine: what the program itself can mend or explain is a UserError by now.
        place = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{place}{traceback_note(error)}", file=sys.stderr)
        discard_output()
        sys.exit(2)
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            advice = "take a smaller --agent.batch_size or smaller networks, or fewer seeds at once"
            reason = " ".join(str(error).removeprefix("RESOURCE_EXHAUSTED:").split()) or "out of memory"
            print(f"error: {reason[:200]}; {advice}{traceback_note(error)}", file=sys.stderr)
            sys.exit(2)
        if (trouble := platforms.device_trouble()) or is_users(error):
            print(f"error: {trouble or failure(error, 'your own code')}", file=sys.stderr)
            sys.exit(2)
        error.add_note("This is a fault of the program, not of its user: please report it, with all the lines above.")
        raise

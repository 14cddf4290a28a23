"""The entry point of programs: one-line errors and exit codes. Imports no JAX, which some programs do without."""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from utils.errors import Diverged, UserError, failure, is_users, traceback_note
from utils.system.files import find_modules_in
from utils.system.signals import Interrupted


def discard_output() -> None:
    """Discards what is still to be flushed to stdout."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a program and ends it with its exit code: 0, or 2 after invalid input, which prints a one-line error.

    Training that diverges ends in exit code 1, a signal in 128 + its number. JAX is set up if `main`'s module has
    imported it.

    Args:
        main: the program; it gets `sys.argv`.
    """
    with contextlib.suppress(FileNotFoundError):  # The working directory may have been deleted.
        find_modules_in(os.getcwd())
    jax_setup = importlib.import_module("utils.system.jax_setup") if "jax" in sys.modules else None
    try:
        if jax_setup:
            jax_setup.set_jax()
            jax_setup.enable_compilation_cache()
            jax_setup.check_xla_flags()
        main(sys.argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Diverged as divergence:
        print(divergence, file=sys.stderr)
        sys.exit(1)
    except Interrupted as interruption:
        print(f"{interruption}; rerun the same command to resume", file=sys.stderr)
        sys.exit(128 + interruption.signum)
    except KeyboardInterrupt as interruption:
        print(str(interruption) or "interrupted", file=sys.stderr)
        if jax_setup and main is getattr(sys.modules["__main__"], "main", None):
            # XLA may be compiling, and would crash in the interpreter's teardown.
            sys.stderr.flush()
            os._exit(130)
        sys.exit(130)
    except BrokenPipeError:
        discard_output()  # The reader, such as `head`, has closed the pipe.
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        # A fault of the machine: others are a UserError by now.
        place = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{place}{traceback_note(error)}", file=sys.stderr)
        discard_output()
        sys.exit(2)
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            advice = "use a smaller --agent.batch_size, smaller networks, or fewer seeds at once"
            reason = " ".join(str(error).removeprefix("RESOURCE_EXHAUSTED:").split()) or "out of memory"
            print(f"error: {reason[:200]}; {advice}{traceback_note(error)}", file=sys.stderr)
            sys.exit(2)
        if (trouble := jax_setup.device_trouble() if jax_setup else "") or is_users(error):
            print(f"error: {trouble or failure(error, 'your code')}", file=sys.stderr)
            sys.exit(2)
        error.add_note("This is a bug of the program: please report it, with all the lines above.")
        raise

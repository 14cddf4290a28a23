"""Entry points of programs: one-line errors and exit codes."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from utils.errors import Diverged, UserError, failure, is_users, traceback_note
from utils.run.agent_files import find_modules_in
from utils.system.jax_setup import check_xla_flags, device_trouble, enable_compilation_cache, set_jax
from utils.system.signals import Interrupted


def discard_output() -> None:
    """Lets what is still to be flushed to stdout go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a program: invalid input ends in one line on stderr and exit code 2.

    Training that diverges ends in exit code 1, a signal in 128 + its number.
    """
    set_jax()
    enable_compilation_cache()
    with contextlib.suppress(FileNotFoundError):  # Whose working directory is gone finds nothing there.
        find_modules_in(os.getcwd())
    try:
        check_xla_flags()
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
        if (trouble := device_trouble()) or is_users(error):
            print(f"error: {trouble or failure(error, 'your own code')}", file=sys.stderr)
            sys.exit(2)
        error.add_note("This is a fault of the program, not of its user: please report it, with all the lines above.")
        raise

"""How a run ends: the exit code of each way, and one sentence, said by one process."""

import logging

from gtpo.errors import RecipeError
from gtpo.system import processes
from gtpo.system.console import print_end
from gtpo.system.signals import Interrupted, Interruption


class RunStopped(Exception):
    """An alarm or a limit stopped the run, as its recipe says; everything is saved."""


def end(error: BaseException, interruption: Interruption) -> int:
    """Say what ended the run, and return the exit code; an error that nobody foresaw is raised
    again, by one process.

    Several processes often end for the same reason, and those that did nothing wrong end because of
    the one that did.
    """
    if isinstance(error, (Interrupted, RunStopped)):
        interrupted = isinstance(error, Interrupted)
        if processes.is_first():
            # so that nobody who loses this process tells of it
            processes.first_to_say(str(error))
            print_end("interrupted" if interrupted else "stopped", error)
        processes.after_the_first()
        return error.exit_code if interrupted else 3
    # a launcher that ends the others must not cut off what is said here
    asked = interruption.over()
    if isinstance(error, processes.ProcessLost):
        # also after a SIGTERM: torchrun sends it when a process has died
        if processes.first_to_say(str(error), if_nobody_spoke=True):
            print_end("error", error)
            return 2
        return asked or 2
    if isinstance(error, RecipeError):
        if processes.first_to_say(str(error)):
            print_end("error", error)
        return 2
    # for the log file; the terminal gets it anyway
    logging.getLogger("gtpo.runs.progress").exception("The run failed")
    if processes.first_to_say(repr(error)):
        raise error
    return 1

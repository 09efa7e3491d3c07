"""The `metadist` command as a process: `python -m metadist`, and the console script."""

import signal
import sys
from typing import NoReturn

from metadist.cli.main import main
from metadist.core.errors import HeadLost
from metadist.core.garbage import look_rarely


def run() -> NoReturn:
    """Run the command and exit with its code. From then on a signal ends the process without a traceback."""
    look_rarely()
    try:
        code = main()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
    except HeadLost:
        from metadist.fleet.ray.cluster import exit_without_head

        exit_without_head(1)
    except KeyboardInterrupt:  # between the two
        code = 128 + signal.SIGINT
    sys.exit(code)


if __name__ == "__main__":
    run()

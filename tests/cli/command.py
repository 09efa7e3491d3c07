"""`metadist ...` in this process, as a shell in `cwd` would run it."""

import io
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

from metadist.cli.main import main


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What the command printed, and its exit code. The user's own modules are imported anew each time."""
    out, err = io.StringIO(), io.StringIO()
    modules, path = set(sys.modules), list(sys.path)
    try:
        with chdir(cwd), redirect_stdout(out), redirect_stderr(err):
            code = main(arguments)
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(cwd):
                del sys.modules[name]
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

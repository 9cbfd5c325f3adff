"""Run a command and pass its output on; while it says nothing, say every 3 s how long it has been running.

    python tools/heartbeat.py COMMAND [ARGUMENT ...]

Needs nothing but Python: it also watches the installation of everything else.
"""

import os
import selectors
import subprocess
import sys
import time

SILENCE = 3.0  # seconds


def run(command: list[str]) -> int:
    """Return the exit code of `command`, whose stdout and stderr are shown as they come."""
    started = spoke = time.monotonic()
    out = sys.stdout.fileno()
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
        selectors.DefaultSelector() as ready,
    ):
        ready.register(process.stdout, selectors.EVENT_READ)
        while True:
            if ready.select(timeout=max(0.0, spoke + SILENCE - time.monotonic())):
                output = os.read(process.stdout.fileno(), 65536)
                if not output:
                    break
                os.write(out, output)
            else:
                os.write(out, f"  ... {command[-1]}: {time.monotonic() - started:.0f} s\n".encode())
            spoke = time.monotonic()
    return process.returncode


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

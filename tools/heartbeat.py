"""Run a command and pass its output on; while it prints nothing, print every 10 s what it is at, and for how long.

    python tools/heartbeat.py LABEL COMMAND [ARGUMENT ...]

Needs nothing but Python: it also watches the installation of everything else.
"""

import os
import re
import selectors
import subprocess
import sys
import time

SILENCE = 10.0  # seconds
STAGE = re.compile(rb"Running stage '(\w+)'")  # as DVC says it


def run(label: str, command: list[str]) -> tuple[int, bytes]:
    """Run `command`, whose stdout and stderr are shown as they come; return its exit code and what it printed.

    Args:
        label: what the heartbeat says is running, until DVC names a stage.
    """
    started = spoke = time.monotonic()
    printed, out = b"", sys.stdout.fileno()
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
                printed += output
                if STAGE.search(output):
                    label, started = STAGE.findall(printed)[-1].decode(), time.monotonic()
            else:
                os.write(out, f"  ... {label}: {time.monotonic() - started:.0f} s\n".encode())
            spoke = time.monotonic()
    return process.returncode, printed


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1], sys.argv[2:])[0])
    except KeyboardInterrupt:
        sys.exit(130)

"""Run Python code in forks of one process: python tests/helpers/fetch_forks.py SOCKET.

huggingface_hub reads its environment when it is imported. So each fetch needs a process that has not imported it; but
it can be a fork of one that has imported what huggingface_hub and datasets import, which takes most of the time.
A connection to the socket sends a job as JSON, and gets the exit code.
"""

import importlib
import json
import os
import socket
import sys

from forks import fork

MODULES = (
    *("httpx2", "truststore", "filelock", "tqdm.auto", "yaml", "unittest.mock", "xml.etree.ElementTree"),
    *(
        "numpy",
        "pandas",
        "pyarrow.parquet",
        "pyarrow.dataset",
        "fsspec.implementations.local",
        "dill",
        "multiprocess.pool",
    ),
    *("xxhash", "gpt2lora.sources.hub"),
)


def main(path: str) -> None:
    for name in MODULES:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            reap()
            with connection:
                if os.fork() == 0:
                    server.close()
                    answer(connection)
                    os._exit(0)


def reap() -> None:
    """Wait for the children that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:  # there is none
        pass


def answer(connection: socket.socket) -> None:
    """Read a job, run it in a child process, and send its exit code."""
    with connection.makefile("rw") as stream:
        job = json.loads(stream.readline())
        with open(job["out"], "w") as out, open(job["err"], "w") as err:
            child = fork(lambda: run(**job["run"]), out, err)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, file=stream, flush=True)


def run(code: str, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Run code as `python -c` does."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__doc__": None})


if __name__ == "__main__":
    main(sys.argv[1])

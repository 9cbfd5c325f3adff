"""Make dvc.lock anew: that of the embedded sample, with params.yaml's values otherwise.

It tells DVC of what code and parameters the sample was last made; a test sees when it no longer is. Outputs are made in
a temporary folder and not kept.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import heartbeat

LOCK, GPT2, SAMPLE = "dvc.lock", "\npreset: gpt2 ", "\npreset: sample "


def main() -> int:
    os.chdir(Path(__file__).resolve().parent.parent)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
        for file in filter(os.path.isfile, listed.split("\0")):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file)
        (folder / LOCK).unlink(missing_ok=True)
        params = (folder / "params.yaml").read_text(encoding="utf-8")
        if GPT2 not in params:
            sys.exit("Error: params.yaml: preset is not gpt2, as it is for everyone: put it back, then make lock again")
        (folder / "params.yaml").write_text(params.replace(GPT2, SAMPLE), encoding="utf-8")
        subprocess.run(["git", "init", "--quiet", name], check=True)
        if code := heartbeat.run(["dvc", "--cd", name, "repro"]):
            return code
        shutil.copyfile(folder / LOCK, LOCK)
    print(f"{LOCK} is that of the sample as it is now: commit it with what you changed")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

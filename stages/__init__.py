"""The stages of the pipeline, in the order in which data flows through them:

base -> prepare -> tokenize -> train -> evaluate

Each is run as `python -m stages.NAME` from the root of the repository (never `python stages/NAME.py`:
as a script, stages/tokenize.py would shadow the standard library's `tokenize`).
"""

import importlib.util
import sys

# DVC starts the stages with whichever `python` comes first on PATH.
_absent = [name for name in ("click", "omegaconf") if importlib.util.find_spec(name) is None]
if _absent:
    sys.exit(
        f"Error: {sys.executable} has no {' and no '.join(_absent)}: activate the environment first "
        "(`. .venv/bin/activate`; `make install` creates it)"
    )

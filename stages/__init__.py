"""The stages of the pipeline, in the order in which data flows through them:

base -> prepare -> tokenize -> train -> evaluate

Each is run as `python -m stages.NAME` from the root of the repository, never as `python stages/NAME.py`: run as a
script, stages/tokenize.py would shadow the standard library's `tokenize`.
"""

import importlib.util
import sys

# DVC runs the stages with the first `python` on PATH, which may not be the environment's.
_missing = [name for name in ("click", "ruamel") if importlib.util.find_spec(name) is None]
if _missing:
    sys.exit(
        f"Error: {sys.executable} has no {' and no '.join(_missing)}: activate the environment first "
        "(`. .venv/bin/activate`; `make install` creates it)"
    )

"""The demo's training scripts are not part of the package, so their folder is added to the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "digits"))

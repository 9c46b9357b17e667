"""Make a release: `python tools/release.py wheel` builds and tries the wheel, `tag` also checks the tree and tags it.

wheel: an sdist, a wheel made from that sdist, and `llava-fast demo` run from the wheel in a fresh virtual environment.
tag: the tree must be clean, and CHANGELOG.md must begin with the version of llava_fast/version.py, with nothing left
under "Unreleased"; then `wheel`; then an annotated tag vX.Y.Z on the commit. Nothing is uploaded or pushed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TITLE = re.compile(r"^## \[?(?P<name>[^\]\s]+)\]?(?: - (?P<date>.+))?$", re.MULTILINE)


def version(root: Path) -> str:
    """Return the version of llava_fast/version.py without importing the package."""
    text = (root / "llava_fast" / "version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


def sections(changelog: str) -> list[tuple[str, str | None, str]]:
    """Return (version or "Unreleased", date, text) of each section, newest first."""
    titles = list(TITLE.finditer(changelog))
    ends = [title.start() for title in titles[1:]] + [len(changelog)]
    return [
        (title["name"], title["date"], changelog[title.end() : end].strip())
        for title, end in zip(titles, ends, strict=True)
    ]


def faults(root: Path) -> list[str]:
    """Return the problems that prevent a release of the tree at `root`, one line each."""
    new, found = version(root), sections((root / "CHANGELOG.md").read_text(encoding="utf-8"))
    wrong = []
    changes = _git(root, "status", "--porcelain")
    if changes:
        wrong.append(f"the tree is not clean: commit or remove\n{changes}")
    if f"v{new}" in _git(root, "tag", "--list").splitlines():
        wrong.append(f"the tag v{new} exists: raise __version__ in llava_fast/version.py")
    if found and found[0][0] == "Unreleased":
        if found[0][2]:
            wrong.append(f'CHANGELOG.md has entries under "Unreleased": move them under "## {new} - YYYY-MM-DD"')
        found = found[1:]
    name, day, _ = found[0] if found else ("no version", None, "")
    if name != new:
        wrong.append(f"CHANGELOG.md begins with {name}, llava_fast/version.py says {new}")
    elif not _is_date(day):
        wrong.append(f"CHANGELOG.md gives {day or 'no date'} for {new}: write YYYY-MM-DD")
    return wrong


def make_wheel(root: Path, output: Path) -> Path:
    """Build an sdist and a wheel from it in `output`, whose content is replaced. Returns the wheel."""
    shutil.rmtree(output, ignore_errors=True)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(output)!r})"
    _run([sys.executable, "-c", build], cwd=root)
    (sdist,) = output.glob("*.tar.gz")
    # No cache: pip would take the wheel of an earlier sdist of the same name.
    _run(
        [sys.executable, "-m", "pip", "wheel", "--no-cache-dir", "--no-deps", "--wheel-dir", output, sdist], cwd=output
    )
    (wheel,) = output.glob("*.whl")
    return wheel


def try_wheel(wheel: Path, constraints: Path) -> None:
    """Run the demo from the wheel, in an environment and a folder of its own. Raises CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "venv" / "bin" / "python"
        _run([sys.executable, "-m", "venv", python.parents[1]])
        _run([python, "-m", "pip", "install", "--quiet", "-c", constraints, f"{wheel}[demo]"])
        _run([python.with_name("llava-fast"), "demo"], cwd=folder, CUDA_VISIBLE_DEVICES="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("wheel", "tag"))
    what = parser.parse_args().what
    wrong = faults(ROOT) if what == "tag" else []
    if wrong:
        raise SystemExit("\n".join(wrong))
    wheel = make_wheel(ROOT, ROOT / "dist")
    try_wheel(wheel, ROOT / "constraints.txt")
    print(f"{wheel.relative_to(ROOT)} works")
    if what == "tag":
        name = f"v{version(ROOT)}"
        _run(["git", "-C", ROOT, "tag", "--annotate", name, "--message", f"llava_fast {name[1:]}"])
        print(f"tagged {name}; to publish: git push origin {name}, and upload dist/")


def _is_date(text: str | None) -> bool:
    try:
        return bool(date.fromisoformat(text or ""))
    except ValueError:
        return False


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def _run(command: list, cwd: Path | str | None = None, **environment: str) -> None:
    subprocess.run([str(word) for word in command], check=True, cwd=cwd, env={**os.environ, **environment})


if __name__ == "__main__":
    main()

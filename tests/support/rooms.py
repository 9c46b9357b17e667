"""The rooms of llava_fast and who imports whom, read from the source without importing it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPLIT = ("models", "inputs")  # folders whose files and folders are rooms of their own


def room_of(module: str) -> str:
    """`llava_fast.models.towers.vit` -> models/towers; `llava_fast.api` -> api; the package itself -> __init__."""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    return "/".join(parts[: 2 if parts[0] in SPLIT else 1])


def rooms(root: Path = ROOT) -> set[str]:
    """Every room that has a source file."""
    return {room_of(module) for module, path in _modules(root).items() if path.read_text(encoding="utf-8").strip()}


def imports(root: Path = ROOT) -> dict[tuple[str, str], str]:
    """(room, room it imports) -> one `file:line` where it does, also within functions and under TYPE_CHECKING."""
    modules = _modules(root)
    found: dict[tuple[str, str], str] = {}
    for module, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}:{node.lineno}: a relative import"
                assert node.module, f"{path}:{node.lineno}: a relative import"
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [name if name in (*modules, "llava_fast._C") else node.module for name in whole]
            else:
                continue
            for target in targets:
                if target.split(".")[0] == "llava_fast" and target != "llava_fast._C":
                    edge = (room_of(module), room_of(target))
                    if edge[0] != edge[1]:
                        found.setdefault(edge, f"{path.relative_to(root)}:{node.lineno}")
    return found


def _modules(root: Path) -> dict[str, Path]:
    paths = sorted((root / "llava_fast").rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}

"""Finds the training command in a shell script or a list of words, with the syntax that the published scripts use.

Supported are line continuations, comments, plain assignments, $NAME, ${NAME} and ${NAME//pattern/replacement}. Nothing
is executed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_fast.errors import RecipeError

_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_REFERENCE = re.compile(r"\$\{(\w+)(?://((?:\\.|[^/}])+)/([^}]*))?\}|\$(\w+)")
_TRAIN_SCRIPT = re.compile(r"(^|/)train\w*\.py$|^llava\.train\.train\w*$")
_GPUS = ("nproc_per_node", "num_gpus", "num_processes")
_NODES = ("nnodes", "num_nodes", "num_machines")


@dataclass(frozen=True)
class Command:
    """A training command: the train script, its arguments by name ("" for a flag without a value), and its number of
    GPUs (None if not stated)."""

    script: str
    arguments: dict[str, str]
    gpus: int | None


def read_command(words: Sequence[str]) -> Command:
    """The command in `words`, or in the shell script that is the only word. Raises RecipeError if there is none."""
    words = shlex.split(words[0]) if len(words) == 1 and " --" in words[0] else list(words)
    visible = ""
    if len(words) == 1 and not _TRAIN_SCRIPT.search(words[0]):
        words, visible = _command_of_script(Path(words[0]))
    for number, word in enumerate(words):
        if _TRAIN_SCRIPT.search(word):
            launcher = words[:number]
            set_here = [each.partition("=")[2] for each in launcher if each.startswith("CUDA_VISIBLE_DEVICES=")]
            visible = set_here[-1] if set_here else visible
            return Command(word, _arguments(words[number + 1 :]), _count(_arguments(launcher), visible))
    raise RecipeError("this is not a LLaVA training command: none of its words is a train script (train_mem.py)")


def _command_of_script(path: Path) -> tuple[list[str], str]:
    """(words of the first training command, the value of CUDA_VISIBLE_DEVICES before it)."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path} cannot be read as a script ({error.strerror})") from None
    known: dict[str, str] = {}
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(_expand(line, known), comments=True)
        except ValueError as error:
            raise RecipeError(f"{path}: this line cannot be read ({error}): {line.strip()[:80]}") from None
        if any(_TRAIN_SCRIPT.search(word) for word in words):
            return words, known.get("CUDA_VISIBLE_DEVICES", "")
        for word in words:
            if (found := _ASSIGNMENT.fullmatch(word)) is not None:
                known[found[1]] = found[2]
    raise RecipeError(f"{path} has no LLaVA training command: no line of it runs a train script (train_mem.py)")


def _expand(line: str, known: dict[str, str]) -> str:
    """The line with known variables expanded; unknown ones are left unchanged."""

    def value(found: re.Match) -> str:
        name, pattern, replacement = found[1] or found[4], found[2], found[3]
        if name not in known:
            return found[0]
        if pattern is None:
            return known[name]
        return known[name].replace(re.sub(r"\\(.)", r"\1", pattern), replacement)

    return _REFERENCE.sub(value, line)


def _arguments(words: Sequence[str]) -> dict[str, str]:
    """Parse --name value, --name=value and --name; dashes in names become underscores."""
    found: dict[str, str] = {}
    name = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value
            name = None if equals else name
        elif name is not None:
            found[name] = f"{found[name]} {word}".strip()
    return found


def _count(launcher: dict[str, str], visible: str) -> int | None:
    each = next((launcher[name] for name in _GPUS if name in launcher), None)
    nodes = next((launcher[name] for name in _NODES if name in launcher), "1")
    if each is None and (included := launcher.get("include")):  # deepspeed: localhost:0,1,2,3
        each = str(sum(len(host.partition(":")[2].split(",")) for host in included.split("@")))
    if each is None and visible:
        each = str(len(visible.split(",")))
    # The words after a launcher's option ("--nproc_per_node 8 script") include the script: the first is the value.
    each, nodes = (each or "").split(" ")[0], nodes.split(" ")[0]
    return int(each) * int(nodes) if each.isdecimal() and nodes.isdecimal() else None

"""For mkdocs: pages that are kept outside docs/ join the site, links between files become links between pages, and a
page that would fetch anything from elsewhere is an error."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {  # page of the site: file of the project
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "benchmarks.md": "benchmarks/README.md",
    "demo_model.md": "llava_fast/demo_model/README.md",
}
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
FETCHED = re.compile(
    r"""<(?:script|img|iframe)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b[^>]*\brel=["']?(?:stylesheet|preload|preconnect)\b[^>]*//"""
)


def on_files(files: Files, config) -> Files:
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    return relink(markdown, page.file.src_uri)


def on_post_build(config) -> None:
    for path in Path(config["site_dir"]).rglob("*.html"):
        found = FETCHED.search(path.read_text(encoding="utf-8"))
        if found:
            raise PluginError(f"{path} fetches something from elsewhere: {found[0]}")


def relink(markdown: str, page: str) -> str:
    """Links to files of the project become links to their pages; a file without one keeps its text, and its path."""
    pages = {source: name for name, source in OUTSIDE.items()}
    source = OUTSIDE.get(page, f"docs/{page}")

    def replaced(link: re.Match) -> str:
        path, hash_, anchor = link["target"].partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return link[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not os.path.exists(ROOT / there):
            return link[0]  # mkdocs says that it is broken
        name = pages.get(there, there.removeprefix("docs/") if there.startswith("docs/") else None)
        if name is None:
            return link["text"] if link["text"].strip("`") == there else f"{link['text']} (`{there}`)"
        return f"[{link['text']}]({posixpath.relpath(name, posixpath.dirname(page) or '.')}{hash_}{anchor})"

    return LINK.sub(replaced, markdown)

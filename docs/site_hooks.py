"""What mkdocs does beside its own: pages may link to any file of the repository, and the settings get a page.

A link that leaves docs/, as [results](../benchmarks/RESULTS.md), works in the repository as it is. For the site the
file is carried along under its own path and the link is bent to it; so are those of the pages carried along.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
BLOCK = re.compile(r"^\[tool\.flwr\.app\.config\]\n(.*?)^# --- end", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^# (\S+): (.*)\n((?:\S+ = .*\n)+)", re.MULTILINE)
SETTING = re.compile(r"^(\S+) = (.*?)  # (.*)$", re.MULTILINE)
SETTINGS_HEAD = """# Settings

One schema for the options of the commands (`--learning-rate 0.03`), TOML files (`zofed train settings.toml`) and
Flower's run config. `zofed settings` prints them as a TOML file to start from, `zofed settings SECTION` those of one
section. (zo) and the like: modes that read it.
"""
TABLE_HEAD = """
## {}

{}.

| setting | default | what it is |
| --- | --- | --- |
"""


def home(page: str, target: str) -> str:
    """The path from the repository's root that a link on a page means, as the page lies in the repository."""
    folder = posixpath.dirname(page) if (ROOT / page).is_file() else "docs"
    return posixpath.normpath(posixpath.join(folder, target))


def place(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return path.removeprefix("docs/")


def on_files(files: Files, config: Any) -> Files:
    """Add the page of settings, and every file outside docs/ that a page links to, and those that these link to."""
    block = BLOCK.search((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert block, "pyproject.toml has no block of settings"
    content = SETTINGS_HEAD
    for name, about, lines in SECTION.findall(block[1]):
        content += TABLE_HEAD.format(name, about[0].upper() + about[1:])
        content += "".join(f"| `{key}` | `{value}` | {what} |\n" for key, value, what in SETTING.findall(lines))
    files.append(File.generated(config, "settings.md", content=content))
    waiting = [file.src_uri for file in files.documentation_pages()]
    waiting += [name for name in pages_of(config.nav) if (ROOT / name).is_file()]
    while waiting:
        page = waiting.pop()
        source = ROOT / page if (ROOT / page).is_file() else ROOT / "docs" / page
        if (ROOT / page).is_file() and files.get_file_from_path(page) is None:
            files.append(File(page, str(ROOT), config.site_dir, config.use_directory_urls))
        if source.suffix != ".md" or not source.is_file():
            continue
        for target in LINK.findall(source.read_text(encoding="utf-8")):
            path = home(page, target)
            if (ROOT / path).is_file() and files.get_file_from_path(place(path)) is None:
                waiting.append(place(path))
    return files


def pages_of(nav: Any) -> list[str]:
    """All pages that a table of contents names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_of(part)]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Bend links that leave docs/ to where their files lie in the site."""
    own = page.file.src_uri

    def bent(match: re.Match[str]) -> str:
        path = home(own, match[1])
        if not (ROOT / path).exists():
            return match[1]
        return posixpath.relpath(place(path), posixpath.dirname(own) or ".")

    return LINK.sub(bent, markdown)

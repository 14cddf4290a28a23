"""Links of the documentation that leave docs/: pages are written for GitHub, the site has its own places for them."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
# Files outside docs/ that are pages of the site, too.
PAGES = ("real/README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie outside docs/."""
    for path in PAGES:
        files.append(File.generated(config, path, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Returns a page whose links to files outside docs/ lead to the site's copy, to the API, or are plain text."""
    source = page.file.src_uri
    folder = posixpath.dirname(source if source in PAGES else f"docs/{source}")
    documented = set(re.findall(r"^::: ([\w.]+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M))
    here = posixpath.dirname(source)

    def replace(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        absolute = posixpath.normpath(posixpath.join(folder, path))
        module = absolute.removesuffix(".py").replace("/", ".")
        if absolute.startswith("docs/"):
            own = absolute.removeprefix("docs/")
        elif absolute in PAGES:
            own = absolute
        elif absolute.endswith(".py") and module in documented:
            own, hash_, anchor = "api.md", "#", module
        else:
            return text
        return f"{image}[{text}]({posixpath.relpath(own, here or '.')}{hash_}{anchor})"

    # GitHub needs three spaces to continue an item of a list, Python-Markdown four.
    return LINK.sub(replace, re.sub(r"(?m)^ {3}(?=\S)", " " * 4, markdown))

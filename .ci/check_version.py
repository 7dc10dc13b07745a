"""Whether a tag may be released: python .ci/check_version.py v1.2.3

The package, its citation and the changelog must name its version.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = {
    "gn_fast/__init__.py": r'^__version__ = "(.+?)"',
    "CITATION.cff": r"^version: (.+)",
    "CHANGELOG.md": r"^## \[(\d.*?)\]",
}


def main(tag):
    found = {
        name: re.search(pattern, (ROOT / name).read_text(), re.MULTILINE) for name, pattern in PLACES.items()
    }
    versions = {name: match and match[1] for name, match in found.items()}
    wrong = {name: version for name, version in versions.items() if f"v{version}" != tag}
    print(*(f"{name} has {version}, not the tag's {tag}" for name, version in wrong.items()), sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""The built manual in a browser: python docs/look.py docs/_build [folder for pictures]

Each page at the width of a desktop and of a phone, in light and in dark; it fails where one is wider than its window.
After pip install playwright && playwright install chromium; a Chromium that is on the path is taken before that.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
WIDER = """() => document.scrollingElement.scrollWidth - window.innerWidth"""


def main(site, pictures=None):
    """Look at all pages; returns how many are too wide."""
    wide = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for size, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                for path in sorted(Path(site).rglob("*.html")):
                    page.goto(path.resolve().as_uri())
                    over = page.evaluate(WIDER)
                    if over > 0:
                        wide += 1
                        print(f"{path.relative_to(site)}, {size}, {scheme}: {over} pixels too wide")
                    if pictures:
                        name = "-".join(path.relative_to(site).with_suffix("").parts)
                        Path(pictures).mkdir(parents=True, exist_ok=True)
                        page.screenshot(path=Path(pictures, f"{name}-{size}-{scheme}.png"), full_page=size == "desktop")
                page.close()
        browser.close()
    return wide


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:])))

"""Looks at the built manual in a browser: python docs/look.py build/manual [folder for pictures]

Every page at a desktop's and a phone's width, light and dark: nothing may be wider than the page. Needs
`pip install '.[browser]'` and a Chromium: playwright's (`playwright install chromium`) or the system's.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTHS = (1280, 390)
# What lies in a box of the article that scrolls by itself, as tables, formulas and code do, may be wider.
WIDER = """() => {
    const article = document.querySelector("article")
    const scrolls = e => getComputedStyle(e).overflowX !== "visible"
    const boxed = e => e !== article && (scrolls(e) || boxed(e.parentElement))
    const beyond = [...article.querySelectorAll("*")]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !boxed(e.parentElement))
        .map(e => e.outerHTML.slice(0, 80))
    const width = document.scrollingElement.scrollWidth
    return width > innerWidth ? [`${width} pixels`, ...beyond] : beyond
}"""


def main(site, pictures=None):
    pages = sorted(Path(site).glob("*.html"))
    failed = 0
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        for width in WIDTHS:
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
                tab = context.new_page()
                for page in pages:
                    tab.goto(page.absolute().as_uri())
                    for wider in tab.evaluate(WIDER):
                        failed += 1
                        print(f"{page.name} at {width}, {scheme}: {wider}")
                    if pictures:
                        name = f"{page.stem}-{width}-{scheme}.png"
                        tab.screenshot(path=Path(pictures, name), full_page=True)
                context.close()
        browser.close()
    print(f"{len(pages)} pages, {failed} wider than they should be")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Pages of results as one HTML file that needs nothing else: no script, no font; for light and dark displays."""

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --page: #ffffff; --card: #f6f8fa; --rule: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --page: #14181d; --card: #1c2128; --rule: #3d444d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .25rem; }
p { margin: .4rem 0; } .soft, figcaption { color: var(--soft); font-size: .875rem; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9em; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .75rem 0; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } .wide table { min-width: 44rem; }
figure { margin: 1rem 0 2rem; }
img { background: #fff; border-radius: 4px; max-width: 100%; padding: .5rem; }
@media (max-width: 40rem) { body { padding: 1rem .75rem; } th, td { padding: .3rem .35rem; } }
"""


def html_page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A page with its title as first heading.

    Args:
        title: plain text.
        parts: of the body, as HTML; empty ones are left out.
        style: CSS beside that of all pages, which has the classes "soft", "number" and "wide".
    """
    title = escape(title)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}'
    body = "\n".join([f"<h1>{title}</h1>", *filter(None, parts)])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</title>\n<style>{_STYLE}{style}</style></head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )

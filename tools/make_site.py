"""The notebooks as a web site that needs no network: `python tools/make_site.py [--out site]`.

Nothing is run: pages show the outputs that the notebooks store, with their players. The folder can be opened
from disk or put on any static host: index.html, a page per notebook, the documents, the files that pages link
to, and MathJax out of the wheel django-static-mathjax (of the dev extra), which holds nothing else. Ends with
an error if a link of a page leads nowhere.
"""

import argparse
import html
import itertools
import posixpath
import re
import shutil
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from urllib.parse import unquote

import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/recipes.md", "docs/state.md", "docs/wavegrad2.md")
DOCUMENTS = ("README.md", *PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "LICENSES.md")
PARTS = {  # first number of a notebook: the part that begins with it
    "00": "The ground: runs, sound, text, speech", "04": "Diffusion, and what a voice promises",
    "05": "WaveGrad 2", "10": "Denoising as decisions", "11": "Grad-TTS", "20": "Rewards", "30": "Methods",
    "39": "The loop", "42": "A run: settings, inputs, cost", "44": "Training a base",
    "47": "Speaking, comparing, judging", "52": "Pages and commands", "60": "Proof", "70": "Experiments",
}  # fmt: skip
DIRECTIVE = re.compile(r"^#\|\s*(.+)\n?", re.MULTILINE)


@dataclass
class Page:
    "A notebook or document, and the page that it becomes."

    source: Path
    name: str  # of the page, from the folder of the site: experiments/70_tiny_dlpo.html
    title: str = ""
    summary: str = ""

    def __post_init__(self):
        text = self.source.read_text(encoding="utf-8")
        if self.source.suffix == ".ipynb":
            text = "".join(nbformat.reads(text, as_version=4).cells[0].source)
        self.title = re.search(r"^# (.+)$", text, re.MULTILINE)[1]
        self.summary = " ".join(re.findall(r"^> (.+)$", text, re.MULTILINE))

    @property
    def number(self):
        "20a of 20a_formula; empty for what is not of the map."
        found = re.match(r"\d+[a-z]*(?=_)", posixpath.basename(self.name))
        return found[0] if found else ""


def all_pages(notebooks):
    "Pages of the notebooks in their order, and of the documents."
    pages = [Page(path, path.relative_to(ROOT / "nbs").with_suffix(".html").as_posix()) for path in notebooks]
    return pages + [Page(ROOT / name, name.lower().replace(".md", ".html")) for name in DOCUMENTS]


def parts_of(pages):
    "(name of a part, its pages), in order."
    groups = {}
    for page in pages:
        if page.number:
            first = max(number for number in PARTS if number <= page.number)
            groups.setdefault(PARTS[first], []).append(page)
    return groups.items()


def inline(text):
    "Markdown of one paragraph as HTML without the paragraph."
    return markdown2html(text).strip().removeprefix("<p>").removesuffix("</p>")


class Site:
    "Where each file of the checkout lies on the site; the files that pages link to are copied on the way."

    def __init__(self, out, pages):
        self.out, self.pages = out, pages
        self.names = {page.source: page.name for page in pages}

    def address(self, page, link):
        "Where a link of a notebook or document leads; None if the site has nothing to show there."
        if re.match(r"[a-z]+:|#", link) or not link:
            return link
        path, _, place = link.partition("#")
        target = (page.source.parent / unquote(path)).resolve()
        if target.is_dir() and (target / "README.md").exists():
            target = target / "README.md"
        if target in self.names:
            name = self.names[target]
        elif target.is_file() and target.is_relative_to(ROOT):
            name = "files/" + target.relative_to(ROOT).as_posix()
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, self.out / name)
        else:
            return None
        return self.way(page, name) + (f"#{place}" if place else "")

    def way(self, page, name):
        "From one page to another file of the site."
        return posixpath.relpath(name, posixpath.dirname(page.name) or ".")

    def link(self, page, other):
        return f'<a href="{self.way(page, other.name)}">{html.escape(other.title)}</a>'

    def relinked(self, page, body):
        "A page's body, links led to pages of the site or to players; text alone where there is nothing."

        def link(match):
            address = self.address(page, html.unescape(match[1]))
            if address is None:
                return f"<span{match[2]}>{match[3]}</span>"
            if address.endswith((".mp3", ".flac")):
                player = f'<audio controls preload="none" src="{html.escape(address)}"></audio>'
                return f'<span class="sound">{match[3]} {player}</span>'
            return f'<a href="{html.escape(address)}"{match[2]}>{match[3]}</a>'

        def source(match):
            return f'{match[1]}"{html.escape(self.address(page, html.unescape(match[2])) or match[2])}"'

        body = re.sub(r'<a href="([^"]*)"([^>]*)>(.*?)</a>', link, body, flags=re.DOTALL)
        return re.sub(r'(<(?:img|audio)[^>]*? src=)"((?!data:)[^"]*)"', source, body)


def shown_cells(notebook):
    """The cells for readers: without directives, and without what those hide; exported code is marked."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            directives = DIRECTIVE.findall(cell.source)
            cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
            tags = cell.metadata.setdefault("tags", [])
            tags += ["exported"] if any(d.startswith("export") for d in directives) else []
            if any(d.startswith("echo: false") for d in directives):
                tags.append("silent")
            silent = "silent" in tags or not cell.source
            if any(d.startswith("hide") for d in directives) or silent and not cell.outputs:
                continue
        cells.append(cell)
    notebook.cells = cells
    return notebook


def stackable(body):
    "Tables of sentences are marked, and their cells know their columns: rows stack on a narrow screen."

    def table(match):
        heads = [
            re.sub("<[^>]+>", "", head) for head in re.findall(r"<th[^>]*>(.*?)</th>", match[0], re.DOTALL)
        ]
        filled = re.findall(r"<td[^>]*>(.*?)</td>", match[0], re.DOTALL)
        longest = max((len(re.sub("<[^>]+>", "", cell)) for cell in filled), default=0)
        if len(heads) < 3 or longest < 40:
            return match[0]
        columns = itertools.cycle(heads)
        marked = re.sub("<td", lambda _: f'<td data-label="{html.escape(next(columns))}"', match[0])
        return marked.replace("<table>", '<table class="sentences">')

    return re.sub(r"<table>.*?</table>", table, body, flags=re.DOTALL)


def body_of(page, exporter):
    "The HTML of a notebook or document."
    text = page.source.read_text(encoding="utf-8")
    if page.source.suffix == ".md":
        return f'<div class="cell text_cell">{markdown2html(text)}</div>'
    body, _ = exporter.from_notebook_node(shown_cells(nbformat.reads(text, as_version=4)))
    return body


def neighbours(site, page):
    "Links to the pages before and after."
    order = [p for p in site.pages if p.source.suffix == ".ipynb"]
    if page not in order:
        return ""
    at = order.index(page)
    before = order[at - 1] if at else None
    after = order[at + 1] if at + 1 < len(order) else None
    links = [
        f'<a class="{kind}" rel="{kind}" href="{site.way(page, p.name)}"><small>{word}</small>'
        f"{html.escape(p.title)}</a>"
        if p
        else "<span></span>"
        for kind, word, p in (("prev", "Before", before), ("next", "Next", after))
    ]
    return f'<nav class="neighbours" aria-label="Neighbours">{"".join(links)}</nav>'


def contents(site, page):
    "All pages by parts, for the side of a page; the part of this page is open."
    blocks = []
    for name, members in parts_of(site.pages):
        rows = "".join(
            f'<li><a href="{site.way(page, p.name)}"{" aria-current=page" if p is page else ""}>'
            f"<small>{p.number}</small> {html.escape(p.title)}</a></li>"
            for p in members
        )
        state = " open" if page in members else ""
        blocks.append(f"<details{state}><summary>{html.escape(name)}</summary><ol>{rows}</ol></details>")
    documents = "".join(
        f'<li><a href="{site.way(page, p.name)}">{html.escape(p.source.name)}</a></li>'
        for p in site.pages
        if p.source.suffix == ".md"
    )
    return "".join(blocks) + f"<details><summary>Documents</summary><ol>{documents}</ol></details>"


def all_notebooks(site, page):
    "The list at the end of the index: each notebook with its summary."
    parts = "".join(
        f"<h3>{html.escape(name)}</h3><dl>"
        + "".join(
            f"<dt><small>{p.number}</small> {site.link(page, p)}</dt><dd>{inline(p.summary)}</dd>"
            for p in members
        )
        + "</dl>"
        for name, members in parts_of(site.pages)
    )
    return f'<section class="all"><h2 id="All-notebooks">All notebooks</h2>{parts}</section>'


def page_html(site, page, body):
    "A whole page."
    home = site.way(page, "index.html")
    extra = all_notebooks(site, page) if page.name == "index.html" else ""
    math = (site.way(page, "mathjax/tex-chtml.js"), site.way(page, "mathjax.js"))
    title = "dlpo_nb" if page.name == "index.html" else f"{page.title} · dlpo_nb"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="description" content="{html.escape(page.summary)}">
<link rel="stylesheet" href="{site.way(page, "style.css")}">
<script src="{math[1]}"></script><script defer src="{math[0]}"></script></head>
<body><header><a class="home" href="{home}">dlpo_nb</a>
<details class="menu"><summary>Contents</summary><nav>{contents(site, page)}</nav></details></header>
<div class="columns"><aside><nav aria-label="Contents">{contents(site, page)}</nav></aside>
<main>{body}{extra}
{neighbours(site, page)}
<footer>From <code>{page.source.relative_to(ROOT).as_posix()}</code>, Apache-2.0.
Equations by MathJax (Apache-2.0).</footer></main></div></body></html>
"""


def copy_mathjax(out):
    "MathJax, its fonts and the extensions that it loads on demand, from the installed wheel."
    try:
        listed = files("django-static-mathjax") or []
    except PackageNotFoundError:
        sys.exit("error: the equations need the package django-static-mathjax: pip install -e '.[dev]'.")
    wanted = re.compile(
        r"/mathjax/(?:es5/)?(LICENSE|tex-chtml\.js|output/chtml/fonts/.*\.woff|input/tex/extensions/.*)$"
    )
    for file in listed:
        if found := wanted.search(file.as_posix()):
            target = out / "mathjax" / found[1]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.locate(), target)


class Links(HTMLParser):
    "What a page links to and loads, and the places in it that can be linked to."

    def __init__(self, text):
        super().__init__()
        self.targets, self.places = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places |= {given.get("id"), given.get("name")}
        self.targets += [given[key] for key in ("href", "src") if given.get(key)]


def dead_links(out):
    "Sorted 'page: link' for each link or file within the site that is not there."
    pages = {path.resolve(): Links(path.read_text(encoding="utf-8")) for path in out.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.targets:
            if re.match(r"[a-z]+:", link):
                continue
            name, _, place = link.partition("#")
            target = (path.parent / unquote(name)).resolve() if name else path
            known = target not in pages or not place or unquote(place) in pages[target].places
            if not (target.is_file() and known):
                dead.append(f"{path.relative_to(out.resolve())}: {link}")
    return sorted(dead)


def make(out, notebooks):
    "Write the site of these notebooks (paths, in order) into the folder `out`; returns the dead links."
    pages = all_pages(notebooks)
    site, exporter = Site(out, pages), HTMLExporter(template_name="basic", anchor_link_text="#")
    exporter.register_filter("clean_html", lambda text: text)  # takes half of the time; code is ours
    out.mkdir(parents=True, exist_ok=True)
    for page in pages:
        target = out / page.name
        target.parent.mkdir(parents=True, exist_ok=True)
        body = site.relinked(page, stackable(body_of(page, exporter)))
        target.write_text(page_html(site, page, body), encoding="utf-8")
    folder = Path(__file__).with_name("site")
    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    style = (folder / "style.css").read_text(encoding="utf-8")
    (out / "style.css").write_text(style + colours + "\n", encoding="utf-8")
    shutil.copyfile(folder / "mathjax.js", out / "mathjax.js")
    copy_mathjax(out)
    return dead_links(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder to write; emptied first")
    out = parser.parse_args().out
    if out.exists() and any(out.iterdir()) and not (out / "mathjax.js").exists():
        sys.exit(
            f"error: {out} holds something that is not a site of this tool; give another folder by --out."
        )
    shutil.rmtree(out, ignore_errors=True)
    numbered = sorted((ROOT / "nbs").rglob("[0-9]*.ipynb"))
    dead = make(out, [ROOT / "nbs" / "index.ipynb", *numbered])
    print(f"{out / 'index.html'}: {len(numbered) + 1} notebooks")
    if dead:
        sys.exit("error: links that lead nowhere:\n" + "\n".join(dead))


if __name__ == "__main__":
    main()

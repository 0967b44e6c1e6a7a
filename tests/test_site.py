"""The web site: made from stored outputs, whole without a network, with no link that leads nowhere."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
make_site = pytest.importorskip(
    "make_site", reason="nbconvert is not installed here: pip install -e '.[dev]'"
)
NOTEBOOKS = [ROOT / "nbs" / name for name in ("index.ipynb", "07_decoder.ipynb", "47_say.ipynb")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Index, a notebook of equations, and one of sound."""
    try:
        make_site.files("django-static-mathjax")
    except make_site.PackageNotFoundError:
        pytest.skip("MathJax is not installed here: pip install -e '.[dev]'")
    out = tmp_path_factory.mktemp("site")
    made = make_site.make(out, NOTEBOOKS)
    return out, made


def read(site, name):
    return (site[0] / name).read_text(encoding="utf-8")


def test_no_link_is_dead(site):
    assert not site[1], site[1]


def test_pages_have_the_stored_outputs(site):
    stored = nbformat.read(NOTEBOOKS[2], as_version=4)
    players = sum(str(output).count("<audio") for cell in stored.cells for output in cell.get("outputs", []))
    assert players and read(site, "47_say.html").count("<audio") == players
    assert "data:image/png;base64," in read(site, "index.html")


def test_nothing_is_fetched_from_a_network(site):
    for name in ("index.html", "07_decoder.html", "47_say.html", "readme.html", "style.css", "mathjax.js"):
        text = re.sub(r'<a href="[^"]*"', "", read(site, name))
        assert not re.search(r'(?:src|href)="(?:https?:)?//|url\((?!data:)|@import', text), name
    assert (site[0] / "mathjax" / "tex-chtml.js").stat().st_size > 500_000
    assert len(list((site[0] / "mathjax").rglob("*.woff"))) > 10


def test_equations_are_left_to_mathjax_and_code_is_code(site):
    page = read(site, "07_decoder.html")
    assert page.count("$$") >= 2 and '<div class="highlight' in page
    assert "#| export" not in page and "celltag_exported" in page


def test_pages_lead_on(site):
    page = read(site, "07_decoder.html")
    (after,) = re.findall(r'<a class="next" rel="next" href="([^"]+)"', page)
    (before,) = re.findall(r'<a class="prev" rel="prev" href="([^"]+)"', page)
    assert (before, after) == ("index.html", "47_say.html")
    assert re.findall(r'href="([^"]+)" aria-current=page', page) == ["07_decoder.html"] * 2


def test_a_cell_may_hide_its_code(site):
    page = read(site, "index.html")
    assert "celltag_silent" in page and ".celltag_silent .input { display: none }" in read(site, "style.css")


def test_tables_of_sentences_stack_and_tables_of_numbers_do_not():
    table = "<table><thead><tr><th>a</th><th><code>b</code></th><th>c</th></tr></thead><tr>{}</tr></table>"
    long = make_site.stackable(table.format("<td>1</td><td>" + "word " * 20 + "</td><td>2</td>"))
    assert long.startswith('<table class="sentences">') and re.findall('data-label="(.)"', long) == list(
        "abc"
    )
    numbers = table.format("<td>1</td><td>2.5</td><td>3</td>")
    assert make_site.stackable(numbers) == numbers


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<h2 id="here">x</h2><a href="b.html#gone">b</a><img src="c.png">')
    (tmp_path / "b.html").write_text('<a href="a.html#here">a</a><a href="https://example.org/gone">out</a>')
    assert make_site.dead_links(tmp_path) == ["a.html: b.html#gone", "a.html: c.png"]


def test_a_folder_with_something_else_is_not_emptied(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(sys, "argv", ["make_site.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="not a site"):
        make_site.main()
    assert (tmp_path / "thesis.txt").exists()


def test_the_whole_site_is_made(site, tmp_path):
    command = [sys.executable, "tools/make_site.py", "--out", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr  # a dead link among them
    pages = {path.stem for path in (tmp_path / "site").rglob("*.html")}
    assert {path.stem for path in (ROOT / "nbs").rglob("*.ipynb")} <= pages

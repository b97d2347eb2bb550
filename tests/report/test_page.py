from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from evatune.errors import EvaError
from evatune.report.page import Picture, Section, Table, Verbatim, write_page
from evatune.tables import Group, linked


def picture() -> Picture:
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([1, 2])
    return Picture(figure=figure, alt='a "rising" line', caption="It rises.")


@pytest.fixture
def page(tmp_path) -> str:
    table = Table(headers=["run", "loss"], rows=[["EVA <1>", 0.25], ["LoRA", None]], caption="Both runs.")
    content = ["One & `two`.\n\nThree.", table, picture(), Verbatim(text="a  b\n<c>")]
    path = write_page(
        tmp_path / "sub" / "index.html", title="A & B", lead="Lead.", sections=[Section(title="First", content=content)]
    )
    assert [child.name for child in path.parent.iterdir()] == ["index.html"]
    return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_has_headings_in_order(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert [tag for tag, _ in reader.seen if re.fullmatch(r"h\d", tag)] == ["h1", "h2"]
    assert dict(reader.seen)["html"] == {"lang": "en"}


def test_the_page_needs_nothing_from_elsewhere(page):
    reader = Reader()
    reader.feed(page)
    tags = {tag for tag, _ in reader.seen}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base"}
    addresses = [value for _, attributes in reader.seen for key, value in attributes.items() if key in ("src", "href")]
    assert len(addresses) == 1
    assert addresses[0].startswith("data:image/svg+xml;base64,")
    assert not re.search(r"https?:|@import|url\(", page)


def test_pictures_have_a_text_and_a_size(page):
    reader = Reader()
    reader.feed(page)
    image = dict(reader.seen)["img"]
    assert image["alt"] == 'a "rising" line'
    assert (image["width"], image["height"]) == ("192", "96")


def test_text_is_escaped_and_parted(page):
    assert "<p>One &amp; <code>two</code>.</p>\n<p>Three.</p>" in page
    assert "<h1>A &amp; B</h1>" in page
    assert '<p class="lead">Lead.</p>' in page
    assert "a  b\n&lt;c&gt;</pre>" in page


def test_tables_say_which_cells_are_titles_and_which_are_numbers(page):
    assert '<tr><th scope="row">EVA &lt;1&gt;</th><td class="number">0.25</td></tr>' in page
    assert '<tr><th scope="row">LoRA</th><td class="number">–</td></tr>' in page
    assert "<figcaption>Both runs.</figcaption>" in page


def test_a_table_without_titles_has_no_head(tmp_path):
    def written(*headers: str) -> str:
        table = Table(headers=headers, rows=[["seed", "0"]])
        return write_page(tmp_path / "x.html", title="t", sections=[Section(title="s", content=[table])]).read_text()

    assert "<thead>" not in written("", "")
    assert '<thead><tr><td></td><th scope="col" class="number">EVA</th></tr></thead>' in written("", "EVA")


def test_a_table_of_many_columns_lies_on_its_side_on_paper(tmp_path):
    for n_columns, is_broad in ((10, False), (11, True)):
        table = Table(headers=[f"task{number}" for number in range(n_columns)], rows=[[1] * n_columns])
        path = write_page(tmp_path / "x.html", title="t", sections=[Section(title="s", content=[table])])
        assert ('<figure class="broad">' in path.read_text()) is is_broad


def test_groups_of_rows_are_bodies_that_links_lead_to(tmp_path):
    groups = [Group(name="a 1", title="A & one", n_rows=2), Group(name="b", title="B", n_rows=1)]
    rows = [["a0", 1], ["a1", linked(2, "#runs-b")], ["b0", 3]]
    table = Table(name="runs", headers=["run", "score"], rows=rows, groups=groups)
    path = write_page(tmp_path / "x.html", title="t", sections=[Section(title="s", content=[table])])
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(re.sub("<script>.*</script>", "", text, flags=re.DOTALL))
    bodies = [attributes for tag, attributes in reader.seen if tag == "tbody"]
    assert [body["id"] for body in bodies] == ["runs-a-1", "runs-b"] and {body["tabindex"] for body in bodies} == {"-1"}
    assert '<tr class="group"><th scope="rowgroup" colspan="2">A &amp; one</th></tr>' in text
    assert text.index("A &amp; one") < text.index(">a0<") < text.index(">a1<") < text.index(">B<") < text.index(">b0<")
    assert '<td class="number"><a href="#runs-b">2</a></td>' in text


def test_a_table_that_does_not_fit_leaves_the_page_as_it_was(tmp_path):
    path = tmp_path / "index.html"
    path.write_text("old")
    with pytest.raises(EvaError, match="row 0 of the table has 2 cells, the header has 1"):
        write_page(path, title="t", sections=[Section(title="s", content=[Table(headers=["a"], rows=[[1, 2]])])])
    assert path.read_text() == "old"

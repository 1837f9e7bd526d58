"""A parser for the HTML reports of `llama inspect`."""

from html.parser import HTMLParser


class ReportReader(HTMLParser):
    """Parses an HTML token report and checks that its elements nest.

    texts, cards, classes and marks have an entry for each token, and one for the prediction after the last token.
    used has every start tag with its attributes.
    """

    VOID = ("meta",)

    def __init__(self, content: str):
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str]] = []
        self.used: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cards: list[str] = []
        self.classes: list[list[str]] = []
        self.marks: list[list[str | None]] = []
        self.title = ""
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs)
        self.used.append((tag, given))
        kinds = (given.get("class") or "").split()
        if "t" in kinds:
            assert given["tabindex"] == "0" and self.open[-1][0] == "main"
            self.classes.append(kinds)
            self.texts.append("")
            self.cards.append("")
            self.marks.append([])
        if tag == "i":
            self.marks[-1].append(given["data-s"])
        if tag not in self.VOID:
            self.open.append((tag, "card" if "card" in kinds else "t" if "t" in kinds else ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        within = [kind for _, kind in self.open]
        if "card" in within:
            self.cards[-1] += data
        elif "t" in within:
            self.texts[-1] += data
        elif self.open and self.open[-1][0] == "main":
            raise AssertionError(f"text between tokens: {data!r}")
        elif self.open and self.open[-1][0] == "title":
            self.title += data

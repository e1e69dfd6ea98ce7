"""Pages of HTML, taken apart."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """A page taken apart: each element is closed, and nothing is fetched."""

    def __init__(self, content):
        super().__init__()
        self.open, self.count, self.addresses, self.cells, self.words = [], {}, [], [], []
        self.content = content
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "img", "br", "wbr"):
            self.open.append(tag)
        if tag in ("td", "b", "dd"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "b", "dd"} & set(self.open):
            self.cells[-1] += data

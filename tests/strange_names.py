"""Class names that somebody's data may hold: markup, formulas, quotes, other alphabets, what cannot be seen."""

from html.parser import HTMLParser

SEEN = (
    '<img src=x onerror="window.hacked=1">',
    "</td><script>window.hacked=1</script>",
    "$x^$",
    "$5",
    "\\frac",
    "\\(x\\) and $$y$$",
    "\"double\" and 'single'",
    "a|b `c` *d* __e__ ~f~",
    "[link](javascript:alert(1)) ![picture](https://example.com/x.png)",
    "https://example.com www.example.com",
    "a&amp;b {c} %s",
    "猫",
    "犬",
    "🐱",
    "T-shirt/top",
    "--- # a_b",
)
UNSEEN = ("two\nlines", "\u202etxt.exe", "tab\tbell\a", "\x1b[31mred", "")  # data.load refuses these
ALL = SEEN + UNSEEN


class Page(HTMLParser):
    """What a browser would make of HTML: the ``tags`` that open, and the ``cells`` of tables as text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data

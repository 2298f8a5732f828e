"Every view with text that nobody has vetted: it is on the page as text, and nothing of it is markup."
import re
from html.parser import HTMLParser
import pytest, torch
from _workbench import HOSTILE
from jumprelu_nb.browse.comparing import compare_view, match, training_view
from jumprelu_nb.browse.finding import Hit, map_view, search, search_view
from jumprelu_nb.browse.latent import facts, kinds, latent_view, message
from jumprelu_nb.browse.svg import curves, histogram, scatter
from jumprelu_nb.browse.tokens import css, hidden, shown, styled, widths
from jumprelu_nb.browse.turning import Trial, steer_view
from jumprelu_nb.browse.prompt import Reading, prompt_view
from jumprelu_nb.interpret.latents import LatentStats
from jumprelu_nb.interpret.steering import StrengthCurve
from jumprelu_nb.sae.model import SAE

TAGS = {"div", "span", "style", "b", "small", "br", "a", "table", "thead", "tbody", "tr", "td", "th", "svg", "g", "rect", "line", "text", "tspan", "title", "circle", "polyline"}
ATTRIBUTES = {"class", "style", "title", "role", "href", "dir", "colspan", "viewbox", "width", "height", "aria-label", "aria-live", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "rx", "dx", "fill", "fill-opacity", "stroke", "stroke-width",
              "stroke-opacity", "stroke-dasharray", "stroke-linejoin", "text-anchor", "opacity", "points", "transform", "font-weight", "text-decoration"}


class Reader(HTMLParser):
    "Parses as a browser would; keeps text, and complains about every tag and attribute that a view has no use for."
    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.said, self.open, self.wrong = [], [], []
        self.feed(html); self.close()
    def handle_starttag(self, tag, attrs):
        if tag not in TAGS: self.wrong.append(tag)
        self.wrong += [f"{tag} {k}" for k, _ in attrs if k not in ATTRIBUTES and not k.startswith("data-")]
        self.wrong += [f"{tag} {k}={v}" for k, v in attrs if k == "href" and not str(v).startswith("#") or k == "style" and "url" in str(v)]
        self.said += [v for k, v in attrs if k == "title" and v]
        if tag not in ("br", "rect", "line", "circle") or tag in ("rect", "circle"): self.open.append(tag)
        if tag in ("br", "line"): self.open = self.open[:-1] if self.open[-1:] == [tag] else self.open
    def handle_startendtag(self, tag, attrs): self.handle_starttag(tag, attrs); self.open = self.open[:-1] if self.open[-1:] == [tag] else self.open
    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.wrong.append(f"/{tag} closes nothing")
    def handle_data(self, data): self.said.append(data)
    def handle_comment(self, data): self.wrong.append("a comment")


def check(html, *texts):
    r = Reader(html)
    assert not r.wrong, r.wrong[:5]
    assert not r.open, r.open
    unseen = re.compile("[" + "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in hidden if a > 0x20) + "\0\ufeff]")
    assert not unseen.search(html), "a character that cannot be seen"
    whole = "".join(r.said)
    for t in texts: assert shown(t) in whole or shown(t, 24) in whole or shown(t, 30) in whole, f"{t!r} is not on the page"


@pytest.fixture(scope="module")
def stats():
    "Three latents on contexts of hostile tokens; the last is dead."
    s = LatentStats(3, top_k=20, sample=20, window=(3, 2))
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(HOSTILE), (12, 8), generator=g); ids[0] = torch.arange(8); ids[1] = torch.arange(len(HOSTILE) - 8, len(HOSTILE))
    acts = torch.rand(12, 8, 3, generator=g) * torch.tensor([5., .1, 0.]); acts[2:, ::2] = 0
    s.update(ids, acts)
    s.strings = dict(enumerate(HOSTILE))
    s.effects = torch.randint(0, len(HOSTILE), (3, 2, 8), generator=g).int()
    s.about = dict(model_name="<b>model", site="</style>")
    return s


@pytest.fixture(scope="module")
def sae(): return SAE(8, 3).init_(seed=0).requires_grad_(False)


@pytest.mark.parametrize("kind", kinds)
@pytest.mark.parametrize("width", widths)
def test_latent(stats, kind, width):
    for newlines in (False, True):
        for i in range(3): check(latent_view(stats, i, kind, width, newlines, 20, threshold=.05, bandwidth=.02, label="<script>", note="</div><b>", link=lambda j: f"#f={j}"), "<script>", "</div><b>")
    check(latent_view(stats, 0, kind, "full", n=100), *[HOSTILE[k] for k in (0, 1, 2, 3, 4, 5, 6, 12)])


def test_a_later_store():
    "The names of a store that knows more are used where they are there"
    from types import SimpleNamespace as N
    from jumprelu_nb.interpret.latents import LatentStats
    s = LatentStats(2)
    s.update(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, 2)); s.strings = {0: "<x>"}
    c = s[0].top[0]
    c.document, c.offset, c.effect = 3, 9, -.25
    more = N(**vars(s[0])); more.strata = [N(low=.5, high=1., count=4, contexts=[c]), N(low=0., high=.5, count=0, contexts=[])]
    more.promoted, more.promoted_by, more.suppressed, more.suppressed_by = ["<u>", "b"], [2.5, .1], ["c"], [-1.5]
    more.neighbours, more.partners, more.threshold, more.pre_histogram = [(1, .7)], [(1, -.2), (-1, 0.)], .5, [1, 2, 3]

    class Later:
        tokens, frequency, max, pre_edges, pre_unit, threshold = 4, s.frequency, s.max, [-1., 0., 1., 2.], torch.tensor([.5, .5]), torch.tensor([.5, .5])
        def __len__(self): return 2
        def __getitem__(self, i): return more
    f = facts(Later(), 0)
    assert f.pre == ([0., .5, 1., 1.5], [1., 2., 3.]) and f.partners == [(1, -.2)] and f.promoted[0] == ("<u>", 2.5)
    html = latent_view(Later(), 0, "strata", link=lambda j: f"#f={j}")
    check(html, "<u>", "<x>")
    for t in ("4 firings", "document 3, token 9", "changes by -0.250", "+2.50", "−1.50", 'href="#f=1"', "none kept"): assert t in html, t


def test_search(stats):
    for q in HOSTILE: check(search_view(stats, *search(stats, q, "all"), query=q, notes={0: dict(label=q, star=True)}, link=lambda j: f"#f={j}"))
    hits, many = search(stats, HOSTILE[0], "all")
    assert many and hits[0].latent in (0, 1)
    check(search_view(stats, [Hit(i, "<why>".replace("<", "").replace(">", ""), 0.) for i in range(3)], 3, theta=torch.ones(3)), "↵", "⇥")
    check(search_view(stats, [], 0, query="<script>"), "<script>")
    assert search(stats, "\0")[1] >= 0 and search(stats, "²")[1] == 0 and search(stats, "99999999999999999999")[1] == 0


def test_map(stats): check(map_view(stats, (torch.randn(3, 2), .5), torch.ones(3), 1))


def test_prompt_and_steer(stats):
    n = len(HOSTILE)
    r = Reading(list(range(n)), HOSTILE, [{0: 1., 1: .2}] * n, [{0: -1., 1: .5}] * n, HOSTILE[::-1], [None, *[1.] * (n - 1)])
    for p in (None, *range(n)): check(prompt_view(r, p, "effect", latent=0, stats=stats, link=lambda j: f"#f={j}"), HOSTILE[0])
    check(prompt_view(Reading([0], ["<b>"], [{}], [{}], ["<i>"], [None])), "<b>")
    c = StrengthCurve([0., 1.], [0., float("nan")], [1., float("inf")], 1., torch.zeros(2, 4), 3)
    check(steer_view(Trial(0, 1., "clamp", "all", HOSTILE[0], HOSTILE[0] + "".join(HOSTILE), "</div>", c, HOSTILE[:8], HOSTILE[8:]), 2.), HOSTILE[0], "</div>")


def test_compare_and_training(stats, sae):
    check(compare_view(stats, stats, match(sae, sae), 0, ("<b>A", "</div>"), ({"<FVU>": .1}, {}), link=lambda j: f"#f={j}"), "<b>A", "</div>")
    check(training_view([dict(tokens=k, l0=1. / k, fvu=float("nan"), dead=None, theta_10="<b>" if k == 0 else 1.) for k in range(1, 5)], 3., 10))
    check(training_view([{}, dict(tokens="<b>")]))
    check(message("<script>" + "x" * 5000), "<script>"[:5])


def test_figures():
    check(histogram([0, 1, 2], [0, 0], {"<b>": .5}), "<b>")
    check(curves({"<b>": ([1, 2], [1, float("nan")]), "c": ([1, 2], [2, 1])}, {"<i>": 1.}, x_title="<u>", dots=True), "<b>", "<i>", "<u>")
    check(scatter([1., 2.], [1., 2.], names=HOSTILE[:2], groups={"<g>": [0]}, chosen=1), "<g>", HOSTILE[0])
    check(histogram([1, 1, 1], [1, 1])); check(curves({"a": ([1], [1])})); check(scatter([1.], [1.], log_x=True, log_y=True))


def test_the_style_sheet_asks_for_nothing():
    assert not re.search(r"url\(|@import|expression|</", css) and styled("").count("<style>") == 1
    for rule in re.findall(r"(?:^|})([^{}@]+){", re.sub(r"@media[^{]*{", "", css)): assert all(s.strip().startswith(".jr") for s in rule.split(",")), f"{rule!r} would style the page around"


def test_the_check_checks():
    for bad in ("<script>x</script>", "<img src=x>", "<b onclick='x'>y</b>", '<a href="javascript:x">y</a>', "<b>", "</b>", "\u202e", "<!-- x -->"):
        with pytest.raises(AssertionError): check(bad)

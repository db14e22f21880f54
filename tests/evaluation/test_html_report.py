"""The page: what it says, that it needs nothing else, and that a browser shows it as it should."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from made_up_records import MadeUp, MadeUpEvaluation

from hf_poss.evaluation import html_report
from hf_poss.evaluation.authored_texts import authored_texts
from hf_poss.evaluation.figures import COLORS, DARK_COLORS
from hf_poss.evaluation.headline import headline
from hf_poss.evaluation.html_report import report_page, write_report
from hf_poss.evaluation.results import compute_results


pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

VOID = {"meta", "link", "br", "img", "hr", "input", "path", "use"}


class Page(HTMLParser):
    """Elements as (tag, attributes, own text), with a check that tags are closed in their order."""

    def __init__(self, content: str):
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[tuple[str, dict, list[str]]] = []
        self.feed(content)
        self.close()
        assert not self.open, "tags that are not closed"

    def handle_starttag(self, tag, attributes):
        element = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def all(self, tag: str, **attributes: str) -> list[tuple[dict, str]]:
        return [
            (of, "".join(text)) for name, of, text in self.elements if name == tag and attributes.items() <= of.items()
        ]


@pytest.fixture(scope="module")
def evaluation() -> MadeUpEvaluation:
    drafters = [
        MadeUp("prompt-lookup", [0.2], kind="prompt-lookup", rho=1.1),
        MadeUp("PosS-1", [0.8, 0.7, 0.7, 0.6, 0.6, 0.6, 0.6], n=1, checkpoints=2),
        MadeUp("PosS-<2>", [0.9, 0.8, 0.8, 0.7], n=2),
    ]
    return MadeUpEvaluation(drafters, turns=2)


@pytest.fixture(scope="module")
def folder(evaluation, tmp_path_factory):
    folder = evaluation.write(tmp_path_factory.mktemp("evaluation") / "run")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def content(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(content) -> Page:
    return Page(content)


def test_everything_is_written(folder):
    assert {"results.json", "table.md", "report.html", "tau.png", "pos_acc.png"} <= {
        path.name for path in folder.iterdir()
    }
    results = compute_results(folder)
    assert json.loads((folder / "results.json").read_text()) == results
    assert (folder / "table.md").read_text().startswith(headline(results))
    assert (folder / "tau.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_same_records_give_the_same_bytes(tmp_path):
    evaluation = MadeUpEvaluation([MadeUp("PosS-2", [0.8, 0.6])], {"gsm8k": 4})
    one, other = (evaluation.write(tmp_path / f"{files} files", files=files) for files in (1, 2))
    written = write_report(one)
    for path in write_report(other, tmp_path / "out"):
        assert path.parent == tmp_path / "out" and path.read_bytes() == (one / path.name).read_bytes(), path.name
    assert len(written) == len(list((tmp_path / "out").iterdir())) and not (other / "report.html").exists()


def test_the_page_needs_nothing_else(content, page):
    assert not page.all("script") and not page.all("link") and not page.all("img")
    addresses = [
        value for _, of, _ in page.elements for name, value in of.items() if name in ("src", "href", "xlink:href")
    ]
    assert addresses and all(address.startswith("#") for address in addresses)
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", content) and "@import" not in content
    names = {of["id"] for _, of, _ in page.elements if "id" in of}
    assert {address[1:] for address in addresses} <= names


def test_names_are_used_once(page):
    names = [of["id"] for _, of, _ in page.elements if "id" in of]
    assert len(names) == len(set(names))


def test_the_page_can_be_heard(page):
    assert page.all("html")[0][0]["lang"] == "en" and len(page.all("h1")) == 1
    headings = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in zip(headings, headings[1:], strict=False))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scope" in of for of, _ in page.all("th"))
    names = {of["id"]: "".join(text) for _, of, text in page.elements if "id" in of}
    drawings = page.all("svg")
    assert len(drawings) == len(page.all("figcaption")) == 6
    assert all(of["role"] == "img" and len(names[of["aria-labelledby"]]) > 30 for of, _ in drawings)


def test_the_page_says_what_was_run(content, page, evaluation):
    about = evaluation.about()
    assert page.all("pre")[0][1] == about["command"]
    text = "".join(text for _, text in page.all("body"))
    for told in (about["hardware"], "torch 2.13.0", "me/<target>", "12.0M parameters, float32", "PosS-1-1"):
        assert told in text
    assert "me/<target>" not in content  # escaped


def test_the_page_says_what_was_found(page, folder):
    results = compute_results(folder)
    text = "".join(text for _, text in page.all("body"))
    assert headline(results) in text
    assert f"{results['decodings'][0]['mean']['PosS-<2>']['tau_macro']:.2f}" in text
    of = results["decodings"][0]
    lists = [of["comparisons"], of["comparisons_over_checkpoints"], *of["comparisons_by_benchmark"].values()]
    compared = [comparison for comparisons in lists for comparison in comparisons]
    verdicts = [text for _, text in page.all("td", **{"class": "verdict"})]
    assert len(verdicts) == len(compared)
    for verdict, comparison in zip(verdicts, compared, strict=True):
        expected = ("higher" if comparison["difference"] > 0 else "lower") if comparison["significant"] else "not sig"
        assert verdict.startswith(expected)
    assert {verdict[:3] for verdict in verdicts} >= {"hig", "not"}  # some of both


@pytest.mark.parametrize(("name", "title"), [("../models/tiny/", "tiny"), ("me/tiny", "me/tiny"), ("/a/b", "b")])
def test_the_title_is_the_target_without_folders(folder, name, title):
    results = json.loads((folder / "results.json").read_text())
    results["evaluation"]["target"]["name"] = name
    assert f"<title>Speculative decoding of {title}</title>" in report_page(results, [], [])


def test_texts_are_what_the_models_wrote(page, folder, evaluation):
    """Joined, the tokens are the answer, whatever HTML it holds; each is marked by who wrote it."""
    records = {(r.drafter, r.benchmark): r for r in reversed(evaluation.records()) if r.question == "0"}
    answers = [(of, text) for of, text in page.all("div") if of.get("class") == "answer"]
    titles = [text for _, text in page.all("summary") if "question" in text]
    assert len(answers) == len(titles) == 2 * 2 * 2  # sets, drafters of specialists, turns
    for title, (_, text) in zip(titles, answers, strict=True):
        benchmark, turn, drafter = re.fullmatch(r"(\w+), question 0, turn (\d): (.*)", title).groups()
        record = records[drafter, benchmark]
        assert (record.temperature, record.checkpoint) == (0.0, 0)
        assert text == "".join(record.turns[int(turn) - 1].pieces)


def test_authors_are_those_of_the_records(folder, evaluation):
    texts = authored_texts(folder, evaluation.about())
    record = next(r for r in evaluation.records() if (r.drafter, r.benchmark) == ("PosS-<2>", "gsm8k"))
    text = next(text for text in texts if text.title == "gsm8k, question 0, turn 1: PosS-<2>")
    authors = record.turns[0].authors
    assert [piece.position for piece in text.pieces] == authors
    assert [piece.specialist for piece in text.pieces] == [None if a == 0 else (a - 1) // 2 for a in authors]
    assert dict(text.shares)["target"] == authors.count(0)
    assert dict(text.shares)["specialist 2"] == authors.count(3) + authors.count(4)


def test_a_long_text_says_what_it_leaves_out(tmp_path):
    evaluation = MadeUpEvaluation([MadeUp("PosS-2", [0.5, 0.5])], {"gsm8k": 1}, tokens=1000)
    (text,) = authored_texts(evaluation.write(tmp_path), evaluation.about())
    total = len(evaluation.records()[1].turns[0].token_ids)
    assert len(text.pieces) < total and len(text.pieces) + text.left_out == total
    assert sum(count for _, count in text.shares) == total


def test_specialists_are_told_apart_without_colour(content):
    styles = re.findall(
        r"^\.s(\d+) \{ text-decoration: underline (\w+) .*?text-decoration-thickness: (\w+);", content, re.M
    )
    assert len(styles) == 7 and len({style[1:] for style in styles}) == 7


def test_dark_and_printed_pages_have_their_colours(content):
    light, dark = content.split("@media screen and (prefers-color-scheme: dark)", 1)
    for name in COLORS:
        assert f"--{name}: {COLORS[name]};" in light and f"--{name}: {DARK_COLORS[name]};" in dark
    assert "@media print" in content and "print-color-adjust: exact" in content


def test_missing_packages_are_named(folder, monkeypatch):
    monkeypatch.setattr(html_report, "_PACKAGES", ("json", "no_such_package"))
    with pytest.raises(ValueError, match=r"needs no_such_package: pip install 'hf-poss\[evaluation\]'"):
        write_report(folder)


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on PATH")
    return found


def test_a_browser_shows_the_page_without_scrolling_sideways(chromium, content, tmp_path):
    """In frames of a phone's, a tablet's and a desktop's width; a script writes down what came out."""
    (tmp_path / "report.html").write_text(content, encoding="utf-8")
    (tmp_path / "frames.html").write_text(
        """<body><script>
        const widths = [360, 768, 1280], found = [];
        for (const width of widths) {
            const frame = document.createElement("iframe");
            frame.src = "report.html"; frame.width = width; frame.height = 800;
            frame.onload = () => {
                const page = frame.contentDocument, clipped = [], sizes = [];
                for (const svg of page.querySelectorAll("svg")) {
                    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
                    for (const text of svg.querySelectorAll("text")) {
                        const own = text.getBoundingClientRect();
                        if (own.left < box.left - 1 || own.right > box.right + 1) clipped.push(text.textContent);
                        sizes.push(scale * parseFloat(frame.contentWindow.getComputedStyle(text).fontSize));
                    }
                }
                found.push([width, page.documentElement.scrollWidth, clipped, Math.min(...sizes)]);
                if (found.length == widths.length) document.title = JSON.stringify(found.sort((a, b) => a[0] - b[0]));
            };
            document.body.append(frame);
        }
        </script></body>""",
        encoding="utf-8",
    )
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-sync", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    dom = subprocess.run(
        [*command, (tmp_path / "frames.html").as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    title = re.search(r"<title>(.*?)</title>", dom, re.S)
    assert title, f"the browser gave no answer: {dom[:300]!r}"
    for width, scroll_width, clipped, smallest in json.loads(title.group(1)):
        assert scroll_width <= width
        assert clipped == []
        assert smallest >= 9

import json
import math
import re
from html.parser import HTMLParser

import pytest

from ropewalk.core.errors import ConfigError
from ropewalk.metrics import report, writers
from tests.metrics import fake_run

_VOID = {"meta", "br"}


class Page(HTMLParser):
    """Parses a page, insists that tags close in order, keeps attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "tiny <1>"
    rows = fake_run.write(directory)
    path = report.write_report(directory)
    text = path.read_text(encoding="utf-8")
    return directory, rows, text, Page(text)


def charts_in(text):
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    return [json.loads(block) for block in blocks]


def test_the_page_is_whole_and_asks_nothing_of_a_network(run):
    _, _, text, page = run
    assert page.tags[0][0] == "html"
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not [attrs for _, attrs in page.tags if "src" in attrs or "href" in attrs]
    assert text.count("<script>") == 1  # our own; those of charts are typed as data


def test_what_the_model_wrote_is_text_and_never_markup(run):
    _, _, text, page = run
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert "<script>alert('Exit')</script>" in page.text  # as read by a person
    assert "tiny <1>" in page.text


def test_curves_hold_the_extremes_of_what_was_written(run):
    _, rows, text, _ = run
    loss, bits, throughput, rate, norm = charts_in(text)
    for chart, line, name in (
        (loss, 0, "loss"),
        (throughput, 0, "tokens_per_s"),
        (rate, 0, "learning_rate"),
        (norm, 0, "grad_norm"),
    ):
        points = chart["lines"][line]["points"]
        drawn = [y for _, y in points if y is not None]
        written = [row[name] for row in rows if math.isfinite(row[name])]
        assert 500 <= len(points) <= 1000
        assert min(drawn) == pytest.approx(min(written), rel=1e-4)
        assert max(drawn) == pytest.approx(max(written), rel=1e-4)
        assert points[-1][0] == 1200
        assert chart["y"][0] <= min(drawn) and chart["y"][1] >= max(drawn)
    assert [x for x, _ in bits["lines"][0]["points"]] == list(range(100, 1201, 100))


def test_svg_paths_have_one_vertex_for_each_point(run):
    _, _, text, page = run
    paths = [attrs for tag, attrs in page.tags if tag == "path" and "dots" not in attrs["class"]]
    lines = [line for chart in charts_in(text) for line in chart["lines"]]
    assert len(paths) == len(lines) == 8
    for attrs, line in zip(paths, lines, strict=True):
        assert attrs["class"] == line["role"]
        finite = [y for _, y in line["points"] if y is not None]
        assert len(re.findall("[ML]", attrs["d"])) == len(finite)


def test_headline_figures_are_the_last_ones_written(run):
    directory, rows, _, page = run
    evals = [
        row
        for row in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in row
    ]
    words = " ".join(page.text.split())
    assert f"{evals[-1]['eval_bits_per_byte']:.3f} bits per byte" in words
    assert f"Held-out loss {evals[-1]['eval_loss']:.3f}" in words
    assert f"Tokens 2.46M {rows[-1]['tokens']:,}" in words
    assert "finished after 1,200 steps" in words
    assert "1,200 2 skipped" in words
    middle = sorted(row["tokens_per_s"] for row in rows)[599:601]
    assert f"Tokens per second {sum(middle) / 2:,.0f}" in words
    assert "of this CPU's measured bfloat16 product rate" in words


def test_skipped_steps_and_resumptions_are_marked_at_their_place(run):
    _, _, _, page = run
    marks = [attrs for tag, attrs in page.tags if attrs.get("class", "").startswith("mark ")]
    assert len(marks) == 3 * 5  # 2 skipped steps and a resumption in each of the charts
    lefts = {(attrs["class"], attrs["style"]) for attrs in marks}
    assert ("mark skipped", "left: 35.9%") in lefts
    assert ("mark resumed", "left: 50.0%") in lefts


def test_the_recipe_is_shown_letter_for_letter(run):
    _, _, _, page = run
    assert fake_run.RECIPE in page.text


def test_a_huge_run_is_thinned_and_only_its_last_line_may_be_torn(tmp_path):
    rows = fake_run.write(tmp_path, steps=20_000, skipped=(15_000,))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20001, "loss": 99')
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    Page(text)
    loss = charts_in(text)[0]["lines"][0]["points"]
    assert len(loss) <= 1000
    finite = [row["loss"] for row in rows if math.isfinite(row["loss"])]
    assert max(y for _, y in loss if y is not None) == pytest.approx(max(finite), rel=1e-4)
    assert len(text) < 500_000


def test_wall_time_leaves_out_the_time_between_sessions(tmp_path):
    lines = [{"step": 0, "event": "started", "time": 100.0}]
    lines += [{"step": step, "loss": 1.0, "time": 100.0 + step} for step in range(1, 11)]
    lines += [{"step": 10, "event": "started", "time": 9000.0}]
    lines += [{"step": step, "loss": 1.0, "time": 8990.0 + step} for step in range(11, 21)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.read_history(tmp_path).wall_s == pytest.approx(20.0)


@pytest.mark.parametrize("content", [None, "", '{"step": 0, "event": "started"}\n', "not json\n"])
def test_a_run_before_its_first_step_gets_a_page(tmp_path, content):
    (tmp_path / "recipe.yml").write_text(fake_run.RECIPE)
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    page = Page(report.write_report(tmp_path).read_text(encoding="utf-8"))
    assert "no step has been recorded yet" in page.text
    assert charts_in(page.text) == []


def test_a_run_of_one_step_and_one_of_nothing_but_nan(tmp_path):
    for name, loss in (("one", 2.0), ("nan", math.nan)):
        (tmp_path / name).mkdir()
        lines = writers.JsonLines(tmp_path / name)
        lines.write(1, {"loss": loss, "grad_norm": loss})
        lines.close()
        Page(report.write_report(tmp_path / name).read_text(encoding="utf-8"))


def test_a_run_that_reached_its_target_says_so_and_shows_a_step_sampled_twice_once(tmp_path):
    lines = writers.JsonLines(tmp_path)
    lines.write(40, {"loss": 1.0})
    lines.sample(40, "Once", " first")
    lines.sample(40, "Once", " second")
    lines.event(40, "target")
    lines.close()
    page = Page(report.write_report(tmp_path).read_text(encoding="utf-8"))
    assert "reached its target after 40 steps" in page.text
    assert page.text.count("Once") == 1
    assert "Once second" in page.text


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run: it holds neither"):
        report.write_report(tmp_path)

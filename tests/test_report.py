"""Results to table and plot."""

import base64
import json
import math
import re

import numpy
import pytest
from conftest import BIN, failure, run

from fairseq_alibi.__main__ import main
from fairseq_alibi.evaluation.curves import pool_positions, read_curves
from fairseq_alibi.evaluation.paper import paper_section, read_paper
from fairseq_alibi.evaluation.report import html_page, write_report


@pytest.fixture
def results(tmp_path):
    """Writes a result file: `results("alibi", {(128, 128): 30.0})`."""

    def write(method, perplexities, folder="run", training_length=128, subset="valid"):
        path = tmp_path / folder / f"{method}.json"
        path.parent.mkdir(exist_ok=True)
        content = {
            "model": {
                "checkpoint": str(tmp_path / folder / method / "checkpoint.pt"),
                "position_method": method,
                "training_length": training_length,
            },
            "subset": subset,
            "results": [{"length": n, "stride": s, "perplexity": p} for (n, s), p in perplexities.items()],
        }
        path.write_text(json.dumps(content))
        return path

    return write


def test_table_has_a_row_per_length_and_a_column_per_model(results, tmp_path):
    files = [
        results("alibi", {(128, 128): 32.345, (1024, 1024): 31.5, (1024, 256): 31.25}),
        results("sinusoidal", {(128, 128): 38.9, (2048, 2048): 77.7}),
    ]
    out = run(BIN / "fairseq-alibi", "report", *files, "--output", tmp_path / "report").output
    rows = [line.split() for line in out.splitlines()]
    assert ["128", "32.34", "38.90"] in rows or ["128", "32.35", "38.90"] in rows
    assert ["1,024", "31.50", "31.25"] in rows
    assert ["2,048", "77.70"] in rows
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert markdown.splitlines()[2].startswith("|")
    assert "| alibi, trained on 128, stride 256 |" in " ".join(markdown.split())
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.md", "report.png"]


def test_models_of_the_same_kind_are_told_apart(results):
    files = [results("alibi", {(128, 128): 32.0}, folder) for folder in ("seed1", "seed2")]
    labels = [one.label for one in read_curves(files)]
    assert labels == [f"alibi, trained on 128 ({folder}/alibi/checkpoint.pt)" for folder in ("seed1", "seed2")]
    both = [results("alibi", {(128, 128): 32.0}, "seed1"), results("sinusoidal", {(128, 128): 32.0}, "seed1")]
    assert [one.label for one in read_curves(both)] == ["alibi, trained on 128", "sinusoidal, trained on 128"]


def test_several_files_of_one_model_make_one_series(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = results("alibi", {(128, 128): 32.0})
    second = tmp_path / "more.json"
    text = first.read_text().replace('128, "stride": 128', '256, "stride": 256').replace("32.0", "31.0")
    second.write_text(text.replace(f"{tmp_path}/", "./"))
    (one,) = read_curves([first, second])
    assert one.perplexity == {128: 32.0, 256: 31.0}


def test_a_result_of_eval_lm_keeps_the_measures_that_only_evaluate_has(results, tmp_path):
    first = results("alibi", {(128, 128): 32.0, (256, 256): 31.0})
    content = json.loads(first.read_text())
    for result in content["results"]:
        result.update(tokens_per_second=500.0, bits_per_byte=1.5)
    first.write_text(json.dumps(content))
    content["results"] = [{"length": 128, "stride": 128, "perplexity": 32.0}]
    second = tmp_path / "eval-lm.json"
    second.write_text(json.dumps(content))
    (one,) = read_curves([first, second])
    assert (one.tokens_per_second, one.bits_per_byte) == ({128: 500.0, 256: 500.0}, {128: 1.5, 256: 1.5})
    (timed,) = read_curves([first, second], by_speed=True)
    assert timed.label == "alibi, trained on 128", "the file without speeds is no second curve"


def test_sliding_windows_are_one_curve_by_equal_stride_or_by_equal_share(results):
    by_stride = {(length, 32): 30.0 for length in (64, 128, 256)}
    by_share = {(length, length // 2): 30.0 for length in (64, 128, 256)}
    assert [one.label for one in read_curves([results("alibi", by_stride)])] == ["alibi, trained on 128, stride 32"]
    (one,) = read_curves([results("alibi", by_share)])
    assert one.label == "alibi, trained on 128, stride 1/2 of the length"
    assert list(one.perplexity) == [64, 128, 256]


def test_strides_of_blocks_do_not_count_for_sliding_windows(results):
    (blocks, sliding) = read_curves([results("alibi", {(256, 128): 3.0, (512, 512): 3.0, (1024, 512): 3.0})])[::-1]
    if "stride" not in sliding.label:
        blocks, sliding = sliding, blocks
    assert sliding.label == "alibi, trained on 128, stride 1/2 of the length"
    assert list(blocks.perplexity) == [512]


def test_streaming_is_a_curve_of_its_own(results):
    streaming, blocks = read_curves([results("alibi", {(128, None): 30.0, (128, 128): 31.0, (64, None): 32.0})])
    assert streaming.label == "alibi, trained on 128, streaming"
    assert streaming.perplexity == {128: 30.0, 64: 32.0}
    assert blocks.perplexity == {128: 31.0}


def test_speed_and_loss_by_position_are_shown_where_results_have_them(results, tmp_path):
    path = results("alibi", {(4, 4): 30.0, (8, 8): 29.0})
    content = json.loads(path.read_text())

    def bins(*numbers):
        return [dict(zip(("first", "last", "tokens", "loss"), one)) for one in numbers]

    content["results"][0].update(tokens_per_second=5000.0, by_position=bins((0, 0, 300, 8.0), (1, 3, 900, 6.0)))
    content["results"][1].update(tokens_per_second=4000.0, by_position=bins((0, 0, 100, 4.0), (4, 7, 39, 5.0)))
    path.write_text(json.dumps(content))
    write_report([path, results("sinusoidal", {(4, 4): 40.0})], tmp_path / "report")
    names = {"report.md", "report.png", "speed.png", "positions.png"}
    assert {one.name for one in (tmp_path / "report").iterdir()} == names
    rows = [line.split("|")[1:-1] for line in (tmp_path / "report" / "report.md").read_text().splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert ["4", "5,000"] in rows
    assert ["8", "4,000"] in rows
    assert ["0", "7.000"] in rows, "300 tokens of 8 bits and 100 of 4"
    assert ["1", "6.000"] in rows
    assert not any(row and row[0] == "4 - 7" for row in rows), "too few windows"


@pytest.fixture
def laboratory(results, tmp_path):
    """Files of evaluate, probe gain and probe eval, of one model."""
    path = results("alibi", {(4, 4): 30.0, (8, 8): 29.0})
    content = json.loads(path.read_text())
    content["subject"] = {"weights": "a1"}
    content["results"][1]["tokens_per_second"] = 4000.0
    path.write_text(json.dumps(content))
    losses = {"length 4, stride 4": numpy.full(8, 4.0), "length 8, stride 8": numpy.arange(8.0)}
    tokens = numpy.array([4, 5, 4, 5, 6, 5, 4, 5])
    numpy.savez(tmp_path / "a.npz", tokens=tokens, subject=numpy.array('{"weights": "a1"}'), **losses)
    main(["probe", "gain", str(tmp_path / "a.npz"), "--output", str(tmp_path / "gain")])
    parts = {"by_depth": [{"depth": 0.1, "exact_match": 0.9}, {"depth": 0.75, "exact_match": 0.5}], "by_gap": []}
    measured = {"exact_match": 0.9, "interval": [0.8, 0.95], "token_accuracy": 0.97}
    model = {
        "model": {**content["model"], "overrides": {}},
        "probe": {"task": "passkey", "train_sizes": [4, 8], "unit": "tokens"},
        "results": [{"size": size, **measured, **parts} for size in (8, 16)],
        **{"threshold": 0.85, "effective_length": 16},
    }
    (tmp_path / "probe.json").write_text(json.dumps({"models": [model]}))
    return [path, tmp_path / "gain" / "gain.json", tmp_path / "probe.json"]


def test_one_page_has_perplexity_gain_probes_and_speed_and_needs_no_other_file(laboratory, tmp_path, capsys):
    main(["report", *map(str, laboratory), "--page", str(tmp_path / "page")])
    written = capsys.readouterr().out.split("written to ")[-1].split(", ")
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        path.strip().rpartition("/")[2] for path in written
    }
    markdown, page = ((tmp_path / "page" / f"report.{end}").read_text() for end in ("md", "html"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("|")]
    assert dict(zip(rows[0], rows[2])) == {
        **{"model": "alibi, trained on 128", "perplexity at 4": "30.00", "perplexity at 8": "29.00"},
        **{"tokens/s at 8": "4,000", "passkey, effective length": "16"},
        "gain, bits, of tokens with less than 2 tokens of short context": "+1.500",
        "gain, bits, of tokens with 2 tokens of short context or more": "-0.500",
    }
    content = json.loads(laboratory[0].read_text())
    content["subject"]["model_overrides"] = {"dropout": 0.5}
    laboratory[0].write_text(json.dumps(content))
    main(["report", *map(str, laboratory), "--output", str(tmp_path / "other")])
    other = (tmp_path / "other" / "report.md").read_text().partition("## Perplexity")[0]
    assert "gain" not in other, "of the model without the override"
    assert "passkey" not in other
    for title in ("Perplexity", "Tokens per second", "What a longer context gives", "Probe passkey"):
        assert f"## {title}\n" in markdown
        assert f"<h2>{title}</h2>" in page
    plots = [line.partition("](")[2][:-1] for line in markdown.splitlines() if line.startswith("![")]
    assert len(plots) == 5
    pictures = [base64.b64decode(part.partition('"')[0]) for part in page.split("data:image/png;base64,")[1:]]
    assert pictures == [(tmp_path / "page" / name).read_bytes() for name in plots]
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import""", page), "something is loaded"
    found = re.findall("<td>(.*?)</td>", page)
    assert "90.0% (80% to 95%)" in found
    assert "4,000" in found


def test_what_markdown_says_is_no_html():
    page = html_page("# <A> & `b|`\n\n| **x** | <script> |\n|---|---|\n| 1 | 2 |\n\n- one\n- two", None)
    assert "<h1>&lt;A&gt; &amp; <code>b|</code></h1>" in page
    assert "<table><tr><th><b>x</b></th><th>&lt;script&gt;</th></tr>\n<tr><td>1</td><td>2</td></tr></table>" in page
    assert "<li>two</li>" in page


def test_probes_alone_make_a_report(laboratory, tmp_path):
    main(["report", str(laboratory[2]), "--output", str(tmp_path / "report")])
    assert "Probe passkey" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize("broken", ["results", "by_context"])
def test_a_broken_file_of_a_probe_is_named(laboratory, tmp_path, capsys, broken):
    for path in laboratory[1:]:
        path.write_text(path.read_text().replace(f'"{broken}"', '"nothing"'))
    line = failure(capsys, main, "report", *laboratory, "--output", tmp_path / "report")
    assert "gain.json is no whole result" in line if broken == "by_context" else "probe.json is no whole" in line
    assert not (tmp_path / "report").exists()


def test_a_curve_without_a_finite_value_is_marked_and_has_no_scale(results, tmp_path, monkeypatch):
    """Perplexity, speed and loss by position."""
    from matplotlib import pyplot as plt

    path, seen = results("alibi", {(4, 4): math.inf}), []
    content = json.loads(path.read_text())
    bins = [{"first": 0, "last": 3, "tokens": 300, "loss": math.inf}] * 2
    content["results"][0].update(tokens_per_second=math.inf, by_position=bins)
    path.write_text(json.dumps(content))
    monkeypatch.setattr(plt, "close", lambda figure: seen.append(figure.axes[0]))
    write_report([path], tmp_path / "report")
    assert len(seen) == 3
    for axes in seen:
        assert next(text.get_text() for text in axes.texts) == "\u221e"
        assert not len(axes.get_yticks())
    assert "inf" in (tmp_path / "report" / "report.md").read_text()
    assert "nan" not in (tmp_path / "report" / "report.md").read_text()


def test_many_series_with_long_and_odd_names_are_readable(results, tmp_path, monkeypatch):
    """The legend is inside of the figure, names of lengths do not overlap, and values far apart have a scale.

    No name ends a cell of a table or is read as a formula.
    """
    from matplotlib import pyplot as plt

    seen = []
    monkeypatch.setattr(plt, "close", seen.append)
    points = {(n, n): 1e12 / n**2 for n in (1, 1000, 1001, 1024, 10**6)}
    files = [results("alibi", points, f"{'a b ' * 30}|\n$\\frac{{$ {n}") for n in range(11)]
    write_report(files, tmp_path / "report")
    (figure,) = seen
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width
    lengths = [text.get_window_extent() for text in figure.axes[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in zip(lengths, lengths[1:]))
    low, high = figure.axes[0].get_ylim()
    assert sum(low < tick < high for tick in figure.axes[0].get_yticks()) > 2
    _, _, head, line, row, *_ = (tmp_path / "report" / "report.md").read_text().splitlines()
    assert head.count("|") == line.count("|") == row.count("|") == 13


def test_a_report_is_not_overwritten_silently(results, tmp_path):
    files = [results("alibi", {(128, 128): 30.0})]
    write_report(files, tmp_path)
    with pytest.raises(ValueError, match="--overwrite"):
        write_report(files, tmp_path)
    write_report(files, tmp_path, overwrite=True)


def test_settings_of_one_checkpoint_are_curves_of_their_own(results, tmp_path):
    """They are named by what differs; checksums that a file does not hold are not a difference."""

    def change(path, name, subject=None, **values):
        content = json.loads(path.read_text())
        content.update(values)
        if subject is not None:
            content["subject"] = subject
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    plain = results("alibi", {(32, 32): 5.0, (64, 64): 6.0})
    same = {"weights": "1", "text": "2", "model_overrides": {}, "dtype": "float32"}
    files = [
        plain,
        change(plain, "same.json", same),
        change(plain, "scaled.json", {**same, "model_overrides": {"alibi_length_scale": 8.0}}),
        change(plain, "half.json", {**same, "dtype": "float16"}),
        change(plain, "other.json", {**same, "weights": "3"}),
        change(plain, "none.json", same, model={**json.loads(plain.read_text())["model"], "position_method": "none"}),
    ]
    labels = [curve.label for curve in read_curves(files)]
    assert labels[2] == "alibi, trained on 128, alibi_length_scale=8.0 (dtype float32)"
    assert labels[3] == "alibi, trained on 128 (dtype float16)"
    assert "none, trained on 128 (dtype float32)" in labels
    assert len(set(labels)) == len(labels) == 6, labels
    assert [curve.label for curve in read_curves(files[:2])] == ["alibi, trained on 128"]
    assert [curve.label for curve in read_curves(files[1:2] + files[3:4])] == [
        "alibi, trained on 128 (dtype float32)",
        "alibi, trained on 128 (dtype float16)",
    ]
    assert [curve.label for curve in read_curves(files[1:2] + files[4:5])] == [
        "alibi, trained on 128 (weights 1)",
        "alibi, trained on 128 (weights 3)",
    ]
    models = [change(plain, f"{options}.json", {**same, "model_options": options}) for options in "56"]
    assert [curve.label for curve in read_curves(models)] == [
        "alibi, trained on 128 (model options 5)",
        "alibi, trained on 128 (model options 6)",
    ]
    other_text = change(plain, "text.json", {**same, "text": "4"}, data="other")
    assert [curve.label for curve in read_curves([files[1], other_text])] == [
        "alibi, trained on 128 (text 2)",
        "alibi, trained on 128 (text 4)",
    ]
    options = [change(plain, f"{option}.json", options=["--cpu", option]) for option in ("--cpu", "--x", "--y")]
    assert [curve.label for curve in read_curves(options)] == [
        "alibi, trained on 128 (options none)",
        "alibi, trained on 128 (options --x)",
        "alibi, trained on 128 (options --y)",
    ]


def test_what_differs_between_two_models_is_named(results, tmp_path):
    """The text and the settings, although the methods tell the curves apart; the devices if they are known."""

    def label(name, **values):
        content = json.loads(results(name, {(32, 32): 5.0}).read_text())
        content.update(values)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return path

    def ends(*files):
        return [curve.label.partition(" trained on 128 ")[2] for curve in read_curves(files)]

    plain = label("none", subject={"dtype": "float32", "device": "cpu", "text": "1"}, data="/d/a")
    assert ends(plain, label("t5", subset="test")) == ["(valid)", "(test)"]
    assert ends(plain, label("t5", subset="test", subject={"text": "2"}, data="/d/a")) == ["(valid)", "(test)"]
    assert ends(plain, label("t5", subject={"text": "2"}, data="/d/a")) == ["(text 1)", "(text 2)"], "made anew"
    assert ends(plain, label("t5", subject={"dtype": "float16"})) == ["(dtype float32)", "(dtype float16)"]
    assert ends(plain, label("t5", subject={"device": "cuda"})) == ["(device cpu)", "(device cuda)"]
    assert ends(plain, label("t5")) == ["", ""]
    assert ends(plain, label("t5", subject={"text": "2"}, data="/d/b")) == ["(data a)", "(data b)"]
    assert ends(plain, label("t5", subject={"text": "1"}, data="/d/b")) == ["", ""], "the same text in two places"


def test_evaluations_that_contradict_each_other_are_not_joined(results, tmp_path):
    first = results("alibi", {(32, 32): 5.0, (64, 64): 6.0})
    second = tmp_path / "second.json"
    second.write_text(first.read_text().replace("6.0", "6.1").replace("32", "128"))
    assert [curve.perplexity for curve in read_curves([first, second])] == [{32: 5.0, 64: 6.0}, {128: 5.0, 64: 6.1}]
    labels = [curve.label for curve in read_curves([first, second])]
    assert labels == ["alibi, trained on 128 (file run/alibi.json)", "alibi, trained on 128 (file second.json)"]


def test_speeds_of_different_machines_or_batches_are_curves_of_their_own(results, tmp_path):
    path = results("alibi", {(32, 32): 5.0, (64, 64): 6.0, (128, 128): 7.0})
    content = json.loads(path.read_text())
    devices = {"a": "big GPU", "b": "small GPU"}
    content["runs"] = {
        name: {"environment": {"device": device, "date": "0.2"}, "max_tokens": 9, "command": f"evaluate {name}\n--x"}
        for name, device in devices.items()
    }
    for result, run_name in zip(content["results"], "aba"):
        result.update(run=run_name, tokens_per_second=100.0)
    path.write_text(json.dumps(content))
    assert [list(curve.perplexity) for curve in read_curves([path])] == [[32, 64, 128]]
    curves = read_curves([path], by_speed=True)
    assert [list(curve.tokens_per_second) for curve in curves] == [[32, 128], [64]]
    assert curves[1].label == "alibi, trained on 128 (hardware small GPU)"
    write_report([path], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "(hardware big GPU)" in text
    made = text.partition("## What made the perplexities\n\n")[2].splitlines()
    ends = "length 32, 128: `evaluate a --x`; 0.2; big GPU", "length 64: `evaluate b --x`; 0.2; small GPU"
    assert made == [f"- **alibi, trained on 128**, {end}" for end in ends]


def test_loss_by_position_of_slopes_that_depend_on_the_length_is_not_averaged(results):
    path = results("alibi", {(4, 4): 5.0, (8, 8): 6.0})
    content = json.loads(path.read_text())
    for result in content["results"]:
        result["by_position"] = [{"first": 0, "last": 0, "tokens": 300, "loss": float(result["length"])}]
    path.write_text(json.dumps(content))
    ((pooled,),) = pool_positions(read_curves([path])).values()
    assert pooled["loss"] == 6.0
    content["model"]["alibi_length_scale"] = "auto"
    path.write_text(json.dumps(content))
    assert [bins[0]["loss"] for bins in pool_positions(read_curves([path])).values()] == [4.0, 8.0]


@pytest.fixture
def published(results, tmp_path):
    """Writes a result file of a model of the paper: `published("a.json", 512, {(512, 512): 20.0}, seed=1)`."""

    def write(name, training_length, perplexities, method="alibi", subset="valid", tokens=217_646, **model):
        content = json.loads(results(method, perplexities, name, training_length, subset).read_text())
        content["model"].update({"parameters": 246_933_504, "updates": 286_000, **model})
        for result in content["results"]:
            result["tokens"] = tokens
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return path

    return write


def paper_rows(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]


def test_the_papers_numbers_stand_beside_those_that_match(published, tmp_path):
    files = [
        published("a", 512, {(512, 512): 19.85, (3072, 3072): 18.64, (99, 99): 20.0}),
        published("a2", 512, {(3072, 512): 18.3, (1536, 256): 19.0}),  # a stride of 1/6 of the length
        published("a3", 512, {(3072, 1): 18.06}),
        published("b", 3072, {(3072, 512): 19.38, (4072, 4072): 20.0}, "sinusoidal", "test", 245_569),
        published("c", 512, {(15512, 15512): 40.0}, "t5", updates=1000),
    ]
    out = run(BIN / "fairseq-alibi", "report", *files, "--paper", "--output", tmp_path / "report").output
    section = (tmp_path / "report" / "report.md").read_text().partition("## Beside the paper\n")[2]
    assert section.strip()
    assert section.strip() in out
    rows = paper_rows(section)
    assert [" ".join(row) for row in rows] == [
        "2, 5 alibi 512 512 non-overlapping valid 19.73 19.85 1 286000 +0.12 +0.5 of 0.24 (paper)",
        "5, 6 alibi 512 3,072 non-overlapping valid 18.40 18.64 1 286000 +0.24 +1.0 of 0.24 (paper)",
        "7 alibi 512 3,072 stride 512 valid 18.30 18.30 1 286000 +0.00 +0.0 of 0.24 (paper)",
        "15 alibi 512 3,072 stride 1 valid 18.30 18.06 1 286000 -0.24 -1.0 of 0.24 (paper)",
        "7 sinusoidal 3,072 3,072 stride 512 test 18.67 19.38 1 286000 +0.71 +3.0 of 0.24 (paper)",
    ]
    assert "- alibi, trained on 512, non-overlapping, valid: the paper has no number at 99 tokens." in section
    assert "- t5, trained on 512, non-overlapping, valid: the paper has no number at 15,512 tokens." in section, "OOM"


def test_seeds_of_one_model_are_averaged_and_give_the_standard_deviation(published):
    seeds = [published(f"s{n}", 1024, {(1024, 1024): 18.66 + n}, seed=n) for n in (1, 2, 3)]
    (row,) = paper_rows(paper_section(read_curves(seeds)))
    assert row[:9] == ["3, 5", "alibi", "1,024", "1,024", "non-overlapping", "valid", "18.66", "20.66", "3"]
    assert row[-1] == "+2.0 of 1.00 (measured)"
    (row,) = paper_rows(paper_section(read_curves(seeds[:2])))
    assert (row[7], row[8], row[-1]) == ("20.16", "2", "+6.2 of 0.24 (paper)"), "two are too few"
    same = [published(f"same{n}", 1024, {(1024, 1024): 18.66 + n}, seed=1) for n in (1, 2, 3)]
    assert len(paper_rows(paper_section(read_curves(same)))) == 3, "checkpoints of one run are no seeds"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parameters": 1_900_000}, "another size (1,900,000 parameters)"),
        ({"parameters": None}, "the file does not hold the number of parameters"),
        ({"tokens": 61_000}, "another text (61,000 tokens, WikiText-103's has 217,646)"),
        ({"subset": "train"}, "the paper has no subset 'train'"),
        ({"method": "kerple"}, "the paper has no such method"),
        ({"sample_break_mode": "eos"}, "another model or evaluation (sample_break_mode=eos)"),
    ],
)
def test_what_cannot_be_compared_with_the_paper_is_said(published, change, reason):
    text = paper_section(read_curves([published("a", 512, {(512, 512): 19.73}, **change)]))
    assert "Nothing of this can be compared" in text
    assert reason in text
    assert not paper_rows(text)


def test_the_papers_numbers_are_those_of_its_tables():
    """Some cells, one from each table, and the number of cells that are measurements of the plugin's methods."""
    paper = read_paper()["results"]
    cells = [
        ("sinusoidal", 512, 612, "non-overlapping", "valid", 20.59, "2"),
        ("rotary", 1024, 16024, "non-overlapping", "valid", 106.99, "3"),
        ("t5", 3072, 3572, "non-overlapping", "valid", 17.86, "4"),
        ("alibi", 64, 3072, "non-overlapping", "valid", 21.53, "5"),
        ("alibi", 512, 3072, "non-overlapping", "test", 19.08, "6"),
        ("rotary", 3072, 3072, "stride 512", "test", 18.72, "7"),
        ("sinusoidal", 512, 3072, "stride 1", "valid", 360.12, "13"),
        ("t5", 1024, 3072, "stride 1", "valid", 20.66, "14"),
        ("alibi", 1024, 1536, "stride 1", "valid", 17.47, "15"),
    ]
    for *key, value, table in cells:
        assert table in paper[tuple(key)][value]
    assert all(len(values) == 1 for values in paper.values()), "tables that overlap agree"
    assert len(paper) == 485

"""The benchmark measures every contender and says so in JSON, table and plot; no test looks at a time."""

import json
import math
import signal
import time

import benchmark
import benchmark_contenders
import benchmark_generation
import benchmark_measure
import benchmark_models
import benchmark_report
import pytest
import torch
from conftest import ROOT, run
from fairseq.data.data_utils import load_indexed_dataset

from fairseq_alibi.core import bounded_cache
from fairseq_alibi.files.checkpoints import load_model, read_checkpoint


@pytest.fixture(scope="module")
def checkpoint(train):
    """An ALiBi model of 2 layers and 8 heads, trained on `corpus`."""
    return train()


def arguments(*more):
    return benchmark.parse(["--cpu", *map(str, more)])


@pytest.mark.slow
def test_the_script_measures(tmp_path):
    done = run("bash", ROOT / "scripts" / "benchmark.sh", "--parts", "attention", "--lengths", 64, "--output", tmp_path)
    assert (tmp_path / "benchmark.md").read_text() in done.output
    assert "Warning" not in done.output


@pytest.mark.slow
def test_every_part_is_measured_and_reported(checkpoint, corpus, tmp_path, monkeypatch, capsys):
    cases = (benchmark_models.Case(40, "10,20", 16, 4, 200), benchmark_models.Case(40, None, 16, 16, 200))
    monkeypatch.setitem(benchmark.QUICK, "cases", cases)
    monkeypatch.setattr(benchmark_measure, "ROUNDS", 2)
    monkeypatch.setattr(benchmark, "METHODS", ["alibi", "fox"])
    options = ("--cpu", "--lengths", 300, "--tokens", 600, "--repeats", 2, "--budget", 600, "--output", tmp_path)
    benchmark.main([str(part) for part in (*options, "--checkpoint", checkpoint, "--data", corpus)])
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "benchmark.json").read_text())
    found = {}
    for one in content["measurements"]:
        part = f"memory of {one['of']}" if one["part"] == "memory" else one["part"]
        found.setdefault(part, {})[one["contender"], one["length"], one.get("head_dim")] = one

    scored = [(one["case"], one["contender"]) for one in content["measurements"] if one["part"] == "scoring"]
    assert scored == [(case.title, name) for case in cases for name in benchmark_contenders.SCORING]
    assert {one["contender"] for one in found.pop("memory of scoring").values()} == set(benchmark_contenders.SCORING)

    trained = [(one["case"], one["contender"]) for one in content["measurements"] if one["part"] == "methods"]
    assert trained == [(f"{name}, 300", how) for name in ("alibi", "fox") for how in ("auto", "mask", "alibi")]

    left_out = set() if benchmark_contenders.cpu_bf16_helps() else {"auto, bf16"}

    def expected(names, head_dims=(None,)):
        return {(name, 300, d) for name in {*names} - left_out for d in head_dims}

    assert found.pop("memory of None").keys() == {("imports only", 0, None)}
    assert found["attention"].keys() == expected(benchmark_contenders.ATTENTION, (64, 128))
    assert found["training"].keys() == found["memory of training"].keys() == expected(benchmark_contenders.TRAINING)
    assert found["evaluation"].keys() == expected(benchmark_contenders.EVALUATION)
    assert found["memory of evaluation"].keys() == expected({"auto", "auto, bf16", "mask"})
    for one in content["measurements"]:
        if one["part"] == "memory":
            assert one["peak_memory_bytes"] > 2**24
            continue
        assert len(one["seconds"]) == 2
        if one["part"] != "scoring":
            assert one["rows"] == (1 if one["part"] == "evaluation" else 2)
            assert one["tokens"] == one["rows"] * one["length"]
        assert one["tokens_per_second"] == pytest.approx(one["tokens"] / one["median_seconds"])
        assert one["times_as_fast"].keys() == set(benchmark_measure.BASES[one["part"]])
        assert "error" not in one
    assert content["settings"]["tokens"] == 600
    assert content["environment"]["torch"] == torch.__version__
    markdown = (tmp_path / "benchmark.md").read_text()
    assert markdown in out
    assert torch.__version__ in markdown.splitlines()[0]
    tables = [line.split()[1] for line in markdown.splitlines() if line.startswith("|  ")]
    assert [first for first in tables if first in ("length", "300")] == [
        *["length", "300"] * 4,
        "length",
        *["length", "300"] * 2,
        "length",
    ]
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.json", "benchmark.md", "benchmark.png"}


def test_both_ways_of_scoring_give_a_made_up_model_the_same_loss(tmp_path):
    case = benchmark_models.Case(40, "10,20", 16, 4, 200)
    data, checkpoint = benchmark_models.made_up_model(case, tmp_path, arguments())
    loss, _ = benchmark_contenders.SCORING["fairseq-eval-lm"](data, checkpoint, 16, 4, arguments())
    result, _ = benchmark_contenders.SCORING["fairseq-alibi evaluate"](data, checkpoint, 16, 4, arguments())
    assert result["loss"] == pytest.approx(loss, abs=1e-4)
    assert result["tokens"] == 200


def test_text_is_the_beginning_of_the_train_split(corpus):
    tokens = benchmark_models.first_tokens(str(corpus), 500)
    dataset = load_indexed_dataset(str(corpus / "train"))
    joined = [int(token) for n in range(500) for token in dataset[n]]
    assert tokens.tolist() == joined[:500]


def test_skipped_share_is_of_the_scores_of_all_heads(checkpoint, corpus):
    """All pairs that a head can reach are computed, and few others."""
    model = load_model(str(checkpoint), read_checkpoint(str(checkpoint)), str(corpus))
    tokens = benchmark_models.first_tokens(str(corpus), 3000)[None]
    found = benchmark_contenders.skipped_scores(model, tokens)
    reaches = [3000 if reach is None else min(reach, 3000) for reach in found["reach_per_head"]]
    assert reaches == sorted(reaches), "a lower slope reaches farther"
    pairs = [3000 * 3001 / 2 - (3000 - reach) * (2999 - reach) / 2 for reach in reaches]
    whole = benchmark_contenders.scores_computed(3000, [math.inf] * 8)
    assert 8 * 3000 * 3001 / 2 < whole < 8 * 3000 * 3001 / 2 * 1.25
    assert 0 < found["skipped_share"] < 1 - sum(pairs) / whole
    assert 3000 * 100 < benchmark_contenders.scores_computed(3000, [100.0]) < 3000 * 500
    short = benchmark_contenders.skipped_scores(model, tokens[:, :64])
    assert short == {"skipped_share": None, "reach_per_head": None}, "a short pass has a mask"


def test_contenders_take_turns_and_warm_up_outside_of_the_budget():
    order = []
    contenders = {name: lambda name=name: order.append(name) for name in "ab"}
    times = benchmark_measure.alternate(contenders, repeats=4, budget=60)
    assert order == list("abbaabbaab"), "and none is always the first one"
    assert [len(timing.seconds) for timing in times.values()] == [4, 4]
    times = benchmark_measure.alternate(contenders, repeats=9, budget=-1)
    assert [len(timing.seconds) for timing in times.values()] == [3, 3], "three rounds count whatever the budget"


def test_compilation_is_not_reported_as_speed():
    calls = []

    def compiled():
        calls.append(time.sleep(0.5 if not calls else 0.001))

    (timing,) = benchmark_measure.alternate({"fused": compiled}, repeats=3, budget=0.1).values()
    (measurement,) = benchmark_measure.compared("attention", 64, 64, {"fused": timing})
    assert measurement["first_seconds"] >= 0.5
    assert max(timing.seconds) < 0.4
    assert measurement["spread"] >= 0
    assert "±" in benchmark_report.cell(measurement)


def test_share_of_products_is_their_operations_over_rate_and_time(monkeypatch):
    x = torch.ones(16, 32)
    monkeypatch.setattr(benchmark_measure, "product_rate", lambda args: 1e6)
    share = benchmark_measure.product_share(lambda: x @ x.T, 0.5, None)
    assert share == pytest.approx(2 * 16 * 32 * 16 / 1e6 / 0.5)


def test_a_contender_that_fails_is_a_row_that_says_why():
    def fail():
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 TiB")

    def fail_to_make():
        raise ValueError("no kernel\nfor this")

    makers = {"mask": lambda: fail, "fused": fail_to_make, "no bias": lambda: lambda: None}
    steps = {name: benchmark_measure.made_once(make) for name, make in makers.items()}
    times = benchmark_measure.alternate(steps, repeats=1, budget=60)
    without, broken, there = benchmark_measure.compared("attention", 64, 1, times, head_dim=64)
    assert there["times_as_fast"].keys() == {"no bias"}
    assert benchmark_report.cell(without) == "out of memory"
    assert benchmark_report.cell(broken) == "no kernel for this"
    assert benchmark_report.cell(there, ("mask", "no bias")).endswith("(- / 1.00)")


def test_an_interrupted_run_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    def interrupted(part, length, *_):
        if length > 64:
            signal.raise_signal(signal.SIGTERM)
        times = {name: benchmark_measure.Timing([n], n, None) for name, n in (("mask", 1.0), ("no bias", 2.0))}
        return benchmark_measure.compared(part, length, 1, times, head_dim=64)

    monkeypatch.setattr(benchmark, "timed", interrupted)
    with pytest.raises(SystemExit, match=r"^143$"):
        benchmark.main(["--cpu", "--parts", "attention", "--lengths", "64", "128", "--output", str(tmp_path)])
    assert f"benchmark: interrupted; what was measured is in {tmp_path / 'benchmark.json'}" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["measurements"]) == 2
    assert "1,000.0 ±0% (1.00 / 2.00)" in (tmp_path / "benchmark.md").read_text()


def test_full_trains_the_architectures_of_wikitext103():
    for contender in ("auto", "transformer_lm"):
        cfg = benchmark_contenders.training_config(contender, 64, arguments("--full"), "data")
        assert cfg.model.decoder_layers == 16
        assert cfg.model.adaptive_input
        assert cfg.model.dropout == 0.1
        assert cfg.model.attention_dropout == 0
        assert cfg.criterion._name == "adaptive_loss"


def test_generation_is_measured_and_reported(checkpoint, corpus, tmp_path, monkeypatch):
    """The bounded cache keeps less than all keys, and the table has a row for each contender."""
    monkeypatch.setattr(bounded_cache, "SHORT", 64)
    options = ("--lengths", 90, "--repeats", 1, "--others", "--soak", 10, "--output", tmp_path, "--cpu-time")
    command = ["benchmark_generation.py", *options, "--checkpoint", checkpoint, "--data", corpus]
    monkeypatch.setattr("sys.argv", [str(part) for part in command])
    benchmark_generation.main()
    content = json.loads((tmp_path / "generation.json").read_text())
    assert [(one["context"], one["contender"]) for one in content["measurements"]] == [
        (90, "bounded"),
        (90, "all keys"),
    ]
    assert all(one["tokens_per_second"] > 0 and one["cache_bytes"] > 90 * 1000 for one in content["measurements"])
    assert len(content["soak"]) == 10
    assert "| bounded" in (tmp_path / "generation.md").read_text()

"""Probes: their texts against independent ones, what is trained and scored, and models whose accuracy is known."""

import json
import math
import random
import shlex
import shutil

import numpy
import pytest
import torch
from conftest import BIN, failure, run, training_config
from fairseq import checkpoint_utils, tasks
from fairseq.data import Dictionary
from fairseq.data.data_utils import load_indexed_dataset

from fairseq_alibi.__main__ import main
from fairseq_alibi.evaluation.measurement import Windowing
from fairseq_alibi.experiments import probe_evaluation
from fairseq_alibi.experiments.context_gain import context_before, read_token_losses
from fairseq_alibi.experiments.probe_data import ProbeSettings, make_probe_data, training_probes
from fairseq_alibi.experiments.probe_tasks import FILLER, PROBES, Answer, Draws, ProbeOptions
from fairseq_alibi.files.checkpoints import load_model, read_checkpoint

SIZES = {name: 200 if task.unit == "tokens" else 12 for name, task in PROBES.items()}


def probes(task, size, count=50, seed="1", **options):
    """Texts of a task."""
    draws = Draws(seed)
    return [PROBES[task].make(draws, size, ProbeOptions(**options)) for _ in range(count)]


def spans(probe):
    """The words of each answer."""
    return [probe.words[answer.start : answer.stop] for answer in probe.answers]


def looked_up(task, words):
    """What the answers have to be, by other means than those by which the texts are made."""
    text = " ".join(words)
    if task == "mqar":
        seen, found = {}, []
        for n in range(0, len(words) - 1, 2):
            first, second = words[n : n + 2]
            if first in seen:
                found.append([seen[first]])
            elif int(first[1:]) < 32:
                seen[first] = second
        return found
    if task in ("passkey", "needles"):
        asked = [part.split()[0] for part in text.split("what is the ")[1:]]
        return [f"{text} ".split(f"the {name} key is ")[1].split()[:5] for name in asked]
    question = words[: words.index("=")]
    if task == "addition":
        plus = question.index("+")
        total = int("".join(question[:plus])) + int("".join(question[plus + 1 :]))
        return [list(str(total).zfill(plus + 1))]
    by_task = {
        "copy": list,
        "reverse": lambda x: x[::-1],
        "sort": sorted,
        "parity": lambda x: [str(sum(map(int, x)) % 2)],
    }
    return [by_task[task](question)]


@pytest.mark.parametrize("task", PROBES)
def test_answers_are_those_of_an_independent_reading(task):
    words = set(PROBES[task].words(ProbeOptions()))
    for probe in probes(task, SIZES[task]):
        assert spans(probe) == looked_up(task, probe.words)
        assert set(probe.words) <= words
        assert PROBES[task].unit != "tokens" or len(probe.words) == SIZES[task]
        for answer in probe.answers:
            assert answer.source < answer.start
            if task not in ("addition", "parity"):
                told = probe.words[answer.source]
                assert told == probe.words[answer.start], "the source tells the first word"


def test_several_needles_are_asked_for_one_after_the_other():
    for probe in probes("needles", 150, needles=5, asked=3):
        assert len(probe.answers) == 3
        assert len({answer.source for answer in probe.answers}) == 3
        assert spans(probe) == looked_up("needles", probe.words)


def test_the_smallest_texts_have_no_filler():
    options = ProbeOptions(needles=2, asked=2, digits=3)
    smallest = PROBES["needles"].smallest(options)
    (probe,) = probes("needles", smallest, 1, needles=2, asked=2, digits=3)
    assert len(probe.words) == smallest
    (probe,) = probes("mqar", 24, 1)
    assert len(probe.words) == 24
    assert [answer.start for answer in probe.answers] == [17, 19, 21, 23]


def test_texts_stay_the_same():
    """With every version of Python; whoever changes the generator changes data that somebody compares with."""
    (recall,), (addition,) = probes("mqar", 16, 1, vocabulary=8, pairs=2, queries=2), probes("addition", 3, 1)
    assert " ".join(recall.words) == "s1 s5 s2 s4 s4 s4 s1 s5 s6 s6 s4 s6 s5 s5 s2 s4"
    assert " ".join(addition.words) == "4 0 1 + 8 2 0 = 1 2 2 1"
    assert probes("copy", 5) != probes("copy", 5, seed="2")


def test_the_law_of_the_gaps():
    def mean_gap(power):
        found = [a.start - a.source for p in probes("mqar", 400, 200, gap_power=power) for a in p.answers]
        return sum(found) / len(found)

    assert mean_gap(1.0) == pytest.approx(200, abs=15), "even from 16 to 400 tokens"
    assert mean_gap(0.01) < 100


def test_depths_and_filler_are_spread_evenly():
    found = probes("passkey", 300, 400)
    depths = [probe.answers[0].source / 300 for probe in found]
    assert sum(depths) / len(depths) == pytest.approx(0.5, abs=0.05)
    assert {probe.words[0] for probe in found} >= set(FILLER) - {"the"}


@pytest.fixture(scope="module")
def folder(make_once):
    """A folder of the smallest associative recall that a tiny model learns in seconds."""

    def fill(path):
        sizes = ["--train-sizes", "10-14", "--test-sizes", "14,28", "--texts", "2000", "--tests", "60"]
        options = ["--vocabulary", "8", "--pairs", "2", "--queries", "2"]
        made = run(BIN / "fairseq-alibi", "probe", "make", "mqar", path / "data", *sizes, *options)
        (path / "printed").write_text(made.output)

    return make_once("probe", fill) / "data"


def train_as_printed(folder, save_dir, updates):
    """Trains by the command that was printed, but a smaller model; returns what it prints."""
    name, *command = shlex.split((folder.parent / "printed").read_text().splitlines()[-1])
    smaller = ("--decoder-embed-dim", 64, "--dropout", 0, "--lr", 0.004, "--max-tokens", 900, "--max-update", updates)
    smaller += ("--clip-norm", 0.5, "--lr-scheduler", "cosine", "--warmup-updates", 1, "--lr-period-updates", updates)
    others = ("--cpu", "--no-epoch-checkpoints", "--disable-validation", "--log-format", "simple")
    return run(BIN / name, *command, *smaller, *others, "--save-dir", save_dir).output


@pytest.fixture(scope="module")
def trained(folder, make_once):
    """A model that was trained on it for two updates, and its log."""
    return make_once("probe-model", lambda path: (path / "log").write_text(train_as_printed(folder, path, 2)))


def test_a_folder_holds_what_it_says(folder):
    record = json.loads((folder / "prepared.json").read_text())
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    seen = {}
    for split in ("train", "valid", "test-14", "test-28"):
        text, answers = (load_indexed_dataset(str(folder / split) + end, dictionary) for end in ("", ".answers"))
        seen[split] = {tuple(sentence.tolist()) for sentence in text}
        assert len(text) == record["counts"][split]["texts"] == (2000 if split == "train" else 60)
        for sentence, marked in zip(text, answers):
            scored = marked != dictionary.pad()
            assert torch.equal(sentence[scored], marked[scored])
            assert scored.sum() == 2
    for split in ("valid", "test-14", "test-28"):
        assert not seen["train"] & seen[split]
    listed = json.loads((folder / "test-14.json").read_text())
    sentence = load_indexed_dataset(str(folder / "test-14"), dictionary)[0]
    for start, stop, source in listed[0]:
        assert sentence[start] == sentence[source]
        assert stop == start + 1


def test_no_text_of_an_evaluation_is_trained_on():
    """Of the 28 texts of parity with 2 to 4 bits the first 20 are kept out."""
    settings = ProbeSettings("parity", (2, 4), (4,), texts=500)
    every = {tuple(probe.words) for probe in training_probes(settings, "train", set())}
    assert len(every) == 28
    forbidden = set(sorted(every)[:20])
    assert {tuple(probe.words) for probe in training_probes(settings, "train", forbidden)} == every - forbidden


def test_only_answers_are_trained_and_scored(folder, trained):
    """The loss of a batch by hand: source, targets, sum over the answers."""
    path = str(trained / "checkpoint_last.pt")
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([path])
    model.eval()
    task.load_dataset("valid")
    batch = task.dataset("valid").collater([task.dataset("valid")[n] for n in range(5)])
    criterion = task.build_criterion(cfg.criterion)
    loss, size, _ = criterion(model, batch)
    assert size == 10
    expected = 0
    for row in range(5):
        source, target = batch["net_input"]["src_tokens"][row], batch["target"][row]
        length = int(batch["net_input"]["src_lengths"][row])
        log_probs = model.get_normalized_probs(model(source[None, :length]), log_probs=True)[0]
        assert source[0] == task.dictionary.eos()
        for place in range(length):
            if target[place] != task.dictionary.pad():
                expected -= log_probs[place, target[place]]
                assert place + 1 == length or source[place + 1] == target[place]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert "answers" in (trained / "log").read_text()


@pytest.mark.slow
def test_a_model_learns_it_and_the_results_are_written(folder, tmp_path, capsys):
    train_as_printed(folder, tmp_path, 400)
    output = tmp_path / "out"
    command = ["probe", "eval", str(folder), str(tmp_path / "checkpoint_last.pt"), "--cpu", "--output", str(output)]
    main(command)
    table = capsys.readouterr().out
    content = json.loads((output / "probe.json").read_text())
    (model,) = content["models"]
    at_14, at_28 = model["results"]
    assert at_14["exact_match"] > 0.9, "attention with any method does this at the training length"
    assert at_14["answers"] == at_28["answers"] == 120
    assert f"{at_14['exact_match']:.1%}" in table
    assert sum(part["answers"] for part in at_14["by_gap"]) == 120
    assert sum(part["answers"] * part["exact_match"] for part in at_28["by_depth"]) == pytest.approx(
        120 * at_28["exact_match"]
    )
    assert {path.name for path in output.iterdir()} == {"probe.json", "probe.md", "probe.png", "depth.png"}
    assert "exists: pass --overwrite" in failure(capsys, main, *command)


def test_options_of_an_evaluation(folder, trained, tmp_path):
    """Batches change nothing; sizes, threshold and overrides do what they say."""

    def evaluate(name, *options):
        path = str(trained / "checkpoint_last.pt")
        main(["probe", "eval", str(folder), path, path, "--cpu", "--output", str(tmp_path / name), *options])
        return json.loads((tmp_path / name / "probe.json").read_text())["models"][0]

    plain, small = evaluate("plain"), evaluate("small", "--max-tokens", "30", "--sizes", "28,14", "--threshold", "0")
    assert small["results"] == plain["results"]
    assert (plain["threshold"], plain["effective_length"], small["effective_length"]) == (0.85, 0, 28)
    other = evaluate("other", "--sizes", "28", "--model-overrides", "{'alibi_length_scale': '0.1'}")
    assert [result["size"] for result in other["results"]] == [28]
    assert "with alibi_length_scale=0.1" in (tmp_path / "other" / "probe.md").read_text()
    assert (tmp_path / "other" / "probe.md").read_text().count(str(trained)) == 2, "two models of one name"


class Planted(torch.nn.Module):
    """Answers as a function of the tokens so far says."""

    def __init__(self, dictionary, rule):
        super().__init__()
        self.decoder = self
        self.dictionary, self.rule = dictionary, rule

    def forward(self, tokens, incremental_state=None):
        scores = torch.zeros(*tokens.shape, len(self.dictionary))
        for row, line in enumerate(tokens.tolist()):
            for place in range(len(line)):
                scores[row, place, self.rule(line[1 : place + 1])] = 1
        return scores

    def get_normalized_probs(self, scores, log_probs):
        return scores

    def max_positions(self):
        return 1000


def test_a_planted_model_has_the_accuracy_that_it_must_have(folder):
    """One that looks up is always right, one that guesses among the four values is right by chance."""
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    rng = random.Random(1)

    def look_up(line):
        return line[line.index(line[-1]) + 1] if line and line[-1] in line[:-1] else 4

    settings = probe_evaluation.ProbeEvaluation(str(folder))
    outcomes = probe_evaluation.outcomes_of_size(Planted(dictionary, look_up), 28, settings, "")
    assert probe_evaluation.accuracy(outcomes)["exact_match"] == 1
    values = [dictionary.index(f"s{n}") for n in range(4, 8)]
    outcomes = probe_evaluation.outcomes_of_size(Planted(dictionary, lambda _: rng.choice(values)), 28, settings, "")
    low, high = probe_evaluation.accuracy(outcomes)["interval"]
    assert low < 0.25 < high


def test_longer_answers_are_decoded_after_the_models_own_choices(build):
    """Through the cache as by whole passes; an error is followed by what the model says after it."""
    model = build("alibi_lm_tiny")
    torch.manual_seed(1)
    tokens = torch.randint(4, 40, (3, 30))
    answers = [[Answer(10, 14, 0), Answer(20, 25, 0)]] * 3
    found = probe_evaluation.predict(model, tokens, answers, 2)
    for row in range(3):
        line = [2, *tokens[row].tolist()]
        for place in [*range(10, 14), *range(20, 25)]:
            with torch.no_grad():
                line[place + 1] = int(model(torch.tensor([line[: place + 1]]))[0][0, -1].argmax())
            assert found[row, place] == line[place + 1]


def test_effective_length_and_interval():
    def results(*shares):
        return [{"size": 2**n, "exact_match": share} for n, share in enumerate(shares)]

    assert probe_evaluation.effective_length(results(1, 0.9, 0.8, 1), 0.85) == 2
    assert probe_evaluation.effective_length(results(0.5, 1), 0.85) == 0
    assert probe_evaluation.wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert probe_evaluation.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "make mqar OUT --train-sizes 10 --test-sizes 64",
            "size 10: mqar with these options has 24 to",
        ),
        ("make copy OUT --train-sizes 9-3 --test-sizes 4", "--train-sizes 9-3: pass the smaller one first"),
        ("gain /dev/zero", "/dev/zero holds no losses of tokens"),
        ("make mqar OUT --train-sizes 64 --test-sizes 64 --queries 9", "--queries 9: there are 8 pairs to ask for"),
        ("make mqar OUT --train-sizes 64 --test-sizes 64 --tests 999999999999", "--tests 999999999999: pass at most"),
        (
            "make mqar OUT --train-sizes 64 --test-sizes 64 --vocabulary 10",
            "mqar with these options needs 16 to 100,000 words",
        ),
        ("make sort OUT --train-sizes 5 --test-sizes 5 --vocabulary 1000000000", "sort with these options needs 2 to"),
        ("make sort OUT --train-sizes 5- --test-sizes 5", "'' is no such number"),
        ("make needles OUT --train-sizes 600 --test-sizes 600 --needles 99", "--needles 99: there are 16 names"),
        ("make needles OUT --train-sizes 99 --test-sizes 99 --asked 5", "--asked 5: there are 4 needles to ask for"),
        ("make parity OUT --train-sizes 1-2 --test-sizes 2", "too few different texts of sizes 1 to 2"),
        ("make parity OUT --train-sizes 1-2 --test-sizes 2 --pairs 3", "unrecognized arguments: --pairs 3"),
        ("make sort OUT --train-sizes 1-x --test-sizes 2", "'x' is no such number"),
        ("make passkey OUT --train-sizes 99 --test-sizes 99 --filler nowhere", "nowhere is no text file"),
        ("make mqar OUT --train-sizes 64 --test-sizes 64 --gap-power nan", "'nan': pass a number from -100 to 100"),
        ("eval DATA CHECKPOINT --sizes 15", "has no texts of size 15, only of 14, 28"),
        ("eval CORPUS CHECKPOINT", "holds no probes: make a folder with fairseq-alibi probe make"),
        ("eval DATA:CORPUS CHECKPOINT", "are several folders: evaluate on one after the other"),
        ("eval OTHER CHECKPOINT", "holds no probes: make a folder"),
        ("eval DATA CHECKPOINT --threshold 2", "'2' is no share"),
        ("eval DATA nowhere.pt", "there is no checkpoint nowhere.pt"),
    ],
)
def test_bad_input_is_one_line(folder, trained, corpus, tmp_path, capsys, arguments, message):
    places = {"OUT": tmp_path / "out", "DATA": folder, "CORPUS": corpus, "CHECKPOINT": trained / "checkpoint_last.pt"}
    places |= {"DATA:CORPUS": f"{folder}:{corpus}", "OTHER": tmp_path / "other"}
    places["OTHER"].mkdir()
    (places["OTHER"] / "prepared.json").write_text('{"probe": {"task": "a later one"}}')
    line = failure(capsys, main, "probe", *(places.get(word, word) for word in arguments.split()))
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("answers", [[], [[[0, 1, 2, 3]]], [[[13, 99, 1]]], [[]], [["one"]], "no JSON"])
def test_a_list_of_answers_that_does_not_fit_is_named(folder, tmp_path, answers):
    for path in folder.glob("*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "test-14.json").write_text(json.dumps(answers * 60) if isinstance(answers, list) else answers)
    settings = probe_evaluation.ProbeEvaluation(str(tmp_path))
    with pytest.raises(ValueError, match="does not list the answers"):
        probe_evaluation.outcomes_of_size(Planted(Dictionary(), len), 14, settings, "")


def test_training_on_longer_texts_or_other_folders_is_refused(folder, corpus, tmp_path):
    common = ("--user-dir", "fairseq_alibi", "--task", "probe", "--arch", "alibi_lm_tiny", "--cpu", "--max-tokens", 512)
    common += ("--optimizer", "adam", "--save-dir", tmp_path, "--max-update", 1)
    done = run(BIN / "fairseq-train", folder, *common, "--tokens-per-sample", 12, check=False)
    assert "pass --tokens-per-sample 15" in done.output
    for data, message in ((corpus, "is no subset of probe data: make"), (f"{folder}:{corpus}", "has other words than")):
        task = tasks.setup_task(training_config(data, "--task", "probe", "--arch", "alibi_lm_tiny").task)
        with pytest.raises(ValueError, match=message):
            task.load_dataset("train")


def test_a_model_can_learn_several_folders_at_once(folder, tmp_path):
    make_probe_data(tmp_path / "copy", ProbeSettings("copy", (2, 3), (3,), 20, 20, options=ProbeOptions(vocabulary=8)))
    task = tasks.setup_task(
        training_config(f"{folder}:{tmp_path / 'copy'}", "--task", "probe", "--arch", "alibi_lm_tiny").task
    )
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    batch = dataset.collater([dataset[n] for n in range(len(dataset))])
    assert len(batch["target"]) == 60 + 20
    answers = batch["target"] != task.dictionary.pad()
    equals = batch["net_input"]["src_tokens"] == task.dictionary.index("=")
    assert equals.any(dim=1).sum() == 20
    assert answers.sum() == batch["ntokens"]
    assert answers[equals].all(), "what follows an equals sign is an answer"


def test_slopes_are_scaled_with_the_size(folder, trained):
    """As those of a model that is given the ratio of 29 to 15 tokens."""
    path, models = str(trained / "checkpoint_last.pt"), []
    for scale in ("auto", str(29 / 15)):
        models.append(load_model(path, read_checkpoint(path), str(folder), {"alibi_length_scale": scale}))
        probe_evaluation.outcomes_of_size(models[-1], 28, probe_evaluation.ProbeEvaluation(str(folder)), "")
    tokens = torch.arange(4, 24)[None]
    assert torch.equal(*(model(tokens)[0] for model in models))


def losses_file(path, **arrays):
    """A file as evaluate writes it: 8 tokens of 3 types."""
    named = {name.replace("_", ", stride "): numpy.array(values, float) for name, values in arrays.items()}
    losses = {f"length {name[1:]}": values for name, values in named.items()}
    numpy.savez(path, tokens=numpy.array([4, 5, 4, 5, 6, 5, 4, 5]), subject=numpy.array("{}"), **losses)
    return path


def test_what_context_gives_by_hand(tmp_path, capsys):
    short, long = [4, 4, 4, 4, 4, 4, 4, 4], [4, 4, 0.5, 4, 5, 1.5, 4, 3]
    path = losses_file(tmp_path / "a.npz", L4_4=short, L8_8=long)
    main(["probe", "gain", str(path), "--output", str(tmp_path / "out")])
    table = capsys.readouterr().out
    (content,) = json.loads((tmp_path / "out" / "gain.json").read_text())["files"]
    rows = {row["group"]: row for row in content["groups"]}
    assert rows["all"] == {
        **{"group": "all", "tokens": 8, "short": 4, "long": 26 / 8, "gain": 6 / 8, "share_that_gains": 3 / 8},
        "perplexity": 2 ** (26 / 8),
    }
    assert rows["with less than 2 tokens of short context"]["gain"] == pytest.approx(1.5 / 4)
    assert rows["with 2 tokens of short context or more"]["gain"] == pytest.approx(4.5 / 4)
    assert (rows["key tokens"]["tokens"], rows["key tokens"]["long"]) == (1, 0.5), (
        "3.5 bits are 2.4 nats, 2.5 bits are 1.7"
    )
    assert rows["1 to 9 times in the text"]["tokens"] == 8
    assert [(part["first"], part["gain"]) for part in content["by_context"]] == [(0, -0.5), (1, 1.25), (2, 1.125)]
    assert "+0.750" in table
    assert (tmp_path / "out" / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_another_model_chooses_the_key_tokens(tmp_path):
    flat = losses_file(tmp_path / "a.npz", L4_4=[4] * 8, L8_8=[4] * 8)
    strong = losses_file(tmp_path / "b.npz", L4_4=[4] * 8, L8_8=[4, 4, 0, 4, 4, 4, 0, 4])
    arguments = ["probe", "gain", str(flat), "--keys-of", str(strong), "--output", str(tmp_path / "out")]
    main(arguments)
    (content,) = json.loads((tmp_path / "out" / "gain.json").read_text())["files"]
    (keys,) = [row for row in content["groups"] if row["group"] == "key tokens"]
    assert (keys["tokens"], keys["perplexity"]) == (2, 16)


@pytest.mark.parametrize(
    "change",
    [
        {"subject": numpy.array("[1]")},
        {"tokens": numpy.full(8, 4.5)},
        {"length 4, stride 4": numpy.full(8, math.nan)},
        {"length 4, stride 0": numpy.zeros(8)},
        {name: numpy.zeros(0, int) for name in ("tokens", "length 4, stride 4", "length 8, stride 8")},
    ],
)
def test_a_file_that_holds_no_losses_is_refused(tmp_path, change):
    with numpy.load(losses_file(tmp_path / "a.npz", L4_4=[4] * 8, L8_8=[4] * 8)) as stored:
        numpy.savez(tmp_path / "b.npz", **{**stored, **change})
    with pytest.raises(ValueError, match="holds no losses of tokens"):
        read_token_losses(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("windowing", "expected"),
    [((4, 4), [0, 1, 2, 3, 0, 1, 2, 3]), ((4, 2), [0, 1, 2, 3, 2, 3, 2, 3]), ((3, None), [0, 1, 2, 2, 2, 2, 2, 2])],
)
def test_the_context_of_each_token(windowing, expected):
    assert context_before(8, Windowing(*windowing)).tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere.npz", "nowhere.npz holds no losses of tokens: make it with"),
        ("FILE --short 5", "has no losses at length 5, only at 4, 8"),
        ("FILE --long 4", "4 tokens are not fewer than 4 (of 4, 8): pass --short and --long"),
        ("FILE --keys-of OTHER", "is of another text than"),
    ],
)
def test_gain_names_bad_input_in_one_line(tmp_path, capsys, arguments, message):
    places = {"FILE": losses_file(tmp_path / "a.npz", L4_4=[4] * 8, L8_8=[4] * 8), "OTHER": tmp_path / "b.npz"}
    with numpy.load(places["FILE"]) as stored:
        numpy.savez(places["OTHER"], **{**stored, "tokens": stored["tokens"] + 1})
    words = (places.get(word, word) for word in arguments.split())
    assert message in failure(capsys, main, "probe", "gain", *words, "--output", tmp_path / "out")

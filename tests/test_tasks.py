"""Each model family in each of fairseq's tasks: the table of examples/language_model/tasks.md."""

import random
import re
import shutil

import pytest
import torch
from conftest import BIN, ROOT, run
from fairseq.tasks import TASK_REGISTRY
from fairseq_cli import train

import fairseq_alibi  # noqa: F401

ARCHITECTURES = ("alibi_lm_tiny", "alibi_masked_lm_tiny", "alibi_transformer_tiny")
BLOCKS = ("--tokens-per-sample", 32, "--max-tokens", 128)
MASKED = ("--criterion", "masked_lm", *BLOCKS)
SENTENCES = ("--num-classes", 2, "--init-token", 0, "--separator-token", 2, "--batch-size", 8)
#: The data folder and the options of each task.
TASKS = {
    "language_modeling": ("lm", BLOCKS),
    "masked_lm": ("lm", MASKED),
    "multilingual_masked_lm": ("multilingual", MASKED),
    "sentence_prediction": ("sentences", ("--criterion", "sentence_prediction", *SENTENCES)),
    "sentence_ranking": ("sentences", ("--criterion", "sentence_ranking", *SENTENCES)),
    "translation": ("pairs", ("--max-tokens", 128)),
    "translation_multi_simple_epoch": ("pairs", ("--langs", "src,tgt", "--lang-pairs", "src-tgt", "--max-tokens", 128)),
    "translation_from_pretrained_xlm": ("pairs", ("--max-tokens", 128)),
    "denoising": ("lm", ("--replace-length", 1, *BLOCKS)),
    "multilingual_denoising": ("multilingual", ("--replace-length", 1, "--multilang-sampling-alpha", 0.7, *BLOCKS)),
    "translation_lev": ("pairs", ("--max-tokens", 128)),
    "translation_from_pretrained_bart": ("pairs", ("--langs", "src,tgt", "--max-tokens", 128)),
    "multilingual_translation": ("pairs", ("--lang-pairs", "src-tgt", "--max-tokens", 128)),
    "multilingual_language_modeling": ("multilingual", BLOCKS),
}
OF_FAIRSEQ = {name for name, task in TASK_REGISTRY.items() if task.__module__.startswith("fairseq.tasks.")}


def table():
    """(task, architecture, yes or no) of each cell."""
    page = (ROOT / "examples" / "language_model" / "tasks.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \|$", page, re.MULTILINE)
    return [(task, architecture, cell) for task, *cells in rows for architecture, cell in zip(ARCHITECTURES, cells)]


@pytest.fixture(scope="session")
def folders(make_once):
    """Data folders for all of the tasks."""

    def fill(folder):
        rng = random.Random(1)
        words = [f"w{n}" for n in range(30)]

        def preprocess(name, *options):
            run(BIN / "fairseq-preprocess", "--destdir", folder / name, *options, cwd=folder)

        def texts(ending):
            return [part for split in ("train", "valid", "test") for part in (f"--{split}pref", f"{split}{ending}")]

        for split, count in (("train", 80), ("valid", 20), ("test", 20)):
            lines = [rng.choices(words, k=rng.randrange(4, 9)) for _ in range(count)]
            (folder / f"{split}.src").write_text("".join(f"{' '.join(line)}\n" for line in lines))
            (folder / f"{split}.tgt").write_text("".join(f"{' '.join(sorted(line))}\n" for line in lines))
            (folder / f"{split}.label").write_text("".join(f"{rng.randrange(2)}\n" for _ in lines))
        preprocess("lm", "--only-source", *texts(".src"))
        shared = ("--srcdict", "lm/dict.txt")
        preprocess("pairs", "-s", "src", "-t", "tgt", *shared, "--tgtdict", "lm/dict.txt", *texts(""))
        for name, ending in (("input0", ".src"), ("input1", ".tgt"), ("input2", ".src")):
            preprocess(f"sentences/{name}", "--only-source", *shared, *texts(ending))
        preprocess("sentences/label", "--only-source", *texts(".label"))
        for split in ("train", "valid", "test"):  # for sentence_ranking
            shutil.copy(folder / f"{split}.label", folder / "sentences" / "label")
        shutil.copytree(folder / "lm", folder / "multilingual" / "aa")
        shutil.copy(folder / "lm" / "dict.txt", folder / "multilingual")
        preprocess("multilingual/bb", "--only-source", *shared, *texts(".tgt"))

    return make_once("tasks", fill)


def training(folders, task, architecture, save_dir, *more, check=True):
    """Runs fairseq-train for two updates, or as `more` says."""
    data, options = TASKS[task]
    common = (
        "--user-dir",
        "fairseq_alibi",
        "--task",
        task,
        "--arch",
        architecture,
        "--optimizer",
        "adam",
        "--lr",
        0.001,
    )
    common += ("--cpu", "--save-dir", save_dir, "--no-epoch-checkpoints", "--required-batch-size-multiple", 1)
    common += ("--num-workers", 0, "--log-format", "simple", "--max-update", 2)
    if "--criterion" not in options:
        common += ("--criterion", "cross_entropy")
    return run(BIN / "fairseq-train", folders / data, *common, *options, *more, check=check)


def test_the_page_names_every_task_of_fairseq_and_the_table_those_that_are_tried():
    assert {task for task, *_ in table()} == TASKS.keys()
    page = (ROOT / "examples" / "language_model" / "tasks.md").read_text()
    assert {*re.findall(r"`(\w+)`", page)} >= OF_FAIRSEQ


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_other_task_of_fairseq_is_refused_by_name(monkeypatch, tmp_path, architecture):
    """Speech, audio and the rest, some of whose options contradict those of the model."""
    refused = OF_FAIRSEQ - {task for task, one, cell in table() if one == architecture and cell == "yes"}
    assert len(refused) > 20
    for task in refused:
        monkeypatch.setattr("sys.argv", ["fairseq-train", str(tmp_path), "--task", task, "--arch", architecture])
        with pytest.raises(SystemExit, match=f"^--arch {architecture} cannot be used in --task {task}, only in "):
            train.cli_main()


@pytest.mark.slow
@pytest.mark.parametrize(("task", "architecture", "cell"), table())
def test_a_model_works_in_a_task_or_is_refused_by_name(folders, tmp_path, task, architecture, cell):
    """It trains, resumes, and is validated by fairseq-validate with the loss of its training run."""
    done = training(folders, task, architecture, tmp_path, check=cell == "yes")
    if cell == "no":
        assert done.returncode == 1
        line = done.output.strip().splitlines()[-1]
        assert line.startswith(f"--arch {architecture} cannot be used in --task {task}, only in ")
        assert "Traceback" not in done.output
        return
    done = training(folders, task, architecture, tmp_path, "--max-update", 4)
    assert "@ 2 updates" in done.output, "it was resumed"
    trained = float(re.findall(r"valid on 'valid' subset \| loss ([\d.]+)", done.output)[-1])
    data, options = TASKS[task]
    batches = options[options.index("--max-tokens" if "--max-tokens" in options else "--batch-size") :][:2]
    checkpoint = tmp_path / "checkpoint_last.pt"
    arguments = (
        "--path",
        checkpoint,
        "--valid-subset",
        "valid",
        *batches,
        "--required-batch-size-multiple",
        1,
        "--cpu",
    )
    common = ("--user-dir", "fairseq_alibi", "--task", task, "--num-workers", 0, "--log-format", "simple")
    if "sentence" in task:
        common += ("--criterion", task, "--num-classes", 2)
    done = run(BIN / "fairseq-validate", folders / data, *common, *arguments)
    loss = float(re.findall(r"valid \| loss ([\d.]+)", done.output.replace("valid on 'valid' subset", "valid"))[-1])
    assert loss == pytest.approx(trained, abs=2e-3)


def test_a_masked_model_is_fine_tuned_and_predicts(folders, tmp_path):
    """From a checkpoint of masked_lm, as fairseq's roberta; the hub needs no BPE."""
    from fairseq_alibi.models.masked_model import AlibiMaskedLanguageModel

    training(folders, "masked_lm", "alibi_masked_lm_tiny", tmp_path / "masked")
    restored = ("--restore-file", tmp_path / "masked" / "checkpoint_last.pt", "--reset-optimizer", "--reset-meters")
    restored += ("--reset-dataloader", "--reset-lr-scheduler")
    training(folders, "sentence_prediction", "alibi_masked_lm_tiny", tmp_path / "tuned", *restored, "--lr", 1e-9)
    weights = [
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=False)["model"] for name in ("masked", "tuned")
    ]
    name = "encoder.sentence_encoder.layers.0.fc1.weight"
    torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-6, rtol=0)
    hub = AlibiMaskedLanguageModel.from_pretrained(
        str(tmp_path / "masked"), "checkpoint_last.pt", data_name_or_path=str(folders / "lm")
    ).eval()
    tokens = hub.encode("w1 w2 w3")
    assert hub.decode(tokens) == "w1 w2 w3"
    assert hub.extract_features(tokens).shape == (1, 5, 128)
    text, probability, token = hub.fill_mask("w1 <mask> w3", topk=3)[0]
    assert text == f"w1 {token} w3"
    assert 0 < probability < 1
    hub.register_classification_head("new", num_classes=3)
    assert hub.predict("new", tokens).exp().sum().item() == pytest.approx(1)
    tuned = AlibiMaskedLanguageModel.from_pretrained(
        str(tmp_path / "tuned"), "checkpoint_last.pt", data_name_or_path=str(folders / "sentences")
    ).eval()
    assert tuned.predict("sentence_classification_head", tuned.encode("w1 w2", "w3")).shape == (1, 2)

"""Training script, YAML and architecture say the same; fairseq's commands run unmodified with them."""

import dataclasses
import functools
import os
import shlex
import sys
from argparse import Namespace

import pytest
import torch
from conftest import BIN, ROOT, run

from fairseq_alibi.experiments.run_config import read_config

#: Groups of a config of which one of several is chosen by `_name`.
CHOSEN = ("optimizer", "lr_scheduler", "criterion")
LENGTHS = [64, 128, 256, 512, 1024, 1536, 2048, 3072]


@pytest.fixture(scope="module")
def script_arguments(tmp_path_factory):
    """What scripts/train_wikitext103.sh gives fairseq-train, caught by a stand-in for it."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "dict.txt").write_text("")
    for name in ("fairseq-train", "fairseq-alibi"):
        (folder / name).write_text('#!/bin/bash\nprintf "%q " "$@"\n')
    # The number of GPUs without waiting for torch.
    (folder / "python").write_text(f'#!/bin/bash\n[ "$1" = -c ] || exec {sys.executable} "$@"\necho 0\n')
    for path in folder.iterdir():
        path.chmod(0o755)

    @functools.cache
    def arguments(length, *more):
        path = f"{folder}:{BIN}:{os.environ['PATH']}"
        script = ROOT / "scripts" / "train_wikitext103.sh"
        return shlex.split(run("bash", script, folder, "checkpoints", length, *more, PATH=path, VENV="none").output)

    return arguments


def config_of_arguments(arguments):
    """The fairseq config that fairseq-train makes of its arguments, with the architecture applied."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import fairseq_alibi  # noqa: F401

    return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), arguments))


def config_of_yaml(name, *overrides):
    """A file of configs/ as fairseq-hydra-train gets it, what it leaves out included."""
    return read_config(ROOT / "configs" / name, list(overrides))


def overrides_for(length):
    """What wikitext103.yaml says has to be overridden for another length."""
    more = ["dataset.max_tokens=3072", "optimization.update_freq=[3]"] if length == 3072 else []
    return [f"task.tokens_per_sample={length}", *more]


@pytest.mark.parametrize("length", [LENGTHS[0], 512, LENGTHS[-1]])
def test_yaml_says_what_the_script_says(script_arguments, length):
    cfg = config_of_arguments(script_arguments(length))
    yaml = config_of_yaml("wikitext103.yaml", *overrides_for(length))
    assert yaml.checkpoint.save_dir == f"checkpoints/alibi-wikitext103-{length}", "or one length would resume another"
    for group in ("common", "task", "dataset", "optimization", "distributed_training", "checkpoint", "model", *CHOSEN):
        keys = yaml[group]
        theirs = cfg[group] if isinstance(cfg[group], Namespace) else Namespace(**cfg[group])
        for key in keys:
            if key in ("_name", "data", "save_dir", "tensorboard_logdir", "user_dir", "base_shuffle"):
                continue
            if key in ("cpu", "distributed_backend"):  # as fp16 below
                continue
            if key == "fp16":  # the script looks for a GPU itself, and found none
                assert not theirs.fp16
                continue
            assert getattr(theirs, key) == keys[key], f"{group}.{key}"
    assert cfg.common.cpu != cfg.common.fp16
    for group in ("task", *CHOSEN):
        assert cfg[group]._name == yaml[group]["_name"]


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("wikitext103.yaml", "alibi_lm_wiki103"),
        ("tiny.yaml", "alibi_lm_tiny"),
        ("alibi_1_3b.yaml", "alibi_lm_1_3b"),
    ],
)
def test_yaml_has_every_size_of_the_architecture(name, arch):
    """Under hydra, what the YAML leaves out takes the dataclass' default, not the architecture's value."""
    from fairseq.models import ARCH_CONFIG_REGISTRY

    from fairseq_alibi.models.language_model import language_model_config

    expected = Namespace()
    ARCH_CONFIG_REGISTRY[arch](expected)
    defaults = {field.name: field.default for field in dataclasses.fields(language_model_config())}
    under_hydra = {**defaults, **config_of_yaml(name)["model"]}
    for key, value in vars(expected).items():
        # the task's; without effect while there is no BASE layer; how a model is run, not what it is
        if key not in ("add_bos_token", "base_shuffle", "checkpoint_activations"):
            assert under_hydra[key] == value, key


@pytest.mark.parametrize("length", LENGTHS)
def test_script_keeps_the_authors_tokens_per_update(script_arguments, length):
    cfg = config_of_arguments(script_arguments(length))
    assert cfg.task.tokens_per_sample == length
    blocks = cfg.dataset.max_tokens // length
    tokens_per_update = blocks * length * cfg.optimization.update_freq[0]
    assert tokens_per_update == (8192 if length == 2048 else 9216), "2,048 does not divide 9,216"
    assert cfg.dataset.required_batch_size_multiple == 1, "or fairseq rounds the blocks down to a multiple of 8"


def test_script_passes_arguments_on_and_they_win(script_arguments):
    arguments = script_arguments(512, "--position-method", "sinusoidal", "--max-update", "7", "--update-freq", "2")
    cfg = config_of_arguments(arguments)
    assert (cfg.model.position_method, cfg.optimization.max_update) == ("sinusoidal", 7)
    assert cfg.optimization.update_freq == [2]


@pytest.mark.slow
def test_wikitext103_script_trains(corpus, tmp_path):
    small = ["--decoder-layers", 1, "--decoder-embed-dim", 32, "--decoder-input-dim", 32, "--decoder-output-dim", 32]
    small += ["--decoder-ffn-embed-dim", 32, "--adaptive-input-cutoff", "10,20", "--adaptive-softmax-cutoff", "10,20"]
    script = ROOT / "scripts" / "train_wikitext103.sh"
    done = run("bash", script, corpus, tmp_path, 64, *small, "--max-update", 2, "--log-interval", 1, "--cpu")
    assert "Warning" not in done.output, "a calm console"
    assert torch.load(tmp_path / "checkpoint_last.pt")["cfg"]["model"]["position_method"] == "alibi"
    assert list((tmp_path / "tensorboard" / "train").iterdir())


def test_hydra_train_runs_with_a_config_that_builds_on_another(corpus, tmp_path):
    """A key of the base is there, and so is one of the config itself: hydra would let the wrong file win in silence."""
    small = ["decoder_layers=1", "decoder_embed_dim=32", "decoder_input_dim=32", "decoder_output_dim=32"]
    small += ["decoder_ffn_embed_dim=32", "adaptive_input_cutoff='10,20'", "adaptive_softmax_cutoff='10,20'"]
    overrides = [f"task.data={corpus}", f"checkpoint.save_dir={tmp_path}/save", "optimization.max_update=1"]
    overrides += overrides_for(64)
    overrides += [f"model.{option}" for option in small] + ["common.fp16=false", "common.cpu=true"]
    overrides += [f"hydra.run.dir={tmp_path}/hydra", "dataset.disable_validation=true"]
    run(BIN / "fairseq-hydra-train", "--config-dir", "configs", "--config-name", "wikitext103", *overrides)
    cfg = torch.load(tmp_path / "save" / "checkpoint_last.pt")["cfg"]
    assert (cfg["task"]["tokens_per_sample"], cfg["dataset"]["max_tokens"]) == (64, 9216)
    assert (cfg["lr_scheduler"]["warmup_updates"], cfg["model"]["dropout"]) == (16000, 0.3)
    assert list((tmp_path / "save" / "tensorboard" / "train").iterdir())


@pytest.mark.slow
def test_hydra_train_runs_with_the_tiny_config(corpus, tmp_path):
    overrides = [f"task.data={corpus}", f"checkpoint.save_dir={tmp_path}/save", "optimization.max_update=2"]
    overrides += [f"hydra.run.dir={tmp_path}/hydra", "dataset.disable_validation=true"]
    # This tree's startup module, whatever is installed.
    path = os.pathsep.join([str(ROOT / "fairseq_alibi" / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [BIN / "fairseq-hydra-train", "--config-dir", "configs", "--config-name", "tiny", *overrides]
    assert "Warning" not in run(*command, PYTHONPATH=path).output, "a calm console"
    model = torch.load(tmp_path / "save" / "checkpoint_last.pt")["cfg"]["model"]
    assert (model["decoder_layers"], model["decoder_embed_dim"], model["position_method"]) == (2, 128, "alibi")

"""The planner builds every config's model; its formulas say what PyTorch and fairseq really keep, step and multiply."""

import shlex
import sys
from argparse import Namespace

import check_plan
import pytest
import torch
from conftest import ROOT, run
from fairseq import optim
from fairseq.data import data_utils
from fairseq.data.dictionary import Dictionary
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fairseq_alibi.__main__ import main
from fairseq_alibi.experiments import run_memory
from fairseq_alibi.experiments.planned_run import PlannedRun
from fairseq_alibi.experiments.run_config import MOMENTS, find_dictionary, read_config
from fairseq_alibi.models.language_model import AlibiLanguageModel

CONFIGS = ROOT / "configs"

#: Types where the config does not say them, and parameters. WikiText-103's are what fairseq logs for Baevski & Auli's
#: model, the others layers * (4 (C^2 + C) + 2 C F + F + C + 4 C) + types * C + 2 C for a norm after the last layer.
PARAMETERS = {
    "wikitext103": (None, 246_933_504),
    "bookcorpus": (29_000, 16 * 12_596_224 + 29_000 * 1024),
    "alibi_1_3b": (None, 25 * 50_358_272 + 50_264 * 2048 + 2 * 2048),
    "tiny": (2_000, 2 * 198_272 + 2_000 * 128 + 2 * 128),
}
ADAPTIVE = ["criterion._name=adaptive_loss", "+model.adaptive_input=true", "+model.tie_adaptive_weights=true"]
ADAPTIVE += [f"+model.adaptive_{part}_cutoff='100,200'" for part in ("input", "softmax")]
ADAPTIVE += ["model.share_decoder_input_output_embed=false"]


def planned(*overrides, name="tiny", types=300):
    """A planned run of a config with overrides."""
    cfg = read_config(CONFIGS / f"{name}.yaml", list(overrides))
    return PlannedRun(cfg, find_dictionary(cfg, CONFIGS / f"{name}.yaml", types))


def loss_of(run, rows):
    """A model of the planned run that is there, and a function that computes the loss of `rows` random blocks."""
    task = Namespace(source_dictionary=run.dictionary, target_dictionary=run.dictionary)
    torch.manual_seed(1)
    model = AlibiLanguageModel.build_model(run.cfg.model, task).train()
    counts = torch.tensor(run.dictionary.count[4:], dtype=torch.float)
    tokens = 4 + torch.multinomial(counts, rows * run.length, replacement=True).view(rows, run.length)

    def loss():
        softmax = model.decoder.adaptive_softmax
        x, _ = model(tokens)
        if softmax is None:
            logits = model.get_normalized_probs((x, None), log_probs=True)
            return torch.nn.functional.nll_loss(logits.flatten(0, 1), tokens.flatten())
        parts = zip(*softmax(x, tokens))
        return sum(torch.nn.functional.cross_entropy(*part) for part in parts if part[1] is not None)

    return model, loss


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_has_its_parameters(path):
    types, parameters = next(value for name, value in PARAMETERS.items() if path.stem.startswith(name))
    run = planned(name=path.stem, types=types)
    assert all(parameter.is_meta for parameter in run.model.parameters())
    assert sum(run.parameters.values()) == parameters


def test_each_model_has_a_config():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"wikitext103", "bookcorpus", "alibi_1_3b", "tiny"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dropout=0"],
        ["model.activation_dropout=0.1"],
        ["model.attention_dropout=0.1"],
        ["model.activation_fn=gelu", "model.no_decoder_final_norm=true"],
        ["model.decoder_normalize_before=false"],
        ["+model.checkpoint_activations=true"],
        ["task.tokens_per_sample=512", "model.attention=fused"],
        ["task.tokens_per_sample=512", "model.attention=mask"],
        ["model.decoder_layers=4", "model.decoder_ffn_embed_dim=256", "model.decoder_attention_heads=2"],
        ["model.position_method=sinusoidal"],
        [*ADAPTIVE, "+model.adaptive_softmax_dropout=0.1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_activations_are_what_autograd_keeps(overrides):
    """Counted in a real forward pass, which keeps of the logits a third of what they are at their highest."""
    run, rows = planned(*overrides), 4
    model, loss = loss_of(run, rows)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # the tensor too, or its place is used again
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    mask = model.decoder.setup.kept_mask.get(torch.device("cpu"))
    assert (mask is not None) == run.masked
    mask = (torch.empty(0) if mask is None else mask).untyped_storage()
    assert mask.nbytes() == run_memory.mask_memory(run)
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in parameters)
    measured -= mask.nbytes() if mask.data_ptr() in kept else 0
    tokens = rows * run.length
    expected = run_memory.activation_memory(run, rows) + run_memory.logits_memory(run, tokens) / 3
    assert expected == pytest.approx(measured, rel=0.03 if run.bands else 0.005)


@pytest.mark.parametrize("overrides", [[], ADAPTIVE, ["model.decoder_input_dim=64", "model.decoder_output_dim=64"]])
def test_flops_are_those_that_pytorch_counts(overrides):
    """PyTorch counts attention over all pairs, and adaptive parts by the tokens that there are."""
    run, rows = planned("model.attention=mask", *overrides), 16
    _, loss = loss_of(run, rows)
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    attention = sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" in str(name))
    tokens = rows * run.length
    causal = 6 * tokens * run.width * (run.length + 1) * run.layers
    products = counter.get_total_flops() - attention
    assert run.flops(tokens)["model"] - causal == pytest.approx(products, rel=0.02 if run.bands else 1e-3)


def test_attention_flops():
    """Two products with C multiplications and additions for each pair, forward once and backward twice."""
    run = planned(types=2_000)
    products = 2 * (4 * 128 * 128 + 2 * 128 * 512) + 2_000 * 128  # multiplications for a token, without attention
    pairs = sum(range(1, run.length + 1))
    assert run.flops(run.length)["model"] == 3 * 2 * (run.length * products + 2 * 2 * 128 * pairs)


@pytest.mark.parametrize("name", MOMENTS)
def test_optimizer_states(name):
    run = planned(f"optimizer._name={name}")
    parameter = torch.nn.Parameter(torch.ones(1000))
    parameter.grad = torch.ones(1000)
    optimizer = optim.build_optimizer(run.cfg.optimizer, [parameter])
    optimizer.step()
    tensors = [x for x in optimizer.optimizer.state[parameter].values() if torch.is_tensor(x) and x.numel() > 1]
    assert sum(x.nbytes for x in tensors) == 4000 * MOMENTS[name]
    assert run_memory.lasting_memory(run, 1)["optimizer states"] == 4 * MOMENTS[name] * sum(run.parameters.values())


def test_peak_has_one_checkpointed_layer_or_the_logits():
    for types in (300, 30_000):
        run = planned("+model.checkpoint_activations=true", types=types)
        memory = run_memory.memory_by_part(run, 1, 8)
        layer, logits = memory["one layer, computed again"], memory["logits and loss"]
        assert (layer > logits) == (types == 300)
        assert memory["peak"] == sum(memory.values()) - memory["peak"] - min(layer, logits)


HALF = ["common.cpu=false", "common.fp16=true"]
SHARDED = [*HALF, "distributed_training.ddp_backend=fully_sharded"]


@pytest.mark.parametrize(
    ("overrides", "gpus", "bytes_per_parameter"),
    [
        ([], 1, (4, 4, 8, 0)),
        (HALF, 1, (6, 6, 8, 0)),
        (HALF, 2, (6, 6, 8, 2)),
        ([*HALF, "optimizer._name=nag"], 1, (6, 6, 4, 0)),
        ([*HALF, "common.memory_efficient_fp16=true"], 1, (2, 2, 8, 0)),
        ([*HALF, "common.memory_efficient_fp16=true", "distributed_training.zero_sharding=os"], 4, (2, 2, 2, 2)),
        (SHARDED, 4, (1, 1, 2, 4)),
        ([*SHARDED, "common.memory_efficient_fp16=true"], 4, (0.5, 0.5, 2, 4)),
    ],
)
def test_lasting_memory(overrides, gpus, bytes_per_parameter):
    run = planned(*overrides)
    count = sum(run.parameters.values())
    assert list(run_memory.lasting_memory(run, gpus).values()) == [part * count for part in bytes_per_parameter]


@pytest.mark.parametrize(
    ("options", "types", "gpus", "rows"),
    [
        (["+model.checkpoint_activations=true"], 300, 4, 32),  # the highest moment is the backward pass of a layer
        (["+model.checkpoint_activations=true", "optimization.update_freq=[1]"], 300, 1, 2),
        pytest.param(["++model.min_params_to_wrap=1000"], 30_000, 2, 2, marks=pytest.mark.slow),  # logits
    ],
)
def test_sharded_peak_is_what_torch_tracks(options, types, gpus, rows, monkeypatch, capsys):
    sizes = ["model.decoder_layers=3", "model.dropout=0", "distributed_training.ddp_backend=fully_sharded"]
    words = ["check_plan.py", str(CONFIGS / "tiny.yaml"), *sizes, *options, "--types", types, "--gpus", gpus]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--rows", str(rows)])
    check_plan.main()
    processes, plan, _, ratio = map(float, capsys.readouterr().out.splitlines()[-1].split())
    assert (processes, plan > 0) == (gpus, True)
    assert ratio == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_memory_of_a_training_is_measured(tmp_path):
    check_plan.made_up_data(tmp_path, 300, 5000)
    overrides = ["common.cpu=true", "dataset.max_tokens=256", *check_plan.TINY]
    assert check_plan.trained_peak(CONFIGS / "tiny.yaml", overrides, 1, str(tmp_path)) > 100 * 2**20


@pytest.mark.parametrize(("multiple", "max_tokens"), [(1, 9216), (8, 9216), (8, 2048), (8, 4096), (1, 1000), (8, 500)])
def test_rows_are_fairseqs(multiple, max_tokens):
    run = planned("task.tokens_per_sample=512", f"dataset.required_batch_size_multiple={multiple}")
    rows = run.rows(max_tokens)
    if max_tokens < 512:
        assert rows == 0
        return
    batches = data_utils.batch_by_size(
        list(range(100)), None, [512] * 100, max_tokens=max_tokens, required_batch_size_multiple=multiple
    )
    assert rows == len(batches[0])


def test_batches_keep_the_update():
    run = planned("dataset.max_tokens=2304", "optimization.update_freq=[2]")  # 18 blocks of 128, twice
    assert run.blocks_per_update() == 36
    assert run.batches(1)[:3] == [(36, 1), (18, 2), (12, 3)]
    assert run.batches(4) == [(9, 1), (3, 3), (1, 9)]
    with pytest.raises(ValueError, match=r"8 GPUs cannot share the 36 blocks .* --gpus 1, 2, 3, 4, 6, 9, 12, 18, 36"):
        run.batches(8)


def test_largest_batch_that_fits():
    run = planned()
    memory = {rows: run_memory.memory_by_part(run, 1, rows)["peak"] / run_memory.GIB for rows, _ in run.batches(1)}
    assert list(memory.values()) == sorted(memory.values(), reverse=True)
    for rows in (32, 8, 1):
        assert run_memory.plan_tables(run, 1, memory[rows] / run_memory.USABLE * 1.001)[1][0] == rows
    assert run_memory.plan_tables(run, 1, memory[1] * 0.99)[1] is None


def test_command(capsys):
    main(
        ["plan", str(CONFIGS / "wikitext103.yaml"), "task.tokens_per_sample=1024", "--gpus", "3", "--gpu-memory", "40"]
    )
    printed = capsys.readouterr().out
    assert "246,933,504" in printed
    command = (
        "--config-name wikitext103 task.tokens_per_sample=1024 dataset.max_tokens=3072 'optimization.update_freq=[1]'"
    )
    assert command in printed
    assert printed.splitlines()[-1].endswith("distributed_training.distributed_world_size=3 task.data=DATA")


def test_the_command_trains_what_was_planned():
    """Other overrides are in it as they were given; what the plan decides takes the place of theirs."""
    given = [
        "task.data=my data",
        "++dataset.max_tokens=512",
        "+model.adaptive_input=true",
        "optimization.update_freq=[9]",
    ]
    settings = {"dataset.max_tokens": 1024, "optimization.update_freq": "[2]"}
    command = run_memory.training_command(CONFIGS / "tiny.yaml", given, settings)
    words = ["--config-dir", str(CONFIGS), "--config-name", "tiny", "task.data=my data", "+model.adaptive_input=true"]
    assert shlex.split(command) == [
        *("fairseq-hydra-train", *words, "dataset.max_tokens=1024", "optimization.update_freq=[2]")
    ]


@pytest.mark.parametrize(
    ("name", "overrides", "factor"),
    [
        ("wikitext103", [], 2 * (9 * 1024 + 4096) + 2 * 1024 + 3 * 4096 + 4 * 8),
        ("wikitext103", ["task.tokens_per_sample=3072", "model.attention=fused"], 38_960),
        ("alibi_1_3b", ["task.tokens_per_sample=1024"], 2 * (9 * 2048 + 8192) + 4 * 8192 + 4 * 16),
    ],
)
def test_a_layer_on_a_gpu(name, overrides, factor):
    """Bytes per token by hand: e (9 C + F) + 4 H, 2 C and (1 + e) F for dropout, 4 F for gelu; 8 C with tiles."""
    run = planned(*overrides, name=name, types=None)
    assert run.cost.layer_bytes / run.length == pytest.approx(factor, rel=1e-3)


def test_a_plan_of_many_layers_takes_no_longer():
    run = planned("model.decoder_layers=1000000")
    assert run.parameters["layers"] == 10**6 * run.layer_parameters + 2 * 128
    assert run_memory.plan_tables(run, 1, 1e9)[1] is not None


def test_vocabulary_is_that_of_the_data(corpus):
    cfg = read_config(CONFIGS / "tiny.yaml", [f"task.data={corpus}"])
    dictionary = find_dictionary(cfg, CONFIGS / "tiny.yaml")
    assert dictionary.count == Dictionary.load(str(corpus / "dict.txt")).count


@pytest.mark.slow
def test_command_line_is_quiet():
    """Tables and one command; nothing of what fairseq and hydra have to say."""
    done = run(sys.executable, "-m", "fairseq_alibi", "plan", "configs/wikitext103.yaml", "--gpu-memory", "40")
    assert done.output.startswith("parameters of")
    assert "Warning" not in done.output


@pytest.mark.parametrize(("option", "message"), [("model.decoder_attention_heads=7", "num_heads"), ("types", "vocab")])
def test_sizes_that_fairseq_asserts_are_refused_without_assertions(option, message, monkeypatch):
    """As under `python -O`: the refusal does not come from fairseq."""
    monkeypatch.setattr("fairseq_alibi.experiments.planned_run.build_model", lambda *_, **__: pytest.fail("too late"))
    overrides = [*ADAPTIVE] if option == "types" else [option]
    with pytest.raises(ValueError, match=f"the options make no model: .*{message}"):
        planned(*overrides, types=150)

"""A position method from outside of the package: the example of the README, and what registration checks."""

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import BIN, ROOT, random_tokens, run

from fairseq_alibi.core import positions

EXAMPLE = ROOT / "examples" / "position_method"


@pytest.fixture
def registry():
    """Restores the registered methods after a test."""
    from fairseq_alibi.models.language_model import refresh_config

    before = {stack: dict(methods) for stack, methods in positions._METHODS.items()}
    yield positions._METHODS
    for stack, methods in before.items():
        positions._METHODS[stack] = methods
    refresh_config()
    sys.modules.pop("position_method", None)


@pytest.fixture
def gaussian(registry, monkeypatch):
    """The example, imported as `--user-dir` imports it."""
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    import position_method

    return position_method.Gaussian


def test_the_example_has_the_bias_of_its_formula_and_learns(gaussian):
    method = gaussian(3, width=1.5)
    distance = torch.arange(-2, 5)
    expected = [[-d * d / 2 / 1.5**2 for d in distance.tolist()]] * 3
    torch.testing.assert_close(method.distance_bias(distance), torch.tensor(expected))
    method.distance_bias(distance).sum().backward()
    assert (method.log_width.grad != 0).all()


@pytest.mark.parametrize("attention", ["mask", "fused"])
def test_the_example_is_an_option_of_the_model_decodes_and_is_checked(gaussian, build, attention):
    """It is registered after the models of fairseq were."""
    arguments = ["--position-method", "gaussian", "--gaussian-width", 9, "--attention", attention]
    model = build("alibi_lm_tiny", *arguments, "--tokens-per-sample", 16)
    assert model.decoder.position_method.num_heads == 8
    tokens, state = random_tokens(model, 2, 300), {}
    with torch.no_grad():
        expected = model(tokens)[0]
        steps = [model.decoder(tokens[:, :read], incremental_state=state)[0][:, -1] for read in (290, 291, 300)]
    for step, position in zip(steps, (289, 290, 299)):
        torch.testing.assert_close(step, expected[:, position], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="--gaussian-width must be above 0, not -1"):
        build("alibi_lm_tiny", "--position-method", "gaussian", "--gaussian-width", -1)
    with pytest.raises(ValueError, match=r"--gaussian-width 2.0 is for --position-method gaussian, not alibi"):
        build("alibi_lm_tiny", "--gaussian-width", 2)
    with pytest.raises(SystemExit):  # argparse: the encoder has no such method
        build("alibi_masked_lm_tiny", "--position-method", "gaussian", task="masked_lm")


def test_a_method_registered_before_fairseq_is_imported_is_there(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(EXAMPLE.parent)!r})
import position_method
assert "fairseq" not in sys.modules
import fairseq
from fairseq.models import MODEL_DATACLASS_REGISTRY
option = MODEL_DATACLASS_REGISTRY["alibi_lm"].__dataclass_fields__["position_method"]
assert "gaussian" in [choice.value for choice in option.type]
"""
    run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=ROOT)


@pytest.mark.slow
def test_the_example_of_the_readme_trains_evaluates_decodes_and_is_not_exported(corpus, tmp_path):
    """Each command of fairseq and of ours, in processes of their own, as a reader types them."""
    here = ["--user-dir", "examples/position_method"]
    model = ["--task", "language_modeling", "--arch", "alibi_lm_tiny", "--position-method", "gaussian"]
    sizes = ["--tokens-per-sample", 32, "--max-tokens", 256, "--max-update", 3, "--optimizer", "adam", "--cpu"]
    help_text = run(BIN / "fairseq-train", "--help", *here, *model).output
    assert "--gaussian-width" in help_text
    run(BIN / "fairseq-train", corpus, *here, *model, *sizes, "--save-dir", tmp_path, "--gaussian-width", 20)
    checkpoint = tmp_path / "checkpoint_last.pt"
    state = torch.load(checkpoint)["model"]["decoder.position_method.log_width"]
    assert not torch.equal(state, torch.full_like(state, math.log(20))), "they are trained"
    evaluation = [corpus, *here, "--path", checkpoint, "--gen-subset", "valid", "--tokens-per-sample", 128, "--cpu"]
    assert "Perplexity" in run(BIN / "fairseq-eval-lm", *evaluation).output
    (tmp_path / "in").write_text("word1 word2\n")
    decoding = ["--task", "language_modeling", "--path", checkpoint, "--beam", 2, "--input", tmp_path / "in", "--cpu"]
    assert "H-0" in run(BIN / "fairseq-interactive", corpus, *here, *decoding).output
    ours = run(BIN / "fairseq-alibi", "evaluate", corpus, checkpoint, *here, "--lengths", "32,128", "--cpu").output
    assert "gaussian, trained on 32 tokens" in ours
    refused = run(BIN / "fairseq-alibi", "export-hf", checkpoint, tmp_path / "out", *here, check=False)
    assert refused.returncode == 1
    assert "gaussian" in refused.output.splitlines()[-1]
    unknown = run(BIN / "fairseq-alibi", "evaluate", corpus, checkpoint, "--cpu", check=False)
    assert unknown.returncode == 1
    assert "--user-dir" in unknown.output.splitlines()[-1]


class Silent(positions.PositionMethod):
    bias_kind = "distance"


class Secret(positions.PositionMethod):
    def distance_bias(self, distance):
        return distance


class Unknown(positions.PositionMethod):
    bias_kind = "colour"


class Embedder(positions.PositionMethod):
    adds_embedding = True


class Plain(positions.PositionMethod):
    pass


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (Silent, "silent", r"announces what distance_bias\(\) returns, but does not define"),
        (Secret, "secret", r"defines distance_bias\(\), but its attribute bias_kind says otherwise"),
        (Unknown, "unknown", "bias_kind 'colour' is none of none, linear, distance, key, pair"),
        (Embedder, "embedder", r"announces what position_embedding\(\) returns"),
        (Plain, "alibi", r"position method 'alibi' is taken by fairseq_alibi.core.alibi.ALiBi"),
    ],
)
def test_attributes_and_methods_have_to_agree(registry, kind, name, message):
    with pytest.raises(ValueError, match=message):
        positions.register_position_method(name)(kind)


class LogN(positions.PositionMethod):
    """Scores times the logarithm of the number of keys that a query sees."""

    scales_queries = True

    def query_scale(self, visible):
        return visible.float().log1p()[:, None]


@pytest.mark.parametrize("attention", ["mask", "auto"])
def test_a_scale_of_queries_counts_the_keys_that_each_sees(registry, build, attention):
    """Full pass and step by step, with left padding, against the formula."""
    positions.register_position_method("log_n")(LogN)
    model = build("alibi_lm_tiny", "--position-method", "log_n", "--attention", attention)
    plain = build("alibi_lm_tiny", "--position-method", "none")
    tokens = random_tokens(model, 1, 12)
    assert not torch.allclose(model(tokens)[0], plain(tokens)[0], atol=1e-3)
    with torch.no_grad():
        expected = model(tokens)[0]
        state = {}
        steps = [model.decoder(tokens[:, : n + 1], incremental_state=state)[0] for n in range(12)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-5)
        padded = torch.cat([torch.full((1, 5), model.decoder.padding_idx), tokens], dim=1)
        torch.testing.assert_close(model(padded)[0][:, 5:], expected, rtol=1e-4, atol=1e-5)
    x = torch.randn(12, 1, 128)
    inputs = model.decoder.setup.inputs(x, positions_span(12))
    torch.testing.assert_close(inputs.query_scale[0, 0], torch.arange(1, 13).float().log1p())


def positions_span(length):
    from fairseq_alibi.core.attention_inputs import TokenSpan

    return TokenSpan(length, length, 0)


def test_names_of_methods_stand_in_their_definitions_only():
    """Code elsewhere asks a method for its attributes; a list of the files of core is no use of a name."""
    names = set(positions.position_methods()) - {"alibi", "none"}
    for path in sorted((ROOT / "fairseq_alibi").rglob("*.py")):
        if path.parent.name == "core":
            continue
        text = Path(path).read_text()
        for name in names:
            assert f'"{name}"' not in text, f"{path}: {name}"

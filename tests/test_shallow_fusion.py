"""Language models of this plugin inside fairseq-generate: with --lm-path, in ensembles, and with their own prompts."""

import io
import re
import shutil
from argparse import Namespace
from contextlib import redirect_stdout

import pytest
import torch
from conftest import BIN, run
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq_cli import generate

from fairseq_alibi.models.generator import Generator

WEIGHT = 0.3
SMALL = ("--decoder-layers", 1, "--decoder-embed-dim", 32, "--decoder-attention-heads", 4)


@pytest.fixture(scope="module")
def pairs(corpus, tmp_path_factory):
    """A translation folder whose dictionaries are that of the language models; every sentence translates to itself."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = (corpus.parent / "valid.txt").read_text().split("\n")
    text = "\n".join(line for line in lines if line)
    for split in ("train", "valid"):
        for side in ("src", "tgt"):
            (folder / f"{split}.{side}").write_text("\n".join(text.split("\n")[:20]) + "\n")
    run(
        *(BIN / "fairseq-preprocess", "-s", "src", "-t", "tgt", "--destdir", folder / "data"),
        *("--trainpref", folder / "train", "--validpref", folder / "valid"),
        *("--srcdict", corpus / "dict.txt", "--tgtdict", corpus / "dict.txt"),
    )
    shutil.copy(corpus / "dict.txt", folder / "data")  # where fairseq-generate looks for that of the language model
    return folder / "data"


@pytest.fixture(scope="module")
def translation(pairs, tmp_path_factory):
    """Checkpoints of translation models by architecture."""
    made = {}

    def make(arch):
        if arch not in made:
            made[arch] = tmp_path_factory.mktemp("translation") / "checkpoint_last.pt"
            sizes = [
                f"--{side}-{part}={number}"
                for side in ("encoder", "decoder")
                for part, number in (("layers", 1), ("embed-dim", 32), ("ffn-embed-dim", 32), ("attention-heads", 4))
            ]
            run(
                *(BIN / "fairseq-train", pairs, "--user-dir", "fairseq_alibi", "--task", "translation", "--cpu"),
                *("--arch", arch, *sizes, "--optimizer", "adam", "--lr", 0.01, "--max-tokens", 256),
                *("--max-update", 5, "--disable-validation", "--save-dir", made[arch].parent, "--no-epoch-checkpoints"),
            )
        return made[arch]

    return make


def generated(data, path, *arguments, task="translation"):
    """What fairseq-generate prints, in this process: per sentence id its hypotheses as (score, words)."""
    command = [data, "--user-dir", "fairseq_alibi", "--task", task, "--path", path, "--cpu", "--gen-subset", "valid"]
    parser = options.get_generation_parser()
    command = [str(part) for part in (*command, "--beam", 3, "--nbest", 3, "--max-len-b", 12, *arguments)]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, command))
    with redirect_stdout(io.StringIO()) as out:
        generate.main(cfg)
    found = {}
    for number, score, words in re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", out.getvalue(), re.MULTILINE):
        found.setdefault(int(number), []).append((float(score), words))
    return found


def load(*paths):
    """Models and task of checkpoints, as fairseq loads them."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(path) for path in paths])
    return [model.eval() for model in models], task


@pytest.mark.parametrize("lm_options", [(), ("--alibi-length-scale", "auto"), ("--position-method", "rotary")], ids=str)
def test_scores_with_a_language_model_are_the_sum(pairs, translation, train, lm_options):
    """The translation model and, times the weight, the language model; fairseq's score is the mean over the tokens."""
    path, lm_path = translation("alibi_transformer_tiny"), train(*lm_options)
    found = generated(pairs, path, "--lm-path", lm_path, "--lm-weight", WEIGHT)
    alone = generated(pairs, path)
    assert len(found) == len(alone) == 20
    (model,), task = load(path)
    (lm,), _ = load(lm_path)
    dictionary, source = task.target_dictionary, task.source_dictionary
    task.load_dataset("valid")
    for number in range(3):
        tokens = task.dataset("valid")[number]["source"][None]
        for score, words in found[number]:
            target = dictionary.encode_line(words, add_if_not_exist=False).long()
            inputs = torch.cat([torch.tensor([dictionary.eos()]), target[:-1]])[None]
            with torch.no_grad():
                log_probs = model.get_normalized_probs(
                    model(tokens, torch.tensor([tokens.size(1)]), inputs), log_probs=True
                )[0]
                log_probs = log_probs + WEIGHT * lm.get_normalized_probs(lm(inputs), log_probs=True)[0]
            expected = log_probs.gather(1, target[:, None]).mean() / torch.log(torch.tensor(2.0))
            assert score == pytest.approx(expected.item(), abs=2e-3)
    assert found != alone, "the language model matters"
    assert len(source) == len(dictionary)


IMPOSSIBLE = {
    "--lm-path names a translation model": ("--lm-path", "translation model"),
    "come with the sentences of fairseq-interactive": ("--constraints",),
    "are for models that refine their output": ("--print-step",),
    "with --replace-unk=''": ("--replace-unk",),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_what_fairseqs_generation_cannot_do_is_one_line(pairs, translation, message):
    path = translation("alibi_transformer_tiny")
    with pytest.raises(SystemExit, match=re.escape(message)):
        generated(pairs, path, *(path if part == "translation model" else part for part in IMPOSSIBLE[message]))


def test_an_ensemble_averages_probabilities(pairs, translation):
    paths = translation("alibi_transformer_tiny"), translation("transformer")
    found = generated(pairs, ":".join(map(str, paths)))
    models, task = load(*paths)
    task.load_dataset("valid")
    for number in range(3):
        tokens = task.dataset("valid")[number]["source"][None]
        score, words = found[number][0]
        target = task.target_dictionary.encode_line(words, add_if_not_exist=False).long()
        inputs = torch.cat([torch.tensor([task.target_dictionary.eos()]), target[:-1]])[None]
        with torch.no_grad():
            probs = sum(
                m.get_normalized_probs(m(tokens, torch.tensor([tokens.size(1)]), inputs), log_probs=False)[0]
                for m in models
            )
        expected = (probs / 2).log2().gather(1, target[:, None]).mean()
        assert score == pytest.approx(expected.item(), abs=2e-3)


def test_a_prompt_read_in_one_pass_has_the_summed_scores_too(corpus, build):
    """task language_modeling: with another language model scores and tokens are those of fairseq's generator."""
    task = LanguageModelingTask.setup_task(LanguageModelingConfig(data=str(corpus)))
    model, lm = build("alibi_lm_tiny"), build("alibi_lm_tiny", "--position-method", "none", seed=2)
    prefix = torch.tensor([[26, 14, 9, 19, 5], [41, 4, 21, 7, 8]])
    made = []
    for kind in (Generator, SequenceGenerator):
        generator = task.build_generator(
            [model],
            Namespace(beam=3, max_len_a=0, max_len_b=12),
            seq_gen_cls=kind,
            extra_gen_cls_kwargs={"lm_model": lm, "lm_weight": WEIGHT},
        )
        made.append(
            task.inference_step(generator, [model], {"net_input": {"src_tokens": prefix}}, prefix_tokens=prefix)
        )
    for ours, theirs in zip(*made):
        assert ours[0]["tokens"].tolist() == theirs[0]["tokens"].tolist()
        torch.testing.assert_close(ours[0]["positional_scores"], theirs[0]["positional_scores"], atol=2e-5, rtol=1e-5)
        tokens = ours[0]["tokens"]
        inputs = torch.cat([torch.tensor([2]), tokens[:-1]])[None]
        with torch.no_grad():
            log_probs = model.get_normalized_probs(model(inputs), log_probs=True)[0]
            log_probs = log_probs + WEIGHT * lm.get_normalized_probs(lm(inputs), log_probs=True)[0]
        expected = log_probs.gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(ours[0]["positional_scores"], expected, atol=1e-4, rtol=1e-4)


def test_references_are_scored_for_reranking(pairs, translation):
    found = generated(pairs, translation("alibi_transformer_tiny"), "--score-reference")
    assert len(found) == 20


@pytest.mark.parametrize("method", ["lm_only", "noisy_channel"])
def test_a_noisy_channel_reranker_adds_up_the_three_models(pairs, translation, train, method):
    """fairseq's examples/fast_noisy_channel: forward model, language model, and a model of the source."""
    from fairseq.examples.fast_noisy_channel.noisy_channel_sequence_generator import NoisyChannelSequenceGenerator

    (model,), task = load(translation("alibi_transformer_tiny"))
    (lm,), lm_task = load(train())
    generator = NoisyChannelSequenceGenerator(
        *(method, task.target_dictionary, task.source_dictionary),
        **{"beam_size": 2, "k2": 2, "max_len_b": 8, "normalize_scores": False, "channel_models": [model]},
        **{"ch_weight": 0.7, "lm_models": [lm], "lm_dict": lm_task.dictionary, "lm_weight": WEIGHT},
    )
    task.load_dataset("valid")
    source = task.dataset("valid")[0]["source"]
    (found, *_), *_ = generator.generate([model], task.dataset("valid").collater([task.dataset("valid")[0]]))
    target = found["tokens"]

    def log_probs(net, targets, *inputs):
        shifted = torch.cat([targets.new_tensor([2]), targets[:-1]])[None]
        inputs = [inputs[0][None], torch.tensor([len(inputs[0])])] if inputs else []
        with torch.no_grad():
            return net.get_normalized_probs(net(*inputs, shifted), log_probs=True)[0].gather(1, targets[:, None])

    forward, prior = log_probs(model, target, source).sum(), WEIGHT * log_probs(lm, target).sum()
    channel = 0.7 * log_probs(model, source, target)[:-1].sum()  # the end of the source is not scored
    expected = forward + prior
    if method == "noisy_channel":
        expected = forward / len(target) + (channel + prior) / len(source)
    assert found["score"] == pytest.approx(expected.item(), abs=1e-3)

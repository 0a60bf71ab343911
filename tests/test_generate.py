"""Generation gives what fairseq's generator gives, reads a prompt in one pass, and the command turns text into text."""

import copy
import math
import pickle
import subprocess
from argparse import Namespace
from contextlib import redirect_stdout
from io import BytesIO, StringIO, TextIOWrapper

import pytest
import torch
from conftest import BIN, ROOT, run
from fairseq.data.data_utils import collate_tokens
from fairseq.sequence_generator import SequenceGenerator
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_alibi.__main__ import main
from fairseq_alibi.evaluation import generation
from fairseq_alibi.files.data_folders import text_options
from fairseq_alibi.models import generator as prompts
from fairseq_alibi.models.generator import Generator

ADAPTIVE = ["--criterion", "adaptive_loss", "--adaptive-softmax-cutoff", "10,20"]
ADAPTIVE += ["--no-share-decoder-input-output-embed"]

SEARCHES = {
    "greedy": {"beam": 1},
    "beam": {"beam": 4},
    "beam, cold, length penalty": {"beam": 4, "temperature": 0.5, "lenpen": 2.0},
    "sampling": {"beam": 1, "sampling": True},
    "sampling, 3 of the top 5": {"beam": 3, "sampling": True, "sampling_topk": 5},
    "sampling, top p": {"beam": 1, "sampling": True, "sampling_topp": 0.7},
    "diverse": {"beam": 4, "diverse_beam_groups": 2},
}

#: Token ids of prompts: 4 and more are words, 2 is a line end.
PROMPTS = {
    "one": [list(range(4, 24))],
    "one token": [[7]],
    "of different lengths": [[5, 6, 7], list(range(4, 30)), [9, 9, 9, 9, 9, 9]],
    "empty": [[], []],
    "one of them empty": [[], [5, 6, 7]],
    "with line ends": [[5, 6, 2, 8, 9, 10], list(range(4, 20))],
    "longer than the longest text": [list(range(4, 40))],
}


@pytest.fixture(scope="module")
def task(corpus):
    return LanguageModelingTask.setup_task(LanguageModelingConfig(data=str(corpus)))


@pytest.fixture(scope="module")
def models(build):
    """Untrained models by name, in lists as for an ensemble."""
    plain = build("alibi_lm_tiny")
    adaptive = build("alibi_lm", *ADAPTIVE[:4], "--decoder-layers", 2, "--decoder-embed-dim", 64)
    return {
        "plain": [plain],
        "sinusoidal": [build("alibi_lm_tiny", "--position-method", "sinusoidal")],
        "adaptive": [adaptive],
        "two": [plain, build("alibi_lm_tiny", "--position-method", "none", seed=2)],
        "two adaptive": [plain, adaptive],
    }


def hypotheses(task, models, prompts, kind, max_len_b=30, extra=None, **options):
    torch.manual_seed(3)
    generator = task.build_generator(
        models, Namespace(max_len_a=0, max_len_b=max_len_b, **options), seq_gen_cls=kind, extra_gen_cls_kwargs=extra
    )
    prefix = collate_tokens([torch.tensor(prompt, dtype=torch.long) for prompt in prompts], task.dictionary.pad())
    sample = {"net_input": {"src_tokens": prefix}}
    return task.inference_step(generator, models, sample, prefix_tokens=prefix)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for our_hypotheses, their_hypotheses in zip(ours, theirs):
        assert len(our_hypotheses) == len(their_hypotheses)
        for one, other in zip(our_hypotheses, their_hypotheses):
            assert one["tokens"].tolist() == other["tokens"].tolist()
            torch.testing.assert_close(one["score"], other["score"], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(one["positional_scores"], other["positional_scores"], atol=2e-5, rtol=1e-5)


@pytest.fixture
def passes(monkeypatch):
    """Lengths of the passes that any decoder's first layer makes: (rows, tokens)."""
    made = []
    real = prompts.AlibiDecoder.extract_features_scriptable

    def counted(self, prev_output_tokens, *args, **kwargs):
        hook = self.layers[0].register_forward_hook(
            lambda _, inputs, __: made.append((inputs[0].size(1), inputs[0].size(0)))
        )
        try:
            return real(self, prev_output_tokens, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(prompts.AlibiDecoder, "extract_features_scriptable", counted)
    return made


@pytest.mark.parametrize(
    ("model", "way"),
    [
        *(("plain", way) for way in SEARCHES),
        *((model, way) for model in ("sinusoidal", "adaptive", "two") for way in ("beam", "sampling, 3 of the top 5")),
        ("two adaptive", "beam, cold, length penalty"),
    ],
)
def test_hypotheses_and_scores_are_fairseqs(task, models, model, way):
    for some in PROMPTS.values():
        options = {"prompts": some, "models": models[model], **SEARCHES[way]}
        assert_same(hypotheses(task, kind=Generator, **options), hypotheses(task, kind=SequenceGenerator, **options))


@pytest.mark.parametrize("way", ["greedy", "beam, cold, length penalty"])
@pytest.mark.parametrize("limits", [{}, {"max_len_b": 9}, {"min_len": 30}, {"unkpen": 0.5, "unnormalized": True}])
def test_behind_a_long_prompt_hypotheses_are_fairseqs(task, models, monkeypatch, way, limits):
    """fairseq's loop, which copies all tokens at each step, begins at the last token that all prompts have."""
    monkeypatch.setattr(prompts, "CHUNK", 2)
    steps, real = [], prompts.PromptReader.forward_decoder
    monkeypatch.setattr(
        prompts.PromptReader, "forward_decoder", lambda *inputs: steps.append(inputs[1].size(1)) or real(*inputs)
    )
    lines = [[5, 6, 3, 9, 2, 11], [5, 9, 9, 3, 9, 9, 9]]
    for some, skipped in ((lines, 3), (PROMPTS["one"], 19), (PROMPTS["one token"], 0)):
        options = {"prompts": some, "models": models["plain"], **SEARCHES[way], **limits}
        assert_same(hypotheses(task, kind=Generator, **options), hypotheses(task, kind=SequenceGenerator, **options))
        assert max(steps) <= 31 - skipped
        steps.clear()


def test_without_a_prompt_hypotheses_are_fairseqs(task, models):
    sample = {"net_input": {"src_tokens": torch.full((2, 1), 2)}}
    options = Namespace(beam=3, max_len_b=10)
    ours, theirs = (
        task.build_generator(models["plain"], options, seq_gen_cls=kind).generate(models["plain"], sample)
        for kind in (Generator, SequenceGenerator)
    )
    assert_same(ours, theirs)


def test_with_another_first_token_hypotheses_are_fairseqs(corpus, models):
    task = LanguageModelingTask.setup_task(LanguageModelingConfig(data=str(corpus), add_bos_token=True))
    options = {"prompts": PROMPTS["of different lengths"], "models": models["plain"], "beam": 2}
    with_bos = hypotheses(task, kind=Generator, **options)
    assert_same(with_bos, hypotheses(task, kind=SequenceGenerator, **options))


def test_a_longest_sequence_is_fairseqs(task, build):
    limited = [build("alibi_lm_tiny", "--max-target-positions", 16)]
    for length in (10, 15, 20):
        options = {"prompts": [list(range(4, 4 + length))], "models": limited, "beam": 2}
        assert_same(hypotheses(task, kind=Generator, **options), hypotheses(task, kind=SequenceGenerator, **options))


def test_ensembles_with_other_models_are_fairseqs(task, build, models):
    mixed = [models["plain"][0], build("transformer_lm", "--decoder-layers", 1, "--decoder-embed-dim", 64)]
    options = {"prompts": PROMPTS["of different lengths"], "models": mixed, "beam": 2}
    assert_same(hypotheses(task, kind=Generator, **options), hypotheses(task, kind=SequenceGenerator, **options))


@pytest.mark.parametrize("model", ["plain", "sinusoidal"])
def test_a_prompt_is_read_in_one_pass_and_once_for_all_beams(task, models, passes, monkeypatch, model):
    reorders = []
    real = prompts.AlibiDecoder.reorder_incremental_state_scripting
    monkeypatch.setattr(
        prompts.AlibiDecoder,
        "reorder_incremental_state_scripting",
        lambda self, state, order: reorders.append(order.tolist()) or real(self, state, order),
    )
    prompt = [4 + i % 40 for i in range(40)]
    hypotheses(task, models[model], [prompt, prompt], Generator, max_len_b=45, extra={"eos": 0}, beam=3)
    assert passes == [(2, 40)] + [(6, 1)] * 6, "two prompts of 40; then 5 new tokens and the end, per beam"
    assert reorders[0] == [0, 0, 0, 1, 1, 1]
    assert len(reorders) == 1 + 5, "keys are copied for the beams, and then moved at no step inside the prompt"


def test_a_prompt_is_read_as_far_as_the_shortest_goes(task, models, passes):
    hypotheses(task, models["plain"], [[5] * 8, [6] * 10], Generator, max_len_b=12, extra={"eos": 0}, beam=1)
    assert passes == [(2, 8)] + [(2, 1)] * 5


@pytest.mark.parametrize("model", ["sinusoidal", "two adaptive"])
def test_a_long_prompt_never_makes_scores_of_all_its_positions(task, models, passes, monkeypatch, model):
    """Scores are made for some positions at a time."""
    prompt = [4 + i % 37 for i in range(100)]
    options = {"prompts": [prompt, prompt[::-1]], "models": models[model], "max_len_b": 104, "beam": 2}
    theirs = hypotheses(task, kind=SequenceGenerator, **options)
    types = len(task.dictionary)
    monkeypatch.setattr(prompts, "SCORES", 2 * 7 * types)
    sizes = []
    for kind in {type(one) for one in models[model]}:
        real = kind.get_normalized_probs

        def measured(self, net_output, *args, real=real, **kwargs):
            found = real(self, net_output, *args, **kwargs)
            sizes.append(found.numel())
            return found

        monkeypatch.setattr(kind, "get_normalized_probs", measured)
    passes.clear()
    ours = hypotheses(task, kind=Generator, **options)
    assert max(sizes) == 2 * 7 * types
    prompt_passes = [shape for shape in passes if shape[1] > 1]
    assert prompt_passes == [(2, 100)] * len(models[model])
    assert_same(ours, theirs)


def test_forced_tokens_of_no_probability_can_be_drawn(task, models):
    """fairseq's own ends in an error: at a low temperature the probability of a prompt's token underflows to 0."""
    options = {"prompts": [[5, 9, 30, 11]], "models": models["plain"], "sampling": True, "beam": 1}
    options["temperature"] = 0.005
    with pytest.raises(RuntimeError, match="multinomial"):
        hypotheses(task, kind=SequenceGenerator, **options)
    ((one,),) = hypotheses(task, kind=Generator, **options)
    assert one["tokens"].tolist()[:4] == [5, 9, 30, 11]


@pytest.mark.parametrize("size", [2, 3])
def test_no_ngram_comes_twice_but_those_of_the_prompt(task, models, size):
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    for way in ("greedy", "beam", "sampling, 3 of the top 5"):
        made = hypotheses(
            task, models["plain"], [prompt], Generator, 80, {"eos": 0}, **SEARCHES[way], no_repeat_ngram_size=size
        )
        tokens = made[0][0]["tokens"].tolist()[:-1]
        assert tokens[: len(prompt)] == prompt
        ngrams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
        new = ngrams[len(prompt) - size + 1 :]
        assert len(set(new)) == len(new)
        assert not set(new) & set(ngrams[: len(prompt) - size + 1])


@pytest.mark.parametrize("prompts", [[[5, 2, 6, 2]], [[5, 2, 6], [7, 8, 9, 2, 2, 10, 11]]])
def test_a_prompt_may_have_line_ends_and_still_end_at_the_next(task, models, prompts):
    (model,) = models["plain"]
    made = hypotheses(task, [model], prompts, Generator, 200, {"lines_in_prompt": True}, beam=1)
    for prompt, (one, *_) in zip(prompts, made):
        tokens = one["tokens"].tolist()
        assert tokens[: len(prompt)] == prompt
        assert tokens.index(2, len(prompt)) == len(tokens) - 1
        log_probs = torch.log_softmax(model(torch.tensor([[2, *tokens[:-1]]]))[0][0], dim=-1)
        expected = log_probs.gather(1, one["tokens"][:, None])[:, 0]
        torch.testing.assert_close(one["positional_scores"], expected, atol=1e-4, rtol=1e-4)


def test_the_task_of_a_model_builds_the_generator(corpus, build):
    task = LanguageModelingTask.setup_task(LanguageModelingConfig(data=str(corpus)))
    model = build("alibi_lm_tiny")
    args = Namespace(**vars(model.decoder.args)) if isinstance(model.decoder.args, Namespace) else model.decoder.args
    assert type(task.build_generator([model], Namespace())) is SequenceGenerator
    for _ in range(2):
        model_of_task = type(model).build_model(args, task)
    del task.state  # which no copy of a fairseq task survives
    for same in (task, copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert type(same.build_generator([model_of_task], Namespace())) is Generator
        assert type(same.build_generator([model_of_task], Namespace(score_reference=True))) is SequenceScorer
        stock = same.build_generator([model_of_task], Namespace(), seq_gen_cls=SequenceGenerator)
        assert type(stock) is SequenceGenerator
        assert same.build_generator.func.__self__ is same
    type(model).build_model(args, Namespace(source_dictionary=task.dictionary, target_dictionary=task.dictionary))


# The command


@pytest.fixture(scope="module")
def trained(train):
    """A checkpoint that knows lines of 0 to 12 words, trained on 32 tokens."""
    return train(updates=30)


@pytest.fixture(scope="module")
def varied(train):
    """A checkpoint of large random weights, whose likeliest text depends on all before it; 32 tokens."""
    path = train("--decoder-layers", 2, "--decoder-embed-dim", 64, arch="alibi_lm", updates=1)
    state = torch.load(path)
    torch.manual_seed(4)
    for name, weight in state["model"].items():
        if weight.dim() == 2:
            weight.normal_(std=(1 if "embed" in name else 4) * weight.size(1) ** -0.5)
    torch.save(state, path)
    return path


def command(*arguments, text=None, check=True):
    """Runs `scripts/generate.sh` on CPU; returns status, stdout and stderr apart."""
    done = subprocess.run(
        [BIN / "python", "-m", "fairseq_alibi", "generate", *map(str, arguments)],
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        cwd=ROOT,
    )
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def continued(corpus, trained, varied):
    """Text that the command makes, run in this process: `continued("word1 word2", "--tokens", 5)`.

    Draws are from the trained model, likeliest texts from the varied one.
    """

    def make(*arguments):
        model = varied if "--beam" in arguments else trained
        out = StringIO()
        with redirect_stdout(out):
            main(["generate", str(corpus), str(model), "--cpu", *map(str, arguments)])
        return out.getvalue()

    return make


def full_passes(corpus, trained, prompt, number):
    """Greedy continuation, each token from a pass over everything before it."""
    model = generation.load_text_model(str(corpus), str(trained))
    tokens = generation.encode_text(model, prompt).tolist()
    never = [model.tgt_dict.pad(), model.tgt_dict.bos()]
    for _ in range(number):
        with torch.no_grad():
            scores = model.models[0](torch.tensor([[2, *tokens]]))[0][0, -1]
        scores[never] = -math.inf
        tokens.append(int(scores.argmax()))
    return generation.decode_tokens(model, torch.tensor(tokens))


@pytest.mark.slow
def test_greedy_text_equals_full_passes_eight_times_past_the_training_length(corpus, varied):
    prompt, number = "word1 word2 word3", 8 * 32 - 3
    done = command(corpus, varied, "--cpu", "--beam", 1, prompt, "--tokens", number)
    assert done.stdout == full_passes(corpus, varied, prompt, number) + "\n"
    assert len(set(done.stdout.split())) > 10, "a text that says something"
    assert done.stderr == ""


def test_text_goes_on_past_line_ends_which_are_line_breaks(continued):
    text = continued("word1 word2", "--tokens", 100)
    assert text.startswith("word1 word2 ")
    lines = text[:-1].split("\n")
    assert len(lines) > 3
    assert sum(len(line.split()) for line in lines) + len(lines) - 1 == 102, "a line break is a token"
    assert set(text.split()) <= {f"word{i}" for i in range(40)}


def test_it_stops_at_the_line_end_if_asked_to(continued):
    whole = continued("word1 word2", "--tokens", 100)
    assert continued("word1 word2", "--tokens", 100, "--stop-at-line-end") == whole.split("\n")[0] + "\n"
    assert len(continued("word1 word2", "--tokens", 1, "--stop-at-line-end").split()) == 3


def test_standard_input_is_one_prompt_of_several_lines(corpus, varied, continued, monkeypatch):
    text = "word1 word2\n\nword3\nword4 word5\n"
    made = command(corpus, varied, "--cpu", "--stop-at-line-end", text=text.encode()).stdout
    assert made.startswith(text[:-1])
    assert len(made.split()) > len(text.split())
    assert made.count("\n") == text.count("\n")
    # one final newline is dropped, so here the prompt ends with a line end
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"word1\r\n\r\n")))
    assert continued("--beam", 1, "--tokens", 7) == full_passes(corpus, varied, "word1\n", 7) + "\n"


@pytest.mark.parametrize("beam", [1, 4])
def test_each_prompt_of_a_batch_gets_the_text_it_gets_alone(continued, beam):
    prompts = [" ".join(f"word{i}" for i in range(1, 11)), "", *(f"word{i}" for i in range(7, 17))]
    options = ["--beam", beam, "--tokens", 4]
    alone = [continued(*options, prompt) for prompt in prompts]
    assert continued(*options, *prompts) == "\n".join(alone)


def test_draws_are_the_seeds(continued):
    made = [continued("word1", "--seed", seed) for seed in (1, 2, 1)]
    assert made[0] == made[2] != made[1]
    assert continued("word1") == continued("word1", "--sampling-topk", 10, "--sampling", "--seed", 1) == made[0]
    greedy = continued("word1", "--sampling-topk", 1)
    assert greedy != made[0]
    assert continued("word1", "--sampling-topp", 1e-9) == greedy
    assert continued("word1", "--sampling", "--temperature", 0.001) == greedy


def test_a_beam_as_wide_as_the_dictionary_finds_the_likeliest_text(corpus, varied):
    model = generation.load_text_model(str(corpus), str(varied))
    prompt = generation.encode_text(model, "word1 word2")
    types = len(model.tgt_dict)
    nexts = torch.tensor([[2, *prompt, one] for one in range(types)])
    log_probs = torch.log_softmax(model.models[0](nexts)[0][:, -2:], dim=-1)
    likelihood = log_probs[0, 0, :, None] + log_probs[:, 1]  # of a first and a second token
    never = [model.tgt_dict.bos(), model.tgt_dict.pad()]
    likelihood[never], likelihood[:, never] = -math.inf, -math.inf
    (made,) = generation.continue_batch(model, [prompt], 2, beam=types)
    assert made[len(prompt) :].tolist() == list(divmod(int(likelihood.argmax()), types))


def test_unknown_tokens_are_counted_on_standard_error(continued, capsys):
    made = continued("--tokens", 1, "word1 nobody <s> knows", "word2")
    assert capsys.readouterr().err == "3 of the prompt's 5 tokens are unknown, <unk>\n"
    assert made.startswith("word1 <unk> <unk> <unk>")


def test_text_is_tokenized_as_the_data_was_prepared(trained, corpus, tmp_path):
    """Moses and BPE come from the data folder; options say otherwise."""
    text = 'If "a value" is not (or no longer) valid, we don\'t return it.\n' * 50
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text)
    files = [word for split in ("train", "valid", "test") for word in (f"--{split}", tmp_path / f"{split}.txt")]
    bpe, words = tmp_path / "bpe", tmp_path / "words"
    prepare = [BIN / "python", "-m", "fairseq_alibi", "prepare-text", "--workers", 1]
    run(*prepare, bpe, *files, "--bpe-merges", 20)
    words.mkdir()
    (words / "prepared.json").write_text('{"settings": {"corpus": "text", "tokenizer": "moses", "bpe_merges": null}}')
    assert text_options(bpe) == {
        "tokenizer": "moses",
        "bpe": "subword_nmt",
        "bpe_codes": str(bpe / "bpe.codes"),
    }
    assert text_options(words) == {"tokenizer": "moses", "bpe": None, "bpe_codes": None}
    assert text_options(corpus) == {"tokenizer": None, "bpe": None, "bpe_codes": None}
    from fairseq.data import Dictionary, encoders
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    options = Namespace(**text_options(bpe))
    model = generation.GeneratorHubInterface.__new__(generation.GeneratorHubInterface)
    torch.nn.Module.__init__(model)
    model.src_dict = model.tgt_dict = Dictionary.load(str(bpe / "dict.txt"))
    model.tokenizer, model.bpe = encoders.build_tokenizer(options), encoders.build_bpe(options)
    prepared = MMapIndexedDataset(str(bpe / "test"))
    two_lines = text[: text.index("\n", len(text) // 50)]
    tokens = generation.encode_text(model, two_lines)
    assert tokens.tolist() == torch.cat([prepared[0], prepared[1]])[:-1].tolist()
    assert generation.decode_tokens(model, tokens) == two_lines


def test_a_prompt_that_is_no_text_is_one_line(corpus, trained):
    done = command(corpus, trained, text=b"word1 \xff", check=False)
    assert done.returncode == 1
    assert "not UTF-8" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_length_scale_is_the_models(corpus, trained, continued):
    plain, double, one = (
        continued("word1", "--beam", 1, *more) for more in ([], ["--length-scale", 4], ["--length-scale", 1])
    )
    assert plain == one != double
    # twice the training length, prompt included
    assert continued("word1", "--beam", 1, "--tokens", 127, "--length-scale", "auto") == continued(
        "word1", "--beam", 1, "--tokens", 127, "--length-scale", 4
    )


# fairseq's own commands


@pytest.mark.slow
def test_fairseqs_commands_generate_with_it(corpus, trained):
    common = [corpus, "--user-dir", "fairseq_alibi", "--task", "language_modeling", "--path", trained, "--cpu"]
    counted = (
        "import sys, fairseq_alibi.models.generator as g, {module} as m\n"
        "real = g.PromptReader.read\n"
        "g.PromptReader.read = lambda self, tokens, *a: print('read', tuple(tokens.shape)) or real(self, tokens, *a)\n"
        "m.cli_main()"
    )

    def fairseq(module, *arguments, text=None):
        code = counted.format(module=module)
        done = subprocess.run(
            [BIN / "python", "-c", code, *map(str, [*common, *arguments])],
            input=text,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    made = fairseq("fairseq_cli.interactive", "--beam", 2, "--max-len-b", 20, text="word1 word2 word3\n\nword4\n")
    assert made.count("\nH-") == 3
    assert "read (1, 3)" in made
    assert "read (1, 1)" in made
    assert made.count("read (") == 2, "not for the empty line"
    blocks = ["--gen-subset", "test", "--sample-break-mode", "none", "--tokens-per-sample", 50, "--batch-size", 1]
    made = fairseq("fairseq_cli.generate", *blocks, "--prefix-size", 5, "--beam", 1)
    assert "\nH-0" in made
    assert "read (1, 5)" in made
    assert "\nH-0" in fairseq("fairseq_cli.generate", *blocks, "--beam", 1)


def test_the_hub_interface_generates_with_it(corpus, trained, passes):
    from fairseq_alibi.models.language_model import AlibiLanguageModel

    model = AlibiLanguageModel.from_pretrained(str(trained.parent), "checkpoint_last.pt", data_name_or_path=str(corpus))
    prompt = "word1 word2 word3 word4"
    sample = model.sample(prompt, beam=1, sampling=True, sampling_topk=10, max_len_a=1, max_len_b=20)
    assert sample.startswith(prompt)
    assert passes[0] == (1, 4)
    assert model.score(prompt)["positional_scores"].numel() == 4

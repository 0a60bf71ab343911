"""What a GPU would run, without one: on the meta device, which has no values, so that any look at one is an error.

Kernels are stand-ins that demand what those of a GPU demand. Autocast is a mode that casts as torch.autocast does.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import types
import warnings

import pytest
import torch
from conftest import ROOT, random_tokens, run, training_config
from test_attention import LargestTensor
from torch.overrides import TorchFunctionMode

from fairseq_alibi.core import (
    attention,
    attention_setup,
    flash_attention,
    flex_attention,
    mask_limits,
    position_methods,
    tiled_attention,
)
from fairseq_alibi.core.attention_inputs import (
    AttentionInputs,
    DistanceBias,
    FoldedMask,
    LinearBias,
    NoBias,
    PairBias,
    TokenSpan,
)
from fairseq_alibi.core.attention_setup import AttentionSettings, AttentionSetup
from fairseq_alibi.core.positions import PositionMethod, distances, linear_bias
from fairseq_alibi.core.transformer import Transformer
from fairseq_alibi.evaluation import checkpoint_evaluation
from fairseq_alibi.experiments import gpu_check
from fairseq_alibi.files.data_folders import made_up_dictionary
from fairseq_alibi.files.results import write_json
from fairseq_alibi.models.translation import AlibiTransformer

LENGTH = 300
META = torch.device("meta")


class Autocast(TorchFunctionMode):
    """Casts the inputs of matrix products to a half precision, as autocast of a GPU does."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            args = [x.to(self.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
        return function(*args, **(kwargs or {}))


def fused_kernel(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Stands for scaled_dot_product_attention on a GPU, with what its fused kernels demand."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.device == k.device == v.device == META
    out = q[..., : v.size(-1)] + k.sum((2, 3), keepdim=True) + v.sum(2, keepdim=True)
    if attn_mask is not None:
        assert attn_mask.dtype == q.dtype
        assert attn_mask.device == META
        shape = (q.size(0), q.size(1), q.size(2), k.size(2))
        assert attn_mask.expand(shape).shape == shape
        assert attn_mask.stride(-1) == 1
        assert attn_mask.size(-2) == 1 or attn_mask.stride(-2) % 8 == 0, "PyTorch copies a mask whose rows lie so"
        out = out + attn_mask.sum() * 0
    return out


def flex_kernel(q, k, v, of_pass, causal):
    """Stands for the compiled FlexAttention: blocks of the shapes that it takes, without the kernel."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    numbers = of_pass.numbers.unbind()[:3]
    for chosen in flex_attention.blocks((q.size(1), k.size(1)), numbers, of_pass.reaches, of_pass.hidden, causal):
        flex_attention.listed(chosen)
    return (q + (k + v).sum((1, 2), keepdim=True)).flatten(1, 2)[:, None]


def supported(supports):
    """A kernel's own condition with the device taken for a GPU of NVIDIA."""

    class OnGpu:
        type = "cuda"

    class Tensor:
        def __init__(self, x):
            self.device, self.dtype, self.size, self.shape = OnGpu(), x.dtype, x.size, x.shape

    return lambda q, k, inputs, dropout: supports(Tensor(q), Tensor(k), inputs, dropout)


@pytest.fixture
def gpu(monkeypatch):
    """Takes the meta device for a GPU whose kernels pass their trial; gives the names of the kernels that ran."""
    monkeypatch.setattr(attention_setup, "in_transform", lambda x: False)
    monkeypatch.setattr(AttentionSetup, "visible_padding", lambda self, x, padding: None)  # looks at values, once
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused_kernel)
    monkeypatch.setattr(flex_attention, "flex_function", lambda: flex_kernel)
    monkeypatch.setattr(attention, "try_kernel", lambda *_: None)
    monkeypatch.setattr(attention, "TRIALS", {})
    used = []

    def noted(kernel):
        def run_kernel(*arguments):
            used.append(kernel.name)
            return kernel.run(*arguments)

        supports = supported(kernel.supports) if kernel.name in ("flash-attn", "flex") else kernel.supports
        return kernel._replace(run=run_kernel, supports=supports)

    monkeypatch.setattr(attention, "KERNELS", tuple(map(noted, attention.KERNELS)))
    return used


PRECISIONS = {
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
}


def passes(monkeypatch, model, precision, call):
    """A forward and a backward pass of a model on the meta device; returns the most elements that a tensor had."""
    dtype, cast = PRECISIONS[precision]
    if cast is not None:
        monkeypatch.setattr(attention_setup, "compute_dtype", lambda x: cast)
    model = model.to(META, dtype).train()
    with LargestTensor() as largest, Autocast(cast) if cast else contextlib.nullcontext():
        loss = call(model).float().mean()
        loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is None]
    assert not [name for name in trained if "attn" in name or "fc1" in name], trained
    return largest.elements


SIZES = ("--decoder-layers", 1, "--decoder-embed-dim", 64, "--decoder-input-dim", 64, "--decoder-output-dim", 64)
SMALL = (*SIZES, "--decoder-attention-heads", 4, "--decoder-ffn-embed-dim", 64, "--tokens-per-sample", LENGTH)


@pytest.mark.parametrize(
    ("kernel", "dropout", "precision"), [("auto", 0.1, "autocast"), ("fused", 0.0, "fp16"), ("fused", 0.1, "bf16")]
)
def test_language_models_train_without_a_look_at_a_value(build, gpu, monkeypatch, method, kernel, dropout, precision):
    if precision != "fp16" and method not in ("alibi", "t5", "fox", "rotary", "fire", "xpos"):
        return  # the same kernels with another bias
    if method == "fire":  # looks once in a pass, before the layers, whether its bias depends on the distance alone
        monkeypatch.setattr("fairseq_alibi.core.fire.Fire.early_bias", lambda *_: None)
    more = ("--attention", kernel, "--position-method", method, "--attention-dropout", dropout)
    model = build("alibi_lm", *SMALL, *more, *["--checkpoint-activations"] * (precision == "bf16"))
    tokens, kind = random_tokens(model, 2, LENGTH).to(META), model.decoder.position_method.bias_kind
    precision = "bf16" if method == "xpos" else precision
    elements = passes(monkeypatch, model, precision, lambda model: model(tokens)[0])
    fused = "flex" if method in ("alibi", "sandwich") and not dropout else "recomputed"
    expected = "causal" if kind == "none" else "mask" if kernel == "auto" and kind != "key" else fused
    assert {*gpu} == {expected}
    if method != "fire":  # which has 32 hidden units for each pair of a tile
        assert (elements >= 4 * LENGTH**2 - LENGTH) == (expected == "mask"), "a tensor of H x T x S elements"


ENCODERS = [
    ("symmetric", "auto", "autocast"),
    ("one_sided", "auto", "bf16"),
    ("one_sided", "fused", "fp16"),
    ("two_slopes", "fused", "bf16"),
]


@pytest.mark.parametrize(("form", "kernel", "precision"), ENCODERS)
def test_encoders_train_without_a_look_at_a_value(build, gpu, monkeypatch, kernel, form, precision):
    if precision != "autocast":
        monkeypatch.setattr(AttentionSetup, "visible_padding", lambda self, x, padding: padding)
    sizes = ("--encoder-layers", 1, "--encoder-embed-dim", 64, "--encoder-attention-heads", 4)
    more = ("--alibi-encoder-bias", form, "--attention", kernel, "--attention-dropout", 0, "--max-positions", LENGTH)
    model = build("alibi_masked_lm", *sizes, *more, "--encoder-ffn-embed-dim", 64, task="masked_lm")
    tokens = torch.full((2, LENGTH), 5, device=META)
    elements = passes(monkeypatch, model, precision, lambda model: model(tokens)[0])
    assert {*gpu} == {"mask" if kernel == "auto" else "flex"}
    assert (elements >= 4 * LENGTH**2) == (kernel == "auto")


@pytest.mark.parametrize(("kernel", "precision"), [("auto", "bf16"), ("fused", "fp16")])
def test_translation_models_train_without_a_look_at_a_value(gpu, monkeypatch, corpus, kernel, precision):
    monkeypatch.setattr(AttentionSetup, "visible_padding", lambda self, x, padding: padding)
    cfg = training_config(corpus, "--task", "translation", "--arch", "alibi_transformer_tiny", "--attention", kernel)
    dictionary = made_up_dictionary(50)
    task = types.SimpleNamespace(cfg=cfg.task, source_dictionary=dictionary, target_dictionary=dictionary)
    model = AlibiTransformer.build_model(cfg.model, task)
    tokens = torch.full((2, LENGTH), 5, device=META)
    lengths = torch.full((2,), LENGTH, device=META)
    passes(monkeypatch, model, precision, lambda model: model(tokens, lengths, tokens)[0])
    assert {*gpu} == {"mask" if kernel == "auto" else "flex"}


def flash_attn_func(q, k, v, dropout_p, causal, window_size, alibi_slopes, deterministic):
    """What flash-attn documents: (B, T, H, D), the last query sees the last key, a window to the left and right."""
    queries, keys = q.size(1), k.size(1)
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    left, right = (keys if side < 0 else side for side in window_size)
    unseen = (distance > left) | (distance < -right)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.size(-1) ** -0.5 - alibi_slopes[:, None, None] * distance.abs()
    scores = scores.masked_fill(unseen | ((distance < 0) & causal), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


@pytest.mark.parametrize(
    ("queries", "keys", "window", "causal"), [(30, 30, None, True), (5, 30, 7, True), (9, 9, None, False)]
)
def test_flash_attn_is_called_as_it_documents(monkeypatch, queries, keys, window, causal):
    monkeypatch.setattr(flash_attention, "installed_flash_attn", lambda: flash_attn_func)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (queries, keys, keys))
    slopes = torch.tensor([0.5, 0.25, 0.125])
    inputs = AttentionInputs(bias=LinearBias(slopes, None if causal else slopes), causal=causal, window=window)
    assert supported(flash_attention.supports_flash_attn)(q.half(), k.half(), inputs, 0.1)
    found = flash_attention.flash_attn_kernel(q, k, v, inputs)
    torch.testing.assert_close(found, tiled_attention.recomputed_tiles(q, k, v, inputs), rtol=1e-4, atol=1e-5)
    padded = dataclasses.replace(inputs, padding=torch.zeros(2, keys, dtype=torch.bool))
    assert not supported(flash_attention.supports_flash_attn)(q.half(), k.half(), padded, 0.0)
    assert not supported(flash_attention.supports_flash_attn)(q, k, inputs, 0.0), "float32"


@pytest.fixture
def eager_flex(monkeypatch):
    """Runs what is compiled on a GPU eagerly, with gradients, which FlexAttention refuses on a CPU."""
    import torch.nn.attention.flex_attention as module

    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "flex_function", lambda: flex_attention.flex_pass)


FLEX_CASES = {
    "full": (300, 300, {}),
    "one query": (1, 400, {}),
    "ragged": (200, 391, {}),
    "window": (130, 400, {"window": 140}),
    "left-padded": (300, 300, {"padded": 9}),
    "both sides": (260, 260, {"causal": False, "padded": 9}),
}


@pytest.mark.parametrize("bias", ["linear", "distance", "none"])
@pytest.mark.parametrize("case", FLEX_CASES)
def test_flex_attention_equals_tiles_with_gradients(eager_flex, case, bias):
    queries, keys, options = FLEX_CASES[case]
    causal, padded = options.get("causal", True), options.get("padded", 0)
    if bias == "none" and not causal:
        return
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16).transpose(1, 2).requires_grad_() for n in (queries, keys, keys))
    padding = torch.zeros(2, keys, dtype=torch.bool)
    padding[0, :padded] = True
    slopes, distance = torch.tensor([0.5, 0.1, 0.01]), torch.arange(1 - queries, keys)
    after = None if causal else slopes.flip(0)
    biases = {
        "linear": LinearBias(slopes, after),
        "distance": DistanceBias(linear_bias(slopes, after, distance)),
        "none": NoBias(),
    }
    inputs = AttentionInputs(
        bias=biases[bias], causal=causal, window=options.get("window"), padding=padding if padded else None
    )
    results = [run(q, k, v, inputs) for run in (flex_attention.flex_blocks, tiled_attention.recomputed_tiles)]
    real = ~padding[:, None, -queries:, None].expand_as(results[0])
    torch.testing.assert_close(*(x[real] for x in results), rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(x[real].square().sum(), (q, k, v)) for x in results]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_hold_every_visible_key_and_whole_ones_no_hidden_one(causal):
    queries, keys, window, size = 200 if causal else 500, 500, 300, flex_attention.BLOCK
    reaches = torch.tensor([[0, 50, 299], [0, 100, 400]]).int()
    hidden = torch.zeros(3, 512, dtype=torch.bool)
    hidden[:, :3] = hidden[:, keys:] = True
    numbers = tuple(torch.tensor([keys - queries, keys - 1, window]).int())
    visible, whole = flex_attention.blocks((-(-queries // size), 4), numbers, reaches, hidden, causal)
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(512)
    for head, (back, ahead) in enumerate(reaches.t().tolist()):
        reached = (distance <= back) & (distance >= (0 if causal else -ahead)) & ~hidden[head]
        seen = ((distance >= 0) & (distance < window) if causal else distance == distance) & ~hidden[head]
        for i in range(queries):
            row = i // size
            assert visible[head, row].repeat_interleave(size)[reached[i]].all()
            assert seen[i][whole[head, row].repeat_interleave(size)].all()
    assert whole.any()
    assert not visible.all()


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [False, True])
def test_one_graph_serves_a_whole_sweep_and_a_stream(monkeypatch, gradients):
    """Compiled for real, with the kernel itself left to eager code: guards are those of a GPU."""
    import torch.nn.attention.flex_attention as module

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_function = torch.compile
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_function(f, backend="eager", **options))
    flex_attention.flex_function.cache_clear()
    slopes = torch.tensor([0.5, 0.1])
    shapes = [(1, 300, 300, None), (2, 700, 700, None), (1, 1, 512, None), (4, 128, 128, None), (1, 256, 511, 256)]
    for number, (rows, queries, keys, window) in enumerate(shapes):
        q, k, v = (torch.randn(rows, n, 2, 16).transpose(1, 2).requires_grad_(gradients) for n in (queries, keys, keys))
        padding = torch.zeros(rows, keys, dtype=torch.bool) if number % 2 else None
        inputs = AttentionInputs(bias=LinearBias(slopes), padding=padding, window=window)
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=number == 3):
            out = flex_attention.flex_blocks(q, k, v, inputs)
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(out, tiled_attention.recomputed_tiles(q, k, v, inputs), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with pytest.raises(RuntimeError, match=r"torch\.compile is turned off"):
        flex_attention.compiled_pass()
    flex_attention.flex_function.cache_clear()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif("CUDA_TORCH" not in os.environ, reason="CUDA_TORCH names no folder with a CUDA build of torch")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_compiled_kernels_fit_the_shared_memory_of_each_gpu(capability, dim, dtype):
    """CUDA_TORCH=DIR after: pip install --target DIR torch==2.13.0 (from PyPI; gigabytes)."""
    script = ROOT / "tests" / "flex_codegen.py"
    done = run(sys.executable, script, capability, dim, dtype, PYTHONPATH=f"{os.environ['CUDA_TORCH']}:{ROOT}")
    found = re.findall(r"shared memory (\d+) of (\d+)", done.output)
    assert found, done.output
    assert all(int(needed) <= int(limit) for needed, limit in found), found


def inputs_of(heads=2):
    q, k, v = (torch.randn(1, heads, 300, 16) for _ in range(3))
    return q, k, v, AttentionInputs(bias=LinearBias(torch.tensor([0.5, 0.1])))


@pytest.mark.parametrize("fault", ["out of resource: shared memory,\nrequired 131072", None])
def test_a_kernel_that_fails_or_is_wrong_is_named_once_and_the_next_one_runs(monkeypatch, fault):
    def broken(q, k, v, inputs, dropout):
        if fault is not None:
            raise RuntimeError(fault)
        return q * 1

    kernel = attention.Kernel("new", lambda *_: True, broken, tried=True)
    monkeypatch.setattr(attention, "KERNELS", (kernel, *attention.KERNELS))
    monkeypatch.setattr(attention, "TRIALS", {})
    q, k, v, inputs = inputs_of()
    reason = "shared memory, required 131072" if fault else "Tensor-likes are not close"
    pattern = rf"kernel new fails on cpu in torch.float32 with head_dim 16 \(.*{reason}.*\): tiled runs in its place"
    with pytest.warns(UserWarning, match=pattern):
        out = attention.attend(q, k, v, inputs)
    torch.testing.assert_close(out, tiled_attention.recomputed_tiles(q, k, v, inputs), rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention.attend(q, k, v, inputs)


def test_no_mask_takes_more_than_its_share_of_the_memory(monkeypatch):
    """At every length, on a GPU and on a CPU, with padding and with gradients of the bias."""
    monkeypatch.setattr(mask_limits, "memory_of", lambda device: 2**30)
    share = mask_limits.MASK_SHARE * 2**30
    for name, kind in (("alibi", LinearBias), ("t5", DistanceBias), ("needs_mask", PairBias)):
        method = NeedsMask(2) if name == "needs_mask" else position_methods()[name](2)
        setup = AttentionSetup(method, AttentionSettings())
        for length in (1024, 2048, 4096):
            for rows in (1, 8):
                span = TokenSpan(length, length, 0)
                with torch.device(META):
                    found = setup.runs_without_mask(META, span, None, None, True, rows)
                assert found == (rows * 2 * length**2 * 4 > share), (name, length, rows)
        bias = attention_setup.bias_without_mask(method, TokenSpan(5, 5, 0), torch.device("cpu"), True, None)
        assert isinstance(bias, kind)


def test_a_mask_larger_than_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(mask_limits, "memory_of", lambda device: 2**20)
    setup = AttentionSetup(position_methods()["alibi"](2), AttentionSettings(kernel="mask"))
    assert setup.inputs(torch.zeros(1, 300, 8), TokenSpan(300, 300, 0)) is not None
    with pytest.raises(ValueError, match=r"a mask of 600 tokens takes .* GiB: pass --attention auto, or fewer tokens"):
        setup.inputs(torch.zeros(1, 600, 8), TokenSpan(600, 600, 0))


class NeedsMask(PositionMethod):
    """A method of somebody else's, whose bias is known as a whole mask alone."""

    bias_kind = "pair"

    def pair_bias(self, query_length, key_length, device=None):
        return -distances(query_length, key_length, device).abs().float().sqrt().expand(self.num_heads, -1, -1)


def test_a_method_that_gives_masks_alone_runs_in_chunks_of_queries_where_none_fits(monkeypatch):
    monkeypatch.setattr(mask_limits, "memory_of", lambda device: 2**20)
    setup, (q, k, v) = AttentionSetup(NeedsMask(2), AttentionSettings()), torch.randn(3, 2, 2, 700, 8)
    with LargestTensor() as largest:
        inputs = setup.inputs(torch.zeros(2, 700, 16), TokenSpan(700, 700, 0))
        out = attention.attend(q, k, v, inputs)
    assert largest.elements < 2 * 700**2
    mask = FoldedMask(NeedsMask(2).future_mask(700, 700))
    torch.testing.assert_close(out, attention.attend(q, k, v, AttentionInputs(bias=mask)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [2**20, 2**30])
def test_compiled_code_leaves_its_graph_where_no_mask_fits(monkeypatch, limit):
    monkeypatch.setattr(mask_limits, "COMPILED_LIMIT", limit)
    torch._dynamo.reset()
    model, x, graphs = Transformer(1, 32, 4).eval(), torch.randn(1, 600, 32), []

    def backend(graph, examples):
        graphs.append(graph)
        return graph

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.compile(model, backend=backend)(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    assert (len(graphs) == 1) == (limit == 2**30)
    torch._dynamo.reset()


def test_a_measured_crossover_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    gpu = torch.device("cuda")
    texts = {None: float("inf"), "{": float("inf"), "[1]": float("inf"), '{"Some GPU": 1024}': 1024.0}
    for text, expected in texts.items():
        mask_limits.longest_mask.cache_clear()
        if text is not None:
            mask_limits.crossover_file().parent.mkdir(exist_ok=True)
            mask_limits.crossover_file().write_text(text)
        assert mask_limits.longest_mask(gpu) == expected
    mask_limits.longest_mask.cache_clear()


def test_doctor_measures_a_gpu_as_far_as_a_cpu_can(monkeypatch, tmp_path):
    """Every part but those that ask the GPU itself, with a small setting."""
    some = {name: gpu_check.CASES[name] for name in ("192, low scores", "one query", "left-padded", "window")}
    monkeypatch.setattr(gpu_check, "CASES", some)
    check = gpu_check.GpuCheck("cpu", None, (torch.float32,), (16,), (300, 600), rounds=2)
    text = gpu_check.run_gpu_check(check, tmp_path)
    content = json.loads((tmp_path / "gpu.json").read_text())
    rows = content["rows"]
    assert not [row for part in rows.values() for row in part if row.get("result", "right") != "right"], rows
    assert {row["kernel"] for row in rows["correctness"]} == {"mask", "causal", "tiled", "recomputed"}
    assert len(rows["correctness"]) == 3 * len(some) + 1, "the kernel without a bias supports whole sequences alone"
    assert {(row["way"], row["length"]) for row in rows["speed"]} == {
        (way, length) for way in ("mask", "fused", "no bias") for length in (300, 600)
    }
    assert rows["choice"][0]["kernel"] == "tiled"
    assert rows["choice"][0]["functions"].count(",") == 2
    assert rows["passes"] == [{"graphs": 0, "passes": 4, "waits of 4 layers": 0}]
    assert content["longest mask"] in (0, 300, 600)
    assert "longest mask" in text
    assert (tmp_path / "gpu.md").read_text().startswith(text[:40])
    assert (tmp_path / "speed.png").exists()
    wrong = attention.Kernel("wrong", lambda *_: True, lambda q, k, v, *rest: (q + k.sum() + v.sum()) * math.nan)
    row = gpu_check.check_case(check, wrong, "one query", torch.float32, 16)
    assert row["result"] == "WRONG", "NaN is not right"
    late = gpu_check.GpuCheck("cpu", None, (torch.float32,), (16,), (300,), minutes=0)
    gpu_check.run_gpu_check(late, tmp_path)
    assert json.loads((tmp_path / "gpu.json").read_text())["left out for lack of time"]


def test_doctor_keeps_the_results_of_an_earlier_run(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "prepare_builtin", lambda folder: None)
    monkeypatch.setattr(gpu_check, "run_gpu_check", lambda check, output: write_json(output / "gpu.json", {}))
    gpu_check.check_this_gpu(tmp_path / "gpu", overwrite=False)
    with pytest.raises(ValueError, match=r"gpu\.json exists: pass --overwrite"):
        gpu_check.check_this_gpu(tmp_path / "gpu", overwrite=False)
    gpu_check.check_this_gpu(tmp_path / "gpu", overwrite=True)


@pytest.mark.slow
def test_doctor_trains_and_names_what_fails(corpus):
    check = gpu_check.GpuCheck("cpu", corpus)
    assert 3 < gpu_check.check_training(check, "float32")["loss after 20 updates"] < 7
    assert "result" in gpu_check.check_training(gpu_check.GpuCheck("cpu", corpus / "none"), "float32")


def test_crossover_is_the_longest_length_at_which_a_mask_is_faster():
    def row(way, length, milliseconds, dim=64):
        return {"way": way, "length": length, "head_dim": dim, "milliseconds": milliseconds}

    rows = [row("mask", 512, 1), row("fused", 512, 2), row("mask", 1024, 3), row("fused", 1024, 2)]
    assert gpu_check.crossover([*rows, row("fused", 2048, 3)]) == 512
    assert gpu_check.crossover([*rows, row("mask", 1024, 3, 128), row("fused", 1024, 4, 128)]) == 1024
    assert gpu_check.crossover(rows[2:]) == 0
    assert gpu_check.crossover(rows[1:2]) is None


def test_evaluation_on_a_gpu_takes_half_precision_and_fills_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert [checkpoint_evaluation.evaluation_dtype(device) for device in ("cpu", "cuda")] == ["float32", "float16"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert checkpoint_evaluation.evaluation_dtype("cuda") == "bfloat16"
    with torch.device(META):
        model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.Linear(1024, 267_744)).half()
    for free, tokens in ((2**30, 4096), (6 * 2**30, 16384), (80 * 2**30, 65536)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 80 * 2**30))
        assert checkpoint_evaluation.tokens_that_fit(model, "cuda") == tokens
    assert checkpoint_evaluation.tokens_that_fit(model, "cpu") == 4096

"""Models in the modes of torch: after a pass in any of them an ordinary pass is right; a saved model has no mask."""

import copy
import io

import pytest
import torch
from conftest import random_tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fairseq_alibi.core import EncoderALiBi, Rotary, Transformer


class Logits(torch.nn.Module):
    """What a fairseq model returns without its dictionary of lists, which cannot be traced."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens)[0]


STACKS = {
    "decoder": {},
    "encoder": {"causal": False},
    "rotary decoder": {"position_method": Rotary(4, 8)},
    "learned slopes": {"causal": False, "position_method": EncoderALiBi(4, "two_slopes", learned=True)},
}


def stack(kind="decoder", attention="auto"):
    """Two layers of width 32 with 4 heads."""
    torch.manual_seed(0)
    return Transformer(2, 32, 4, attention=attention, **STACKS[kind])


def run_in_inference_mode(model, x):
    with torch.inference_mode():
        model(x)


def run_without_gradients(model, x):
    with torch.no_grad():
        model(x)


def run_in_vmap(model, x):
    torch.func.vmap(model)(x[:, None])


def run_in_jvp(model, x):
    torch.func.jvp(model, (x,), (x,))


def run_with_fake_tensors(model, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))


def run_compiled(model, x):
    torch.compile(model, backend="eager", fullgraph=model.setup.settings.kernel != "fused")(x)


def run_traced(model, x):
    torch.jit.trace(model, (x,), check_trace=False)


def run_exported(model, x):
    torch.export.export(model, (x,))


def run_in_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        model(x)


def run_in_double_by_default(model, x):
    torch.set_default_dtype(torch.float64)
    try:
        model(x)
    finally:
        torch.set_default_dtype(torch.float32)


def run_on_the_meta_device(model, x):
    copy.deepcopy(model).to("meta")(x.to("meta"))


def run_in_half_precision(model, x):
    model.half()(x.half())
    model.float()


def run_with_reentrant_checkpointing(model, x):
    checkpoint(model, x.clone().requires_grad_(), use_reentrant=True).sum().backward()


MODES = [
    run_in_inference_mode,
    run_without_gradients,
    run_in_vmap,
    run_in_jvp,
    run_with_fake_tensors,
    pytest.param(run_compiled, marks=pytest.mark.slow),
    run_traced,
    run_exported,
    run_in_autocast,
    run_in_double_by_default,
    run_on_the_meta_device,
    run_in_half_precision,
    run_with_reentrant_checkpointing,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["auto", "mask", "fused"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_an_ordinary_pass_after_any_mode_trains_and_is_right(kind, attention, mode):
    torch._dynamo.reset()
    model, x = stack(kind, attention), torch.randn(2, 40, 32)
    mode(model, x)
    fresh = stack(kind, attention)
    fresh.load_state_dict(model.state_dict())
    model.zero_grad()
    for each in (model, fresh):
        each(x).square().mean().backward()
    torch.testing.assert_close(model(x), fresh(x), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(model.parameters(), fresh.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["auto", "mask"])
def test_a_fairseq_model_trains_after_a_pass_in_inference_mode(build, method, attention):
    """Lightning validates so."""
    model = build("alibi_lm_tiny", "--position-method", method, "--attention", attention, "--tokens-per-sample", 16)
    tokens = random_tokens(model, 2, 300)
    with torch.inference_mode():
        expected = model(tokens)[0]
    logits = model(tokens)[0]
    logits.square().mean().backward()
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_fairseq_model_can_be_traced(build):
    model = build("alibi_lm_tiny")
    tokens = random_tokens(model, 2, 9)
    torch.testing.assert_close(torch.jit.trace(Logits(model), (tokens,))(tokens), model(tokens)[0])


@pytest.mark.parametrize("kind", STACKS)
def test_gradients_of_single_samples(kind):
    """torch.func: vmap of grad over functional_call, against a backward pass for each sample."""
    model, x = stack(kind), torch.randn(3, 40, 32)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).square().mean()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for number in range(3):
        model.zero_grad()
        model(x[number : number + 1]).square().mean().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name][number], p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", STACKS)
def test_second_derivatives_of_the_math_kernel(kind):
    """Against a difference quotient in float64; the ReLU between has none, so it is replaced."""
    model, x = copy.deepcopy(stack(kind, "mask")).double(), torch.randn(1, 9, 32, dtype=torch.float64)
    for layer in model.layers:
        layer.activation = torch.tanh
    direction = torch.randn_like(x)

    def gradient(x):
        x.requires_grad_()
        return torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)[0]

    with sdpa_kernel(SDPBackend.MATH):
        second = torch.autograd.grad((gradient(x) * direction).sum(), x)[0]
        quotient = (gradient(x.detach() + 1e-6 * direction) - gradient(x.detach() - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(second, quotient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("attention", ["auto", "mask", "fused"])
def test_export_with_dynamic_length(kind, attention):
    """With padding on the left, which the graph may not look at."""
    model, length = stack(kind, attention).eval(), torch.export.Dim("length", min=2, max=4096)

    def padded(count):
        padding = torch.zeros(2, count, dtype=torch.bool)
        padding[0, :3] = True
        return torch.randn(2, count, 32), padding

    exported = torch.export.export(model, padded(40), dynamic_shapes=({1: length}, {1: length})).module()
    for count in (7, 300):
        x, padding = padded(count)
        torch.testing.assert_close(exported(x, padding)[~padding], model(x, padding)[~padding], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.slow
def test_compiled_as_one_graph(kind):
    """`auto` then takes a kernel that can be compiled; forward and backward, at several lengths."""
    torch._dynamo.reset()
    model = stack(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (5, 300, 301):
        x = torch.randn(2, length, 32)
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(f(x).square().mean(), model.layers[0].fc1.weight)[0] for f in (compiled, model)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("attention", ["auto", "mask", "fused"])
@pytest.mark.parametrize("kind", STACKS)
def test_a_saved_or_copied_model_has_no_mask_and_is_the_same(kind, attention):
    model, x = stack(kind, attention).eval(), torch.randn(1, 200, 32)
    sizes = []
    for _ in range(2):
        file = io.BytesIO()
        torch.save(model, file)
        sizes.append(len(file.getvalue()))
        expected = model(x)  # makes a mask
    assert sizes[0] == sizes[1]
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for other in (loaded, copy.deepcopy(model)):
        torch.testing.assert_close(other(x), expected)
        assert other.setup.method is other.position_method
        other.position_method.set_evaluation_length(10)


@pytest.mark.parametrize("kind", STACKS)
def test_built_on_the_meta_device(kind):
    methods = {
        "rotary decoder": lambda: Rotary(4, 8),
        "learned slopes": lambda: EncoderALiBi(4, "two_slopes", learned=True),
    }
    with torch.device("meta"):
        method = methods[kind]() if kind in methods else None
        model = Transformer(2, 32, 4, **{**STACKS[kind], "position_method": method})
    expected, x = stack(kind), torch.randn(1, 20, 32)
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    torch.testing.assert_close(model(x), expected(x))


def test_loaded_by_assignment_and_with_parametrizations():
    model = stack()
    torch.nn.utils.parametrizations.weight_norm(model.layers[0].fc1)
    with torch.device("meta"):
        other = Transformer(2, 32, 4)
        torch.nn.utils.parametrizations.weight_norm(other.layers[0].fc1)
    other.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(1, 20, 32)
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("attention", ["auto", "mask", "fused"])
@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 300), (1, 0), (2, 1), (1, 257)])
def test_every_legal_shape(kind, attention, shape):
    model, x = stack(kind, attention), torch.randn(*shape, 32, requires_grad=True)
    y = model(x)
    assert y.shape == x.shape
    y.sum().backward()
    transposed = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(model(transposed), y.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["auto", "mask", "fused"])
def test_double_precision(attention):
    model, x = stack(attention=attention).double(), torch.randn(1, 300, 32).double()
    assert model(x).dtype == torch.float64
    torch.testing.assert_close(model.float()(x.float()).double(), model.double()(x), rtol=1e-4, atol=1e-5)

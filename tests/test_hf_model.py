"""Random models of the exported kind under transformers' own tools, with the oldest and the newest transformers."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[transformers]'")

import transformers
from safetensors.torch import load_file
from transformers import DynamicCache, StaticCache

from fairseq_alibi.core import bounded_cache, position_methods
from fairseq_alibi.core.attention_inputs import AttentionInputs, FoldedMask
from fairseq_alibi.core.configuration_alibi import VERSION, AlibiConfig, check_version
from fairseq_alibi.core.modeling_alibi import AlibiForCausalLM, AlibiModel
from fairseq_alibi.core.pretrained_alibi import CACHE

SIZES = {
    "vocab_size": 60,
    "decoder_layers": 2,
    "decoder_ffn_embed_dim": 48,
    "decoder_attention_heads": 3,
    **{f"decoder_{part}_dim": 48 for part in ("embed", "input", "output")},
}
CUTOFFS = {"adaptive_input_cutoff": [20, 40, 60], "adaptive_softmax_cutoff": [20, 40, 60]}
FORMS = {
    "plain": {},
    "tied": {"share_decoder_input_output_embed": True},
    "adaptive": {**CUTOFFS, "tie_adaptive_weights": True, "tie_adaptive_proj": True},
    "adaptive_input": {"adaptive_input_cutoff": [20, 60]},
    "adaptive_output": {"adaptive_softmax_cutoff": [20, 60], "decoder_output_dim": 32},
    "untied": {**CUTOFFS},
}
METHODS = list(position_methods())
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}


def build_model(form="plain", **options):
    """A model whose scores depend strongly on the context."""
    torch.manual_seed(3)
    options = {"max_target_positions": 200, "dropout": 0.0, **SIZES, **FORMS[form], **options}
    model = AlibiForCausalLM(AlibiConfig(**copy.deepcopy(options))).eval()
    for name, value in model.named_parameters():
        if value.dim() > 1 and "parameters_of_heads" not in name:
            torch.nn.init.normal_(value, std=value.size(-1) ** -0.5 * (3 if ".layers." in name else 1))
    return model


def text(*shape, seed=1):
    return torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole_passes(model, x, count, mask=None):
    """Greedy tokens by whole passes without a cache."""
    for _ in range(count):
        given = None if mask is None else torch.cat([mask, mask.new_ones(len(x), x.size(1) - mask.size(1))], dim=1)
        logits = model(x, attention_mask=given, use_cache=False).logits
        x = torch.cat([x, logits[:, -1:].argmax(-1)], dim=1)
    return x


def left_padded(x, *lengths):
    mask = torch.stack([torch.arange(x.size(1)) >= x.size(1) - length for length in lengths]).long()
    return x.masked_fill(mask == 0, 1), mask


def agree(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, "rotary ssmax 10", "none log_n 1", "fox none 01"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_tokens_of_every_method_are_those_of_whole_passes(method, cache):
    """With padding on the left, for the cache that grows and the one of a fixed size."""
    names = ("position_method", "score_scale", "position_layers")
    model = build_model(**dict(zip(names, method.split())), tokens_per_sample=5)
    x, mask = left_padded(text(2, 12), 12, 7)
    found = model.generate(x, attention_mask=mask, max_new_tokens=8, cache_implementation=cache, **GREEDY)
    assert torch.equal(found, whole_passes(model, x, 8, mask))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_generation_in_every_way(form):
    model = build_model(form)
    tried = ((x, whole_passes(model, x, 10)) for x in (text(1, 12, seed=seed) for seed in range(20)))
    # Without token 1, which transformers takes for padding when the assistant reads the text.
    x, wanted = next(pair for pair in tried if len(pair[1][0, 12:].unique()) > 1 and 1 not in pair[1])
    end = next(token for token in range(60) if token not in wanted)  # transformers 4 looks up no prompt without one
    start = {"max_new_tokens": 10, **GREEDY}
    assert torch.equal(model.generate(x, **start), wanted)
    looked_up = model.generate(x, prompt_lookup_num_tokens=3, **{**start, "eos_token_id": end})
    assert torch.equal(looked_up[:, :22], wanted), "of which transformers 4 may add one too many"
    assert torch.equal(model.generate(x, assistant_model=build_model(decoder_layers=1), **start), wanted)
    assert torch.equal(model.generate(x, prefill_chunk_size=5, **start), wanted)
    assert torch.equal(model.generate(x, assistant_early_exit=1, **{**start, "eos_token_id": end})[:, :22], wanted)
    first = model.generate(x, return_dict_in_generate=True, **{**start, "max_new_tokens": 4})
    continued = model.generate(first.sequences, **{CACHE: first[CACHE]}, **{**start, "max_new_tokens": 6})
    assert torch.equal(continued, wanted)
    y, mask = left_padded(text(2, 12, seed=2), 9, 12)
    beams = [model.generate(y, attention_mask=mask, num_beams=3, use_cache=use, **start) for use in (True, False)]
    assert torch.equal(*beams)
    embeds = model.get_input_embeddings()(x)
    assert torch.equal(model.generate(inputs_embeds=embeds, **start), wanted[:, 12:])


@pytest.mark.parametrize("beams", [1, 2])
def test_a_bounded_cache_gives_the_same_text(beams, monkeypatch):
    monkeypatch.setattr(bounded_cache, "SHORT", 30)
    model = build_model("plain" if beams == 1 else "tied", alibi_max_bias=0.25, decoder_normalize_before=beams == 1)
    for layer in model.decoder.layers:
        layer.self_attn.q_proj.weight.data *= 0.1  # or the reach would be longer than the text
    x, mask = left_padded(text(2, 140), 140, 133)
    options = {**GREEDY, "attention_mask": mask, "num_beams": beams, "max_new_tokens": 300}
    cache = model.make_cache()
    assert torch.equal(model.generate(x, past_key_values=cache, **options), model.generate(x, **options))
    assert min(group.length for group in cache.kept[1].groups) < cache.get_seq_length(), "keys are dropped"
    with pytest.raises(ValueError, match="only ALiBi has a reach"):
        build_model(position_method="t5").make_cache()


@torch.no_grad()
@pytest.mark.parametrize("method", ["alibi", "learned", "rotary", "cable"])
def test_caches_given_by_hand(method):
    """Both names, in chunks; a static one; one that slides as the model does, grown and of a fixed size."""
    model = build_model(position_method=method)
    x = text(2, 20)
    wanted = model(x).logits
    for name in ("past_key_values", "cache"):
        cache = DynamicCache()
        found = [model(part, use_cache=True, **{name: cache}).logits for part in x.split(6, dim=1)]
        agree(torch.cat(found, dim=1), wanted)
    static = StaticCache(config=model.config, max_cache_len=24)
    agree(torch.cat([model(part, past_key_values=static).logits for part in x.split(7, dim=1)], dim=1), wanted)
    sliding = build_model(position_method=method, sliding_window=6)
    wanted = sliding(x).logits
    assert not torch.allclose(wanted, model(x).logits, atol=1e-2)
    for kind, sizes in ((DynamicCache, {}), (StaticCache, {"max_cache_len": 24})):
        for parts in ([9, 1, 1, 9], [3, 3, 1, 1, 12]):
            cache = kind(config=sliding.config, **sizes)
            found = [sliding(part, past_key_values=cache).logits for part in x.split(parts, dim=1)]
            agree(torch.cat(found, dim=1), wanted)
    y, mask = left_padded(x, 20, 11)
    how = {"attention_mask": mask, "max_new_tokens": 6, **GREEDY}
    for kind in (None, "static"):
        assert torch.equal(sliding.generate(y, cache_implementation=kind, **how), whole_passes(sliding, y, 6, mask))
    with pytest.raises(ValueError, match=r"config\.sliding_window is None"):
        model(x, past_key_values=DynamicCache(config=sliding.config))
    with pytest.raises(ValueError, match="a tuple; pass a DynamicCache"):
        model(x, past_key_values=((torch.zeros(1),) * 2,))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_texts_packed_into_a_row_and_masks_of_four_dimensions(method):
    """Past the training length, from which on FIRE's bias depends on the position in the text."""
    model = build_model(position_method=method, tokens_per_sample=4)
    x = text(1, 20)
    parts = x.split([8, 12], dim=1)
    wanted = torch.cat([model(part).logits for part in parts], dim=1)
    packed = torch.cat([torch.arange(8), torch.arange(12)])[None]
    for mask in (None, torch.ones_like(x)):
        agree(model(x, position_ids=packed, attention_mask=mask).logits, wanted)
    which = (torch.arange(20) >= 8).long()
    square = (which[:, None] == which) & (torch.arange(20)[:, None] >= torch.arange(20))
    added = torch.zeros(20, 20).masked_fill(~square, torch.finfo(torch.float32).min)
    agree(model(x, position_ids=packed, attention_mask=square[None, None]).logits, wanted)
    agree(model(x, position_ids=packed, attention_mask=added[None, None]).logits, wanted)
    agree(model(x, attention_mask=square[None, None]).logits, wanted)
    y, mask = left_padded(torch.cat([x, x]), 20, 13)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    agree(model(y, attention_mask=mask, position_ids=positions).logits[1, 7:], model(x[:, 7:]).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("length", [10, 300])
def test_what_is_wanted_beside_the_logits(length):
    for form in ("plain", "adaptive_output"):
        model = build_model(form)
        x = text(2, length)
        out = model(x, output_hidden_states=True, output_attentions=True)
        agree(out.logits, model(x).logits)
        assert [state.shape for state in out.hidden_states[:2]] == [(2, length, 48)] * 2
        assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
        assert (len(out.hidden_states), len(out.attentions)) == (3, 2)
        agree(out.attentions[0].sum(-1), torch.ones(2, 3, length))
        assert not out.attentions[0].triu(1).any()
        agree(model.base_model(x).last_hidden_state, out.hidden_states[-1])
        kept = torch.tensor([0, 5])
        agree(model(x, logits_to_keep=kept).logits, out.logits[:, kept])
        agree(model(x, logits_to_keep=2, return_dict=False)[0], out.logits[:, -2:])
        agree(model(inputs_embeds=model.get_input_embeddings()(x)).logits, out.logits)
        assert model(x, labels=x).logits.shape == (2, length, 60)
        model.config.logits_with_labels = False
        assert model(x, labels=x).logits is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"no_such_argument": 1}, "no_such_argument: this model has no such argument"),
        ({"token_type_ids": torch.zeros(2, 6)}, "token_type_ids: this model has no such"),
        ({"inputs_embeds": torch.zeros(2, 6, 48)}, "input_ids, inputs_embeds: give one of them"),
        ({"position_ids": torch.tensor([[0, 1, 2, 4, 5, 6]])}, "position_ids: each must follow"),
        ({"position_ids": torch.arange(6)[None] - 1}, "position_ids: each must follow"),
        ({"position_ids": torch.zeros(2, 5)}, r"position_ids must be \(B, T\) = \(2, 6\), not \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask must have 6 columns"),
        ({"attention_mask": torch.ones(2, 6, 6)}, "attention_mask must be"),
        ({"attention_mask": torch.ones(2, 1, 6, 6, dtype=torch.bool)}, "tokens see later ones"),
        ({"attention_mask": torch.ones(2, 1, 6, 5, dtype=torch.bool)}, r"must be \(B, 1, T, S\) = \(2, 1, 6, 6\)"),
        ({"attention_mask": {"full_attention": None}}, "attention_mask: a dict"),
        ({"cache": DynamicCache(), "past_key_values": DynamicCache()}, "two names of one thing"),
        ({"labels": torch.zeros(2, 5)}, r"labels must be \(B, T\) = \(2, 6\), not \(2, 5\)"),
    ],
)
def test_what_the_model_cannot_follow_is_refused_by_name(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        build_model()(text(2, 6), **arguments)


def test_positions_that_the_cache_contradicts_are_refused():
    model, x = build_model(), text(1, 6)
    cache = DynamicCache()
    model(x, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="not the positions that attention_mask and the cache tell"):
        model(x[:, :1], past_key_values=cache, position_ids=torch.tensor([[0]]))
    with pytest.raises(ValueError, match="continuous batching needs attention without a bias"):
        model.generate_batch(x.tolist())
    with pytest.raises(ValueError, match="flex_attention"):
        AlibiForCausalLM(AlibiConfig(**SIZES, attn_implementation="flex_attention"))
    tree = torch.tensor([[[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]]).bool()
    with pytest.raises(ValueError, match="position_ids: not the positions"):
        model(x[:, :3], attention_mask=tree, position_ids=torch.tensor([[0, 1, 1]]))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_transformers_knows_the_ties(form, tmp_path):
    """One tensor for a tie after loading, saving, resizing and moving; no module reads another one's weight."""
    model = build_model(form)
    ties = model.config.tied_weights() or {}
    assert bool(ties) == (form in ("tied", "adaptive"))
    model.save_pretrained(tmp_path)
    assert not ties.keys() & load_file(tmp_path / "model.safetensors").keys()
    again = AlibiForCausalLM.from_pretrained(tmp_path).eval()
    for target, source in ties.items():
        assert again.get_parameter(target) is again.get_parameter(source)
    x = text(2, 9)
    wanted = model(x).logits
    assert torch.equal(again(x).logits, wanted)
    stack = AlibiModel.from_pretrained(tmp_path).eval()
    assert torch.equal(stack(x).last_hidden_state, model.decoder(x).last_hidden_state)
    stack.resize_token_embeddings(64)
    assert torch.equal(stack(x).last_hidden_state, model.decoder(x).last_hidden_state)
    assert again.resize_token_embeddings() is again.get_input_embeddings()
    for size in (67, 64, 50):
        again.resize_token_embeddings(size)
        assert again(x % 50).logits.shape[-1] == size == again.config.vocab_size
        again.save_pretrained(tmp_path / str(size))
        assert torch.equal(AlibiForCausalLM.from_pretrained(tmp_path / str(size))(x % 50).logits, again(x % 50).logits)
    if "adaptive" in form or form == "untied":
        with pytest.raises(ValueError, match="keep more than those"):
            again.resize_token_embeddings(20)
        with pytest.raises(ValueError, match=r"vocab_size 70, but adaptive_.*_cutoff ends with 60"):
            AlibiForCausalLM.from_pretrained(tmp_path, vocab_size=70, ignore_mismatched_sizes=True)
    else:
        agree(again(x % 50).logits, model(x % 50).logits[..., :50])


def test_an_untied_copy_stays_untied(tmp_path):
    model = build_model("tied", tie_word_embeddings=False, layout=2)
    model.save_pretrained(tmp_path)
    again = AlibiForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    assert torch.equal(again(text(1, 5)).logits, model(text(1, 5)).logits)
    tied = build_model("tied")
    tied.save_pretrained(tmp_path)
    again = AlibiForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    assert torch.equal(again(text(1, 5)).logits, tied(text(1, 5)).logits)
    build_model("adaptive").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the adaptive softmax of this folder is tied"):
        AlibiForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "tied", "adaptive", "adaptive_output"])
def test_folders_exported_before_load(form, tmp_path):
    """Folders that version 0.2.0 wrote before the model had a head of its own; saved again they have the new names."""
    folder = "tests/old_exports"
    model = AlibiForCausalLM.from_pretrained(f"{folder}/{form}").eval()
    found = model(torch.arange(4, 36)[None]).logits[0]
    agree(found, load_file(f"{folder}/logits.safetensors")[form])
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not [name for name in names if "output_projection" in name or name.startswith("decoder.adaptive_softmax")]


def test_no_band_of_an_adaptive_input_reads_no_tokens():
    """bitsandbytes ends Python with a floating point exception in 4 bit, torchao with an error in dynamic 8 bit."""
    model, x = build_model("untied"), text(2, 9) % 20
    alone = model(x).logits
    for band in model.get_input_embeddings().embeddings:
        band[1].register_forward_hook(lambda _, given, result: pytest.fail("no tokens") if not len(given[0]) else None)
    assert torch.equal(model(x).logits, alone)
    model(x, labels=x).loss.backward()
    assert not any(parameter.grad is None for parameter in model.get_input_embeddings().parameters())
    for token in (-1, 60):
        with pytest.raises(IndexError, match="tokens must be numbers from 0 to 59"):
            model(torch.tensor([[token]]))


@torch.no_grad()
@pytest.mark.parametrize("form", ["tied", "adaptive", "untied"])
@pytest.mark.parametrize("method", ["alibi", "t5", "learned"])
def test_offloaded_weights_give_the_same_logits(form, method, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = build_model(form, position_method=method)
    model.save_pretrained(tmp_path / "model")
    x = text(2, 9)
    wanted = model(x).logits
    agree(accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")(x).logits, wanted)
    places = {f"decoder.layers.{n}": "disk" for n in range(2)}
    for name, _ in model.decoder.named_parameters():
        part = name.split(".")[0]
        if part != "layers":
            places[f"decoder.{part}"] = "disk" if part == "position_method" else "cpu"
    places["lm_head"] = "cpu"
    most = {"device_map": "auto", "max_memory": {"cpu": int(0.9 * model.get_memory_footprint())}}
    for number, how in enumerate(({"device_map": places}, most)):
        how["offload_folder"] = tmp_path / str(number)
        loaded = AlibiForCausalLM.from_pretrained(tmp_path / "model", **how).eval()
        assert "disk" in loaded.hf_device_map.values()
        agree(loaded(x).logits, wanted)
        agree(loaded(x, labels=x).loss, model(x, labels=x).loss)
        found, given = (each.generate(x, max_new_tokens=3, **GREEDY) for each in (loaded, model))
        assert torch.equal(found, given)


@torch.no_grad()
@pytest.mark.parametrize("method", ["alibi", "t5", "rotary", "cable", "fire"])
def test_layers_on_a_second_device(method):
    """A device without data, as this machine may have one only; the inputs of attention move there too."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, mask = build_model(position_method=method), left_padded(text(2, 9), 9, 6)[1]
    for part in (model.decoder.layers[1], model.decoder.layer_norm, model.lm_head):
        part.to("meta")
        hooks.add_hook_to_module(part, hooks.AlignDevicesHook(execution_device="meta"))
    for given in (None, mask):
        assert model(text(2, 9), attention_mask=given, use_cache=True).logits.device.type == "meta"


def test_inputs_of_attention_move_to_the_device_of_a_layer():
    inputs = AttentionInputs(bias=FoldedMask(torch.zeros(3, 4, 4)), padding=torch.zeros(2, 4).bool(), window=3)
    moved = inputs.to("meta", non_blocking=True)
    assert (moved.bias.mask.device.type, moved.padding.device.type, moved.window) == ("meta", "meta", 3)


@pytest.mark.parametrize("form", ["plain", "adaptive"])
def test_export_with_any_batch_and_length_and_the_model_stays_the_same(form):
    model = build_model(form)
    x = text(2, 9)
    wanted = model(x).logits
    given = {"input_ids": x, "use_cache": False}
    sizes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, "use_cache": None}
    with torch.no_grad():
        exported = torch.export.export(model, (), given, dynamic_shapes=sizes)
    for shape in ((2, 9), (1, 30), (5, 300)):
        y = text(*shape)
        agree(exported.module()(input_ids=y, use_cache=False).logits, model(y).logits)
    if form == "plain":  # how many labels a band has is a value
        losses = torch.vmap(lambda row: model(row[None], labels=row[None], use_cache=False).loss)(x)
        agree(losses.mean(), model(x, labels=x).loss)
    assert torch.equal(model(x).logits, wanted)


@torch.no_grad()
@pytest.mark.slow
def test_static_cache_is_compiled_once():
    model = build_model()
    x = text(1, 8)
    wanted = whole_passes(model, x, 8)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=24)
    y, new = x, x
    torch._dynamo.reset()
    for step in range(8):
        with torch._dynamo.config.patch(error_on_recompile=step > 2):
            logits = (model if step == 0 else compiled)(new, past_key_values=cache, attention_mask=None).logits
        new = logits[:, -1:].argmax(-1)
        y = torch.cat([y, new], dim=1)
    assert torch.equal(y, wanted)


def test_versions_outside_the_tested_ones(monkeypatch):
    monkeypatch.setattr("fairseq_alibi.core.configuration_alibi.VERSION", (4, 40))
    with pytest.raises(ImportError, match=r"tested with 4\.57 to"):
        check_version()
    monkeypatch.setattr("fairseq_alibi.core.configuration_alibi.VERSION", (9, 0))
    with pytest.warns(UserWarning, match=r"tested with 4\.57 to"):
        check_version()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version()
    assert transformers.__version__.startswith(f"{VERSION[0]}.{VERSION[1]}")

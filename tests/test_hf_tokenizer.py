"""The exported tokenizer with transformers' own tools."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[transformers]'")

from transformers import pipeline

from fairseq_alibi.core.modeling_alibi import AlibiConfig, AlibiForCausalLM
from fairseq_alibi.core.tokenization_alibi import AlibiTokenizer

TEXTS = ["a b", "\na b", "a b\n", "\n", "", "a\n\nb", "\n\n", "b\na\nb"]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["<s>", "<pad>", "</s>", "<unk>", "a", "b", "c"]))
    return AlibiTokenizer(str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("text", TEXTS)
def test_line_breaks_stay_where_they_are(tokenizer, text):
    for special in (True, False):
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        assert ids[:1] == ([0] if special else tokenizer.encode(text, add_special_tokens=False)[:1])
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    before = tokenizer("a", add_special_tokens=True)["input_ids"]
    new = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(before + new, skip_special_tokens=True)
    assert whole == ("a" + text if text[:1] in ("\n", "") else "a " + text)
    assert tokenizer.decode((before + new)[len(before) :], skip_special_tokens=True) == text


@pytest.mark.parametrize("side", ["left", "right"])
def test_special_tokens_padding_and_truncation(tokenizer, side):
    tokenizer.padding_side = tokenizer.truncation_side = side
    batch = tokenizer(["a b c", "a"], padding=True, return_special_tokens_mask=True, return_tensors="pt")
    assert batch["special_tokens_mask"].tolist()[0] == [1, 0, 0, 0]
    assert batch["special_tokens_mask"].tolist()[1] == ([1, 1, 1, 0] if side == "left" else [1, 0, 1, 1])
    assert (batch["attention_mask"] == 0).tolist() == (batch["input_ids"] == 1).tolist()
    assert tokenizer.get_special_tokens_mask([0, 4, 2], already_has_special_tokens=True) == [1, 0, 0]
    assert tokenizer.get_special_tokens_mask([4, 2]) == [1, 0, 0]
    short = tokenizer("a b c", truncation=True, max_length=3)["input_ids"]
    assert short == ([0, 5, 6] if side == "left" else [0, 4, 5])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    ids = tokenizer("a <turn> b <pad>")["input_ids"]
    assert ids == [0, 4, 7, 5, 3]
    assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) == [1, 0, 1, 0, 0]
    assert tokenizer.decode([*ids, 9, -1], skip_special_tokens=True) == "a b <unk> <unk> <unk>"
    pair = tokenizer("a", "b c", return_special_tokens_mask=True, return_token_type_ids=True)
    assert (pair["special_tokens_mask"], pair["token_type_ids"]) == ([1, 0, 1, 0, 0], [0, 0, 1, 1, 1])


def test_offsets_are_refused_and_pipelines_work(tokenizer):
    with pytest.raises(NotImplementedError, match=r"return_offsets?_mapping"):
        tokenizer("a b", return_offsets_mapping=True)
    model = AlibiForCausalLM(AlibiConfig(vocab_size=7, decoder_layers=1, decoder_ffn_embed_dim=8, begin_token=2))
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    model.eval()
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    whole = tokenizer.decode(model.generate(**tokenizer("a\nb", return_tensors="pt"), **options)[0], True)
    assert write("a\nb ", **options)[0]["generated_text"].split() == whole.split()  # with 5 the space must be there
    alone = [write(text, return_full_text=False, **options)[0] for text in ("a\nb", "c")]
    assert [found[0] for found in write(["a\nb", "c"], batch_size=2, return_full_text=False, **options)] == alone


@pytest.mark.parametrize(("strings", "count"), [("b\n", 5), (["a b c", "c\na"], 8), ("word", 2), ("absent", 9)])
def test_stop_strings_end_a_text_where_its_tokens_complete_them(tmp_path, strings, count):
    """A word that is two tokens, a line end between two words, and none of them."""
    types = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "c", "wo@@", "rd"]
    (tmp_path / "vocab.txt").write_text("\n".join(types))
    (tmp_path / "codes").write_text("#version: 0.2\nw o\n")
    tokenizer = AlibiTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "codes"))
    model = AlibiForCausalLM(AlibiConfig(vocab_size=9, decoder_layers=1, decoder_ffn_embed_dim=8)).eval()
    text = [7, 8, 4, 5, 2, 6, 2, 4, 5, 6]

    def next_token(ids, scores):
        return torch.zeros_like(scores).index_fill(1, torch.tensor([text[ids.size(1)]]), 1.0)

    start = {"input_ids": torch.tensor([text[:1]]), "do_sample": False, "eos_token_id": None, "max_length": 9}
    found = model.generate(**start, stop_strings=strings, tokenizer=tokenizer, logits_processor=[next_token])
    assert found[0].tolist() == text[:count]

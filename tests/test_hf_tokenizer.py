"""The exported tokenizer with transformers' own tools."""

import pytest

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
    pair = tokenizer("a", "b", return_special_tokens_mask=True)
    assert pair["special_tokens_mask"] == [1, 0, 1, 0]


def test_offsets_are_refused_and_pipelines_work(tokenizer):
    with pytest.raises(NotImplementedError, match=r"return_offsets?_mapping"):
        tokenizer("a b", return_offsets_mapping=True)
    model = AlibiForCausalLM(AlibiConfig(vocab_size=7, decoder_layers=1, decoder_ffn_embed_dim=8, begin_token=2))
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    found = write("a\nb", max_new_tokens=3, do_sample=False, eos_token_id=None)[0]["generated_text"]
    assert found.startswith("a\nb")

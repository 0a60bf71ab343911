"""The picture of the bias."""

import numpy
import pytest
import reference
import torch
from conftest import failure

from fairseq_alibi.__main__ import main
from fairseq_alibi.evaluation.plots import FORMS, alibi_bias, draw_biases


@pytest.mark.parametrize("form", FORMS[1:])
def test_what_is_drawn_is_the_bias(form):
    assert torch.equal(alibi_bias(form, 12, 9), reference.encoder_bias(12, 9, form).float())


def test_the_causal_bias_is_that_of_attention():
    expected = [[0, -torch.inf, -torch.inf], [-0.25, 0, -torch.inf], [-0.5, -0.25, 0]]
    assert alibi_bias("causal", 4, 3)[0].tolist() == expected


def test_a_picture_is_written_and_not_overwritten(tmp_path, capsys):
    picture = tmp_path / "bias.png"
    main(["show-bias", "--heads", "3", "--length", "5", "--output", str(picture)])
    assert "causal, symmetric, two_slopes, 3 heads" in capsys.readouterr().out, "three heads have no halves"
    drawn = picture.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert "--overwrite" in failure(capsys, main, "show-bias", "--output", picture)
    assert "4,096" in failure(capsys, main, "show-bias", "--length", 5000, "--output", tmp_path / "other.png")
    assert "one_sided" in failure(
        capsys, main, "show-bias", "--heads", 3, "--form", "one_sided", "--output", tmp_path / "other.png"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bias.png"]
    assert picture.read_bytes() == drawn


def test_a_cell_is_drawn_for_each_form_and_up_to_eight_heads(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, original = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, x, **more: drawn.append(x) or original(self, x, **more))
    draw_biases({form: alibi_bias(form, 12, 4) for form in FORMS}, tmp_path / "bias.png")
    assert len(drawn) == 4 * 8
    assert numpy.isnan(drawn[0]).sum() == 6, "the future of four queries"

import pytest
import torch

from sora_lite.models.conditions import Conditions


def test_joined_along_the_batch_with_the_shorter_text_padded() -> None:
    short = Conditions(text=torch.ones(2, 1, 3), text_mask=torch.ones(2, 1, dtype=torch.bool), pooled=torch.ones(2, 5))
    long = Conditions(text=torch.ones(1, 4, 3), text_mask=torch.ones(1, 4, dtype=torch.bool), pooled=torch.zeros(1, 5))
    for one, other in ((short, long), (long, short)):
        both = one.cat(other)
        assert len(both) == 3 and both.text.shape == (3, 4, 3) and both.pooled.shape == (3, 5)
        assert torch.equal(both.text_mask, both.text.any(-1))
        assert both.text_mask.sum() == 6
        assert both.labels is None and both.frames is None
    tokens = Conditions(text=torch.full((1, 2), 7)).cat(Conditions(text=torch.full((1, 1), 9))).text
    assert tokens.tolist() == [[7, 7], [9, 0]]
    assert len(Conditions()) == 0 == len(Conditions().cat(Conditions()))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"labels": torch.zeros(2), "pooled": torch.zeros(3, 4)}, r"different sizes: \[2, 3\]"),
        ({"text_mask": torch.zeros(2, 3)}, "is not that of text features None"),
        ({"text": torch.zeros(2, 3), "text_mask": torch.zeros(2, 3)}, r"is not that of text features \(2, 3\)"),
        ({"text": torch.zeros(2, 3, 4), "text_mask": torch.zeros(2, 4)}, r"text_mask \(2, 4\)"),
        ({"frames": torch.zeros(2, 3, 1, 2, 2)}, "go together"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Conditions(**wrong)


def test_conditions_of_different_models_are_not_joined() -> None:
    with pytest.raises(ValueError, match=r"\['labels'\] cannot be joined with \['pooled'\]"):
        Conditions(labels=torch.zeros(1)).cat(Conditions(pooled=torch.zeros(1, 2)))


def test_features_are_not_padded_where_padding_would_be_read() -> None:
    with pytest.raises(ValueError, match="need a text_mask"):
        Conditions(text=torch.zeros(1, 2, 3)).cat(Conditions(text=torch.zeros(1, 4, 3)))
    assert len(Conditions(text=torch.zeros(1, 2, 3)).cat(Conditions(text=torch.ones(1, 2, 3)))) == 2

"""Which parameters elements are chosen of, how many, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cl_dist.errors import BadInput
from cl_dist.methods.elements.method import chosen_parameters, kept_elements
from cl_dist.methods.gmt.config import GmtConfig
from cl_dist.methods.mofo.config import MofoConfig
from cl_dist.methods.sift.config import SiftConfig
from tests.distributed.worlds import odd_lora, odd_model


def chosen(config: GmtConfig | MofoConfig, model: Any) -> list[str]:
    return chosen_parameters(model, {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}, config)


def gmt(parameters: Any) -> GmtConfig:
    return GmtConfig(name="gmt", parameters=parameters)


def test_words_for_parameters() -> None:
    model = odd_model("llama")
    names = [name for name, _ in model.named_parameters()]
    assert chosen(gmt("all"), model) == names
    assert chosen(gmt("body"), model) == [n for n in names if not n.startswith(("lm_head", "model.embed_tokens"))]
    assert chosen(MofoConfig(name="mofo"), model) == [n for n in names if "norm" not in n]
    roberta = odd_model("roberta")
    assert not any("bias" in n or "LayerNorm" in n for n in chosen(MofoConfig(name="mofo"), roberta))
    assert all("lora_" in n for n in chosen(gmt("all"), odd_lora("llama")))


def test_patterns() -> None:
    model = odd_model("llama")
    found = chosen(gmt(("*.mlp.up_proj.weight", "lm_head.*")), model)
    assert found == ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    with pytest.raises(BadInput, match=r"^method.parameters: \*.fc1.\* matches no trainable parameter; the model has "):
        chosen(gmt(("*.mlp.*", "*.fc1.*")), model)


def test_numbers_of_elements() -> None:
    """As the public code counts, in floating point; but never none."""
    assert [kept_elements(n, 0.2) for n in (1, 4, 5, 9, 10, 11)] == [1, 1, 1, 1, 2, 2]
    assert kept_elements(100, 0.29) == int(100 * 0.29) == 28
    assert kept_elements(7, 1.0) == 7


@pytest.mark.parametrize("keep", [0.0, 1.1, -0.1])
def test_shares_that_make_no_sense_are_refused(keep: float) -> None:
    for make in (lambda: gmt_share(keep), lambda: MofoConfig(name="mofo", keep=keep), lambda: sift_share(keep)):
        with pytest.raises(ValidationError, match="keep"):
            make()


def gmt_share(keep: float) -> GmtConfig:
    return GmtConfig(name="gmt", keep=keep)


def sift_share(keep: float) -> SiftConfig:
    return SiftConfig(name="sift", keep=keep)


def test_empty_lists_are_refused() -> None:
    with pytest.raises(ValidationError, match="parameters: the list is empty"):
        gmt(())
    with pytest.raises(ValidationError, match="layers: the list is empty"):
        SiftConfig(name="sift", layers=())

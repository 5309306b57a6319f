"""Loading folders, new heads and GGUF files, and what loading refuses."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, ViTConfig

from cl_dist.config.schema import ModelConfig
from cl_dist.errors import BadInput
from cl_dist.models.export import export_model
from cl_dist.models.load import check_length, family_of, load_model
from tests.models.conftest import LABELS, Loader
from tests.models.tiny_gguf import write_gguf
from tests.ranks import run_ranks


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the weights in a folder."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_json(file: Path, **values: object) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def copied(source: Path, tmp_path: Path) -> Path:
    """A copy for a test to damage."""
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.mark.parametrize(
    ("family", "objective"), [("llama", "causal_lm"), ("t5", "seq2seq_lm"), ("roberta", "masked_lm")]
)
def test_a_folder_gives_the_weights_that_were_written(
    load: Loader, folders: dict[str, Path], family: str, objective: str
) -> None:
    written = load(f"builtin:{family}-tiny", objective, seed=77)
    loaded = load(folders[family], objective)
    expected = dict(written.model.named_parameters())
    assert {name for name, _ in loaded.model.named_parameters()} == set(expected)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.model.named_parameters())
    assert loaded.objective == objective
    assert loaded.tokenizer("a b")["input_ids"] == written.tokenizer("a b")["input_ids"]
    assert loaded.tokenizer.padding_side == "right"
    assert loaded.model.config._name_or_path == str(folders[family])


def test_dtype_is_the_one_asked_for(load: Loader, folders: dict[str, Path]) -> None:
    assert {p.dtype for p in load(folders["llama"], dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}


def test_a_new_head_follows_from_the_seed(load: Loader, folders: dict[str, Path]) -> None:
    """The body comes from the masked-LM checkpoint; the head equals that of the built-in model with the same seed."""
    torch.manual_seed(0)
    loaded = load(folders["roberta"], "classification").model
    torch.manual_seed(1)
    again = load(folders["roberta"], "classification").model
    fresh = load("builtin:roberta-tiny", "classification").model
    body = load(folders["roberta"], "masked_lm").model.roberta
    for name in ("dense", "out_proj"):
        head = getattr(loaded.classifier, name).weight
        assert torch.equal(head, getattr(fresh.classifier, name).weight)
        assert torch.equal(head, getattr(again.classifier, name).weight)
    assert all(torch.equal(p, dict(body.named_parameters())[n]) for n, p in loaded.roberta.named_parameters())
    assert loaded.classifier.out_proj.weight.shape == (LABELS, 64)


def test_a_trained_head_is_kept_and_must_fit(load: Loader, tmp_path: Path) -> None:
    trained = load("builtin:roberta-tiny", "classification", seed=9)
    export_model(trained.model, trained.tokenizer, tmp_path, dict(trained.model.named_parameters()))
    assert torch.equal(load(tmp_path).model.classifier.out_proj.weight, trained.model.classifier.out_proj.weight)
    with pytest.raises(BadInput, match=r"cannot be loaded: .*size"):
        load(tmp_path, labels=LABELS + 1)


def test_a_decoder_can_be_a_classifier(load: Loader, folders: dict[str, Path]) -> None:
    model = load(folders["llama"], "classification").model
    assert model.config.pad_token_id is not None
    assert model.score.weight.shape == (LABELS, 64)


def test_a_missing_pooler_is_no_error(load: Loader, folders: dict[str, Path], tmp_path: Path) -> None:
    """A BERT trained only on masked words has no pooler, but its classifier needs one."""
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders["roberta"] / name, tmp_path)
    assert torch.isfinite(load(tmp_path).model.bert.pooler.dense.weight).all()


def drop_block(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def drop_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (drop_block, r"lack 1 tensors .*, the first is model\.layers\.1\.mlp\.up_proj\.weight$"),
        (drop_head, r"the first is lm_head\.weight$"),
    ],
)
def test_missing_weights_are_not_drawn_at_random(
    load: Loader,
    folders: dict[str, Path],
    tmp_path: Path,
    drop: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    folder = copied(folders["llama"], tmp_path)
    change_tensors(folder, drop)
    with pytest.raises(BadInput, match=message):
        load(folder)


def test_a_folder_without_weights_is_refused(load: Loader, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["llama"], tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"model has no weights; expected model\.safetensors or pytorch"):
        load(folder)


def test_an_unknown_model_type_is_refused(load: Loader, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["llama"], tmp_path)
    change_json(folder / "config.json", model_type="nothing-like-it")
    with pytest.raises(BadInput, match=r"cannot be loaded: .*nothing-like-it"):
        load(folder)


def test_a_models_own_code_needs_consent(load: Loader, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["llama"], tmp_path)
    change_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    (folder / "own.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    with pytest.raises(BadInput, match=r"its own Python code, which runs only with model\.trust_remote_code: true"):
        load(folder)


def test_inputs_longer_than_the_position_table_are_refused(load: Loader) -> None:
    roberta = load("builtin:roberta-tiny")
    check_length(roberta, 513)  # 514 rows, the padding token has the first
    with pytest.raises(BadInput, match=r"train.max_length: 514 is too long for builtin:roberta-tiny, which has 513"):
        check_length(roberta, 514)
    check_length(load("builtin:llama-tiny"), 100_000)


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    load: Loader, folders: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load(folders["llama"])
    loaded.tokenizer.add_tokens([f"word{i}" for i in range(3)])
    folder = copied(folders["llama"], tmp_path)
    loaded.tokenizer.save_pretrained(folder)
    with pytest.raises(BadInput, match=r"has 264 entries, but its model has only 261 embeddings"):
        load(folder)


def test_a_masked_lm_needs_a_mask_token(load: Loader, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["roberta"], tmp_path)
    change_json(folder / "tokenizer_config.json", mask_token=None)
    with pytest.raises(BadInput, match=r"has no mask token, which masked_lm needs"):
        load(folder, "masked_lm")


def test_the_end_token_pads_without_a_padding_token(load: Loader, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["llama"], tmp_path)
    change_json(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = load(folder).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_classifier_without_labels_is_refused(load: Loader) -> None:
    with pytest.raises(BadInput, match=r"needs tasks with labels to become a classifier"):
        load("builtin:roberta-tiny", labels=0)


def test_an_unknown_name_is_refused(load: Loader) -> None:
    begun = time.monotonic()
    with pytest.raises(BadInput, match=r"has-such-a-model is neither a folder here nor in the cache \("):
        load("nobody/has-such-a-model")
    assert time.monotonic() - begun < 5


def test_a_tokenizer_that_cannot_be_read_is_named_as_such(
    folders: dict[str, Path], load: Loader, tmp_path: Path
) -> None:
    folder = copied(folders["llama"], tmp_path)
    (folder / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    with pytest.raises(
        BadInput, match=rf"^model\.name_or_path: the tokenizer in {folder} cannot be read: .+; take the "
    ):
        load(folder)


def test_a_picture_model_is_none_of_the_families() -> None:
    with pytest.raises(BadInput, match=r"somewhere is a vit; allowed are text models"):
        family_of(ViTConfig(), "somewhere")


@pytest.fixture(scope="module")
def gguf_folder(load: Loader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama as tiny.gguf."""
    folder = tmp_path_factory.mktemp("gguf")
    loaded = load("builtin:llama-tiny", seed=31)
    write_gguf(loaded.model, loaded.tokenizer, folder / "tiny.gguf")
    return folder


def test_a_gguf_file_loads_as_the_model_in_it(load: Loader, gguf_folder: Path) -> None:
    expected = load("builtin:llama-tiny", seed=31)
    loaded = load(gguf_folder, gguf_file="tiny.gguf")
    ids = torch.arange(5, 40)[None]
    torch.testing.assert_close(loaded.model(ids).logits, expected.model(ids).logits, rtol=1e-5, atol=1e-5)
    text = "Caffè, 2 + 2"
    assert loaded.tokenizer.decode(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert (loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id) == (0, 2)
    names = {loaded.model.name_or_path, loaded.model.config._name_or_path, loaded.tokenizer.name_or_path}
    assert names == {str(gguf_folder)}, "nothing says where the converted copy is"


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(gguf_folder: Path, tmp_path: Path) -> None:
    source = copied(gguf_folder, tmp_path)
    cache = tmp_path / "cache"
    model = ModelConfig(name_or_path=str(source), gguf_file="tiny.gguf")

    def load_once() -> set[tuple[str, int]]:
        load_model(model, 0, zero3_config=None, dtype=torch.float32, seed=1, cache_dir=cache)
        return {
            (path.name, path.stat().st_mtime_ns) for path in cache.rglob("*.safetensors") for path in path.parents[:1]
        }

    first = load_once()
    assert load_once() == first
    assert len(first) == 1
    os.utime(source / "tiny.gguf", ns=(1, 1))
    assert len(load_once()) == 2
    # Another one of the same size and time, as `cp -p` leaves it.
    shutil.copy(source / "tiny.gguf", source / "other.gguf")
    os.utime(source / "other.gguf", ns=(1, 1))
    (source / "other.gguf").replace(source / "tiny.gguf")
    assert len(load_once()) == 3
    assert not list(cache.glob("gguf-??????")), "a temporary folder was left"


def test_a_damaged_gguf_file_is_told_on_every_rank(gguf_folder: Path, tmp_path: Path) -> None:
    folder = copied(gguf_folder, tmp_path)
    content = (folder / "tiny.gguf").read_bytes()
    (folder / "tiny.gguf").write_bytes(content[: len(content) // 2])
    arguments = {"folder": str(folder), "gguf_file": "tiny.gguf", "cache_dir": str(tmp_path / "cache")}
    first, second = run_ranks("tests.models.rank_jobs:convert_gguf", 2, arguments)
    assert first == second
    assert first.startswith("model.gguf_file: tiny.gguf of ")
    assert "cannot be converted" in first
    assert not any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"text_config": 7}, r"text_config of .* is 7; allowed: a mapping of settings"),
        (
            "tokenizer_config.json",
            {"model_max_length": "8"},
            r"model_max_length of the tokenizer of .* is \"8\", not a number$",
        ),
    ],
)
def test_entries_of_another_type_are_refused_by_name(
    load: Loader, folders: dict[str, Path], tmp_path: Path, file: str, values: dict[str, object], message: str
) -> None:
    folder = copied(folders["llama"], tmp_path)
    change_json(folder / file, **values)
    with pytest.raises(BadInput, match=message):
        load(folder, "causal_lm")

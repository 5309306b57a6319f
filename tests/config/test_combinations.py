"""Settings that contradict each other or that nothing reads are refused; settings that are read are not."""

from __future__ import annotations

import pytest

from cl_dist.cli.run import check_stream_and_model
from cl_dist.config.load import dump_recipe, load_recipe
from cl_dist.config.yaml_text import parse_yaml
from cl_dist.errors import BadInput
from tests.config.fuzz import playground

PROSE = "stream.tasks=[{name: prose, format: builtin}, {name: t, format: text, path: x}]"
TEXTS = "stream.tasks=[{name: a, format: text, path: x}, {name: b, format: jsonl, path: x, text_field: text}]"
SLOTS = "stream.tasks=[{name: a, format: sgd, path: x}]"
GENERAL = "eval.general={tasks: [hellaswag], after: []}"

UNREAD = [
    (["train.max_steps_per_task=4", "train.warmup_steps=5"], "train.warmup_steps: 5 is more than max_steps_pe"),
    (
        ["method={name: recurrent_kif, inner_steps: 2, outer_steps: 1}", "train.max_steps_per_task=4",
         "train.warmup_steps=7"],
        "train.warmup_steps: 7 is more than max_steps_per_task 4 and the 2 steps that the method adds, so that "
        "learning_rate would never be reached; allowed: at most 6",
    ),
    (["zero.stage=2", "eval.gather_weights=never"], "eval.gather_weights: never is not used: only zero.stage 3 shards"),
    ([TEXTS, "train.truncate=left"], "train.truncate: left is not used: all tasks are plain text, without prompts"),
    ([TEXTS, "train.long_answers=cut"], "train.long_answers: cut is not used: all tasks are plain text, without"),
    ([TEXTS, "train.template=chat"], "train.template: chat is not used: all tasks are plain text, without turns"),
    (["method.name=multi_task", "train.keep_optimizer=true"], "train.keep_optimizer: true is not used: m"),
    (["eval.mode=likelihood", "eval.max_new_tokens=9"], "eval.max_new_tokens: 9 is not used: eval.mode l"),
    (["eval.mode=perplexity", "eval.max_new_tokens=9"], "eval.max_new_tokens: 9 is not used: eval.mode "),
    (["eval.metric=jga", "eval.normalise=punctuation"], "eval.normalise: punctuation is for exact match and macro-F1"),
    ([SLOTS, "eval.normalise=punctuation"], "eval.normalise: punctuation is not used: format sgd is scored by jga"),
    ([SLOTS, "eval.rouge_tokenizer=unicode"], "eval.rouge_tokenizer: unicode is not used: format sgd is scored by"),
    ([GENERAL], "eval.general.after: an empty list measures nothing"),
    (["model.trust_remote_code=true"], "model.trust_remote_code: true is not used: builtin:llama-tiny co"),
    (["method={name: migu, selection: random, magnitude: batch}"], "method.magnitude: batch is not used"),
    (["method={name: migu, selection: random, count_padding: true}"], "method.count_padding: true is not used"),
    (["method={name: kif, threshold: 30}"], "method.threshold: 30.0 is not used: fusion: adaptive take"),
    (["method={name: kif, weight_new: 0.4, weight_old: 0.6}"], "method.weight_new: 0.4 is not used: fu"),
    (["method={name: kif, weight_neither: 0.4}"], "method.weight_neither: 0.4 is not used"),
    (["method={name: kif, fusion: hard, tau: 0.5}"], "method.tau: 0.5 is not used: fusion: hard fuses "),
    (["method={name: tasl, tau: 0.5}"], "method.tau: 0.5 is not used: fusion: hard fuses by masks"),
    (["train.micro_batch_size=100000", "train.gradient_accumulation=100000"], "train.micro_batch_size: 100000, "),
]  # fmt: skip

READ = [
    ["train.max_steps_per_task=4", "train.warmup_steps=4"],
    [
        "method={name: recurrent_kif, inner_steps: 2, outer_steps: 1}",
        "train.max_steps_per_task=4",
        "train.warmup_steps=6",
    ],
    [PROSE, "train.truncate=left", "train.long_answers=cut"],
    ["train.keep_optimizer=true"],
    ["eval.mode=generate", "eval.max_new_tokens=9"],
    ["eval.max_new_tokens=9"],
    [SLOTS, "eval.metric=exact_match", "eval.normalise=punctuation"],
    ["eval.mode=likelihood", "train.max_target_length=9"],  # which eval.max_new_tokens follows
    ["eval.mode=likelihood", "train.max_length=64"],
    ["eval.mode=likelihood"],  # the recipe gives max_target_length, from which max_new_tokens follows
    ["eval.mode=likelihood", "train.max_target_length=16"],
    ["model.name_or_path=a/b", "model.trust_remote_code=true"],
    ["method={name: migu, magnitude: batch, count_padding: true}"],
    ["method={name: migu, selection: random, threshold: 0.5}"],
    ["method={name: migu, mask_scope: micro_batch}"],  # a resume may split the batch otherwise
    ["method={name: kif, tau: 0.5}"],
    ["method={name: kif, fusion: hard, threshold: 30, weight_neither: 0.4}"],
    ["method={name: tasl, threshold: 30}"],
    ["method={name: tasl, fusion: adaptive, tau: 0.5}"],
    ["method={name: recurrent_kif, threshold: 30}"],
]


@pytest.mark.parametrize(("changes", "message"), UNREAD)
def test_a_setting_that_nothing_reads_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(BadInput) as refusal:
        load_recipe("quickstart", changes)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("changes", READ, ids=" ".join)
def test_settings_that_are_read_are_accepted_also_from_config_yaml(changes: list[str]) -> None:
    recipe, _ = load_recipe("quickstart", changes)
    with playground() as folder:
        (folder / "config.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        written = load_recipe("config.yaml")[0]
    assert parse_yaml(dump_recipe(written), "")["method"] == parse_yaml(dump_recipe(recipe), "")["method"]
    assert (written.train, written.eval) == (recipe.train, recipe.eval)


SMALL = ["stream.max_train_samples=8", "train.micro_batch_size=2", "train.gradient_accumulation=1", "train.epochs=3"]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ([], 6),  # eight samples in batches of two times two ranks, three times
        (["launch.processes=1"], 12),
        (["train.gradient_accumulation=2"], 3),
        (["train.micro_batch_size=3"], 6),  # the last batch is short
        (["stream.tasks=[{name: spring, format: builtin}, {name: noon, format: builtin, epochs: 5}]"], 10),
        (["train.max_steps_per_task=5"], 5),
        (["method={name: replay, ratio: 1.0}", "stream.tasks=[{name: dusk, format: builtin}]"], 6),
        (["method={name: multi_task}"], 6 * 4),
        (["method={name: recurrent_kif, inner_steps: 2, outer_steps: 4}"], 6 * 4 + 4 * 12),
        (["method={name: recurrent_kif, schedule_over: inner_steps}"], 6 * 4),
    ],
)
def test_a_warm_up_must_end_within_some_task(changes: list[str], steps: int) -> None:
    check_stream_and_model(*load_recipe("quickstart", [*SMALL, *changes, f"train.warmup_steps={steps}"]))
    with pytest.raises(BadInput, match=r"^train\.warmup_steps: "):
        check_stream_and_model(*load_recipe("quickstart", [*SMALL, *changes, f"train.warmup_steps={steps + 1}"]))


def test_the_length_of_plain_text_is_not_guessed() -> None:
    recipe, folder = load_recipe(
        "quickstart", [*SMALL, "stream.tasks=[{name: prose, format: builtin}]", "train.warmup_steps=999"]
    )
    check_stream_and_model(recipe, folder)

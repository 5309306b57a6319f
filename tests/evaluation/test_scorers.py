"""Each way of scoring against the model itself, in one process."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cl_dist.evaluation.result import Prediction, weighted_mean
from cl_dist.evaluation.scores import macro_f1
from tests.evaluation import rank_jobs
from tests.evaluation.rank_jobs import built, score_one

LLAMA, ROBERTA = "builtin:llama-tiny", "builtin:roberta-tiny"
CLASSIFY, CONTINUE, READ = rank_jobs.classification(7), rank_jobs.generation(7), rank_jobs.text(20)


def test_likelihood_chooses_the_label_of_least_loss() -> None:
    evaluator, loaded = built(LLAMA, [["classification", 7]])
    score = score_one(evaluator, CLASSIFY)
    model, tokenizer = loaded.model, loaded.tokenizer
    for index, (prediction, example) in enumerate(zip(score.predictions, CLASSIFY.evaluation, strict=True)):
        losses = []
        for label in CLASSIFY.labels:
            prompt = tokenizer(example.prompt)["input_ids"]
            answer = [*tokenizer(f" {label}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            labels = torch.tensor([[-100] * len(prompt) + answer])
            with torch.no_grad():
                mean = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
            losses.append(float(mean) * len(answer))
        best = CLASSIFY.labels[losses.index(min(losses))]
        assert prediction == Prediction(index, best, example.answer, float(best == example.answer))
    assert (score.mode, score.metric, score.count) == ("likelihood", "exact_match", 7)
    assert score.score == sum(prediction.score for prediction in score.predictions) / 7


def test_equally_likely_labels_give_the_first() -> None:
    evaluator, loaded = built(LLAMA, [["classification", 3]])
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.zero_()
    task = replace(CLASSIFY, labels=("no", "ye", "ok"))
    assert {prediction.prediction for prediction in score_one(evaluator, task).predictions} == {"no"}


def test_classification_head_is_restricted_to_the_tasks_labels() -> None:
    evaluator, loaded = built(ROBERTA, [["classification", 7]])
    with torch.no_grad():
        loaded.model.get_parameter("classifier.out_proj.bias").copy_(torch.tensor([50.0, 1.0, 25.0]))
    all_labels = score_one(evaluator, CLASSIFY)
    some = score_one(evaluator, replace(CLASSIFY, labels=(rank_jobs.LABELS[1], rank_jobs.LABELS[2])))
    assert {prediction.prediction for prediction in all_labels.predictions} == {rank_jobs.LABELS[0]}
    assert {prediction.prediction for prediction in some.predictions} == {rank_jobs.LABELS[2]}


def test_generation_scores() -> None:
    evaluator, _ = built(LLAMA, [["generation", 7]])
    score = score_one(evaluator, CONTINUE)
    assert (score.mode, score.metric) == ("generate", "rouge_l")
    evaluator, _ = built(LLAMA, [["classification", 7]], mode="generate")
    score = score_one(evaluator, CLASSIFY)
    assert (score.mode, score.metric) == ("generate", "exact_match")
    assert all(prediction.prediction == prediction.prediction.strip() for prediction in score.predictions)


def test_the_closest_of_several_references_counts() -> None:
    evaluator, _ = built(LLAMA, [["generation", 2]])
    plain = CONTINUE.evaluation[:2]
    said = [each.prediction for each in score_one(evaluator, replace(CONTINUE, evaluation=plain)).predictions]
    references = [("none of it", f"{said[0]} zebra", said[0]), ("none of it", "nor this")]
    several = tuple(
        replace(each, answer="none of it", references=right) for each, right in zip(plain, references, strict=True)
    )
    first, second = score_one(evaluator, replace(CONTINUE, evaluation=several)).predictions
    assert (first.reference, first.score) == (said[0], 1.0)
    assert (second.reference, second.score) == ("none of it", 0.0)


@pytest.mark.parametrize("mode", ["likelihood", "generate"])
def test_macro_f1_is_the_score_or_an_extra(mode: str) -> None:
    """Both metrics come from the same predictions."""
    scores = {}
    for metric in ("exact_match", "macro_f1"):
        evaluator, _ = built(LLAMA, [["classification", 7]], mode=mode, metric=metric)
        scores[metric] = score_one(evaluator, CLASSIFY)
        assert scores[metric].metric == metric
    accuracy, f1 = scores["exact_match"], scores["macro_f1"]
    assert f1.predictions == accuracy.predictions
    pairs = [(each.prediction, each.reference) for each in f1.predictions]
    assert f1.score == accuracy.extras["macro_f1"] == macro_f1(pairs, CLASSIFY.labels)
    assert accuracy.score == f1.extras["exact_match"] == weighted_mean(f1.predictions)


def test_causal_perplexity_is_that_of_the_models_own_loss() -> None:
    evaluator, loaded = built(LLAMA, [["text", 20]])
    score = score_one(evaluator, READ)
    encoder = evaluator._subject.encoder
    total, tokens = 0.0, 0
    for chunk in encoder.text_chunks(READ.evaluation):
        ids, labels = torch.tensor([chunk.input_ids]), torch.tensor([chunk.labels])
        with torch.no_grad():
            total += float(loaded.model(input_ids=ids, labels=labels).loss) * chunk.targets
        tokens += chunk.targets
    assert len(score.predictions) == score.count > 1
    assert score.metric == "log_likelihood"
    assert score.score == pytest.approx(-total / tokens, rel=1e-5)
    assert score.extras["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_masked_perplexity_is_the_same_every_time_and_of_the_right_size() -> None:
    evaluator, loaded = built(ROBERTA, [["text", 20]], objective="masked_lm")
    first, second = score_one(evaluator, READ), score_one(evaluator, READ)
    assert first == second
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.zero_()
    uniform = score_one(evaluator, READ)
    assert uniform.extras["perplexity"] == pytest.approx(loaded.model.config.vocab_size, rel=1e-4)
    weights = [prediction.weight for prediction in uniform.predictions]
    chunks = evaluator._subject.encoder.text_chunks(READ.evaluation)
    assert 0.05 < sum(weights) / sum(chunk.targets for chunk in chunks) < 0.3


def test_a_turn_is_right_when_all_of_its_slots_are() -> None:
    task = rank_jobs.dialogue(["?"] * 9)
    evaluator, _ = built(LLAMA, [["generation", 7]])
    said = [each.prediction.lower() for each in score_one(evaluator, task).predictions]
    score = score_one(evaluator, rank_jobs.dialogue([*said[:4], "something else", *said[5:]]))
    assert (score.mode, score.metric, score.count) == ("generate", "jga", 9)
    assert score.score == pytest.approx(2 / 3)
    assert score.extras["slot_accuracy"] == pytest.approx(8 / 9)
    assert [prediction.score for prediction in score.predictions] == [1.0] * 4 + [0.0] + [1.0] * 4

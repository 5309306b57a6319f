"""Scripts that do what a method cannot allow, and what they are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import cl_dist
from cl_dist.engine.distributed import join
from cl_dist.errors import ClDistError
from tests.distributed.worlds import micro_batches, odd_model, samples

INPUTS = micro_batches("llama", samples("llama", 2), 2)[0].inputs


def messages() -> dict[str, str]:
    """What every case says."""
    join(timeout_seconds=60)
    return {case.__name__: _message(case) for case in CASES}


def _message(case: Callable[[], None]) -> str:
    try:
        case()
    except ClDistError as error:
        return str(error)
    return "nothing"


def continual(*arguments: Any, method: Any = "migu", **settings: Any) -> Any:
    """`cl_dist.continual`, with MIGU where the method does not matter."""
    return cl_dist.continual(*arguments, method=method, **settings)


def _loss(model: Any, **inputs: Any) -> torch.Tensor:
    return model(**INPUTS, labels=INPUTS["input_ids"], **inputs).loss


def _made(**options: Any) -> tuple[Any, torch.optim.AdamW]:
    model = odd_model("llama").train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, **options)


def compiled() -> None:
    """Compile."""
    model, optimizer = _made()
    with continual(torch.compile(model), optimizer):
        pass


def data_parallel() -> None:
    """DataParallel."""
    model, optimizer = _made()
    with continual(torch.nn.DataParallel(model), optimizer):
        pass


def other_model() -> None:
    """A model that is not one of transformers."""
    model = torch.nn.Linear(2, 2)
    with continual(model, torch.optim.AdamW(model.parameters())):
        pass


def no_optimizer() -> None:
    """A model alone."""
    continual(_made()[0])


def other_optimizer() -> None:
    """SGD."""
    model, _ = _made()
    with continual(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        pass


def third_moment() -> None:
    """Amsgrad."""
    with continual(*_made(amsgrad=True)):
        pass


def half_parameters() -> None:
    """Parameters in bfloat16."""
    model, optimizer = _made()
    with continual(model.to(torch.bfloat16), optimizer):
        pass


def own_hook() -> None:
    """Gradient edits of the script's own."""
    model, optimizer = _made()
    model.lm_head.weight.register_hook(lambda gradient: gradient * 2)
    with continual(model, optimizer):
        pass


def step_in_backward() -> None:
    """An optimiser inside backward."""
    model, optimizer = _made()
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda param: None)
    with continual(model, optimizer):
        pass


def scaled_loss() -> None:
    """A GradScaler."""
    model, optimizer = _made()
    scaler = torch.amp.GradScaler("cpu")
    with continual(model, optimizer):
        scaler.scale(_loss(model)).backward()
        scaler.step(optimizer)


def half_autocast() -> None:
    """Autocast in float16."""
    model, optimizer = _made()
    with continual(model, optimizer), torch.autocast("cpu", torch.float16):
        _loss(model)


def closure() -> None:
    """A closure."""
    model, optimizer = _made()
    with continual(model, optimizer):
        optimizer.step(lambda: _loss(model).detach())


def more_passes() -> None:
    """Accumulation that nobody announced."""
    model, optimizer = _made()
    with continual(model, optimizer):
        for _ in range(2):
            _loss(model).backward()


def gradients_left() -> None:
    """No zero_grad."""
    model, optimizer = _made()
    with continual(model, optimizer):
        for _ in range(2):
            _loss(model).backward()
            optimizer.step()


def clipped_too_early() -> None:
    """Clipping in a step that ends early."""
    model, optimizer = _made()
    with continual(model, optimizer, gradient_accumulation=2):
        _loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()


def foreign_gradients() -> None:
    """Gradients from elsewhere."""
    model, optimizer = _made()
    with continual(model, optimizer):
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        optimizer.step()


def passes_without_gradients() -> None:
    """A pass in training mode that is not trained on."""
    model, optimizer = _made()
    with continual(model, optimizer), torch.no_grad():
        _loss(model)


def unknown_padding() -> None:
    """An encoder-decoder without labels."""
    model = odd_model("t5").train()
    inputs = micro_batches("t5", samples("t5", 2), 2)[0].inputs
    with continual(model, torch.optim.AdamW(model.parameters())):
        model(**inputs)


def not_finite() -> None:
    """A loss that is not a number."""
    model, optimizer = _made()
    with continual(model, optimizer):
        (_loss(model) * float("nan")).backward()


def between_steps() -> None:
    """A task that ends inside a step."""
    model, optimizer = _made()
    with continual(model, optimizer):
        _loss(model).backward()


def two_sessions() -> None:
    """Two methods, one inside the other."""
    made = _made()
    with continual(*made), continual(*made):
        pass


def needs_the_stream() -> None:
    """A method that measures samples."""
    continual(*_made(), method="ewc")


def needs_a_background() -> None:
    """A method that measures samples of other text."""
    continual(*_made(), method="sparse_memory", background=__file__)


def needs_an_early_start() -> None:
    """A method that changes the model."""
    continual(*_made(), method="hft")


def needs_samples() -> None:
    """A method that has settings that mix in samples."""
    continual(*_made(), method="kif", replay_ratio=0.1)


def unknown_setting() -> None:
    """A wrong setting."""
    continual(*_made(), method="migu", treshold=0.5)


def settings_beside_a_list() -> None:
    """A setting of nothing."""
    continual(*_made(), method=["kif", "migu"], threshold=0.5)


CASES = [
    compiled, data_parallel, other_model, no_optimizer, other_optimizer, third_moment, half_parameters, own_hook,
    step_in_backward, scaled_loss, half_autocast, closure, more_passes, gradients_left, clipped_too_early,
    foreign_gradients, passes_without_gradients, unknown_padding, not_finite, between_steps, two_sessions,
    needs_the_stream, needs_a_background, needs_an_early_start, needs_samples, unknown_setting, settings_beside_a_list,
]  # fmt: skip

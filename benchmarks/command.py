"""The benchmarks by name: what each one measures, its options, and how it runs. Imports no framework."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cl_dist.benchmarks.options import add_options, read_options
from cl_dist.benchmarks.shapes import MODELS, model_of
from cl_dist.errors import BadInput, ClDistError

COMMON = ("hidden", "tokens", "threshold", "runs", "dtype", "threads", "device", "csv")
"""Options of every benchmark, so that a script can pass the same options to all of them."""
DEFAULTS: dict[str, Any] = {"runs": 9, "dtype": "float32"}
SHORTEST_PLANNED = 40
"""Tokens of a sample in `plan-accuracy`."""
RANK_DTYPES = ("float32", "bfloat16")
"""The dtypes that a recipe allows."""
JSON_NOTE = """\

JSON: "machine", "settings", and "sizes" with one entry per size. The keys of the first entry are repeated at the top
level. A ratio such as "a_over_b" is an object with the median, minimum and maximum of a's time divided by b's time in
the same round. "of_limit" is the share of the hardware's limit, which is measured in the same rounds.
"""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark."""

    name: str
    summary: str
    """One line for the list of benchmarks."""
    description: str
    options: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    """Common options that have no effect; the help says so."""
    check: Callable[[Namespace], None] = lambda options: None
    """Raises BadInput for options that contradict each other."""

    @property
    def module(self) -> str:
        """The module that measures."""
        return "cl_dist.benchmarks." + self.name.replace("-", "_")

    def add_to(self, parser: ArgumentParser) -> None:
        """Add the benchmark's options and texts to a parser."""
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description, parser.epilog = self.description, JSON_NOTE
        without_effect = {"tokens", "threshold"}.difference(self.options).union(self.ignored)
        add_options(parser, self._names(), self._defaults(), without_effect)

    def run(self, arguments: Namespace) -> str:
        """Check the options, measure, and return the output. Raises BadInput."""
        options = read_options(arguments, self._names(), self._defaults())
        if getattr(options, "shapes", None) is not None:
            if arguments.hidden is not None:
                raise BadInput(f"--shapes {options.shapes}: --hidden already sets the size; give only one of the two")
            options.hidden = None  # the default does not apply
        self.check(options)
        from cl_dist.benchmarks.report import measured

        return measured(self, options)

    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.options, *COMMON)))

    def _defaults(self) -> dict[str, Any]:
        return {**DEFAULTS, **self.defaults}


def _check_step(options: Namespace) -> None:
    """Check that the widths form a model, and that the options fit the kind of run: ranks or a single process."""
    _check_ranks(options)
    for hidden in () if options.shapes else options.hidden:
        model_of(hidden, options.intermediate)
    for tokens in options.tokens:
        if tokens < 2:
            raise BadInput(f"--tokens {tokens}: a single token has no next token to predict; give at least 2")
    if options.shapes and options.intermediate:
        raise BadInput(f"--intermediate {options.intermediate}: --shapes already sets it; give only one of the two")


def _check_ranks(options: Namespace) -> None:
    if options.selector is None and options.accumulation is not None:
        raise BadInput(f"--accumulation {options.accumulation}: needs a method; give --selector too")
    if options.processes is None and options.selector is None:
        if options.zero_stage is not None:
            raise BadInput(f"--zero-stage {options.zero_stage}: needs ranks; give --processes too")
        return
    ranks = "--processes" if options.selector is None else "--selector"
    if options.lora is not None:
        raise BadInput(f"--lora {options.lora}: measured in a single process only; leave out {ranks}")
    if options.dtype not in RANK_DTYPES:
        raise BadInput(f"--dtype {options.dtype}: not supported with {ranks}; allowed: {', '.join(RANK_DTYPES)}")


def _check_wire(options: Namespace) -> None:
    for hidden in options.hidden:
        model_of(hidden, options.intermediate)
    for tokens in options.tokens:
        if tokens < 2:
            raise BadInput(f"--tokens {tokens}: a single token has no next token to predict; give at least 2")
    if options.zero_stage == 0:
        raise BadInput("--zero-stage 0: kept rows travel at the stages that shard gradients or state; allowed: 1, 2, 3")
    if options.device == "cuda":
        raise BadInput("--device cuda: the ranks meet over a link between CPUs; leave out --device")
    if options.dtype not in RANK_DTYPES:
        raise BadInput(f"--dtype {options.dtype}: not supported with ranks; allowed: {', '.join(RANK_DTYPES)}")


def _check_importance(options: Namespace) -> None:
    if options.elements is not None and options.hidden is not None:
        raise BadInput("--elements: --hidden already sets the size; give only one of the two")


def _check_plan_accuracy(options: Namespace) -> None:
    for hidden in options.hidden:
        if hidden % 8:
            raise BadInput(f"--hidden {hidden}: not a multiple of 8, which four attention heads need")
    for tokens in options.tokens:
        if tokens < SHORTEST_PLANNED:
            raise BadInput(f"--tokens {tokens}: too few for a prompt and an answer; give at least {SHORTEST_PLANNED}")


def _check_bfloat16(options: Namespace) -> None:
    if options.dtype != "bfloat16" or options.device == "cuda":
        raise BadInput("the benchmark bfloat16 measures that dtype on the CPU only; leave out --dtype and --device")


_LAYER_OPTIONS = ("hidden", "shapes", "tokens")
_MODELS = f"Models for --shapes: {', '.join(MODELS)}."

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "step",
            "a whole training step (forward, backward, mask), masked versus dense",
            "Times forward, backward and mask of a training step, without the optimiser, on a Llama with random\n"
            "weights. Compares three variants: dense (plain fine-tuning), masked (MIGU, whose backward pass skips the\n"
            "masked rows), and reference (magnitudes from hooks, torch.quantile, gradients multiplied by the mask).\n"
            "Also compares the masked gradients with masking after backward, and measures peak memory.\n"
            "With --processes, ranks train under DeepSpeed, dense and masked. There is no reference variant, so\n"
            "masked_over_reference and reference_over_dense are null.\n"
            "With --selector, two ranks (or --processes) take whole steps, reduction and optimiser included, of a\n"
            "method that knows for a task which part of the weights it trains, and dense ones: times, and the bytes\n"
            "of gradient, masters and moments per rank. The part is 1 - T of the weights in the blocks.",
            (*_LAYER_OPTIONS, "threshold", "layers", "intermediate", "lora", "processes", "zero_stage", "memory",
             "selector", "accumulation"),
            {"hidden": (1024,), "tokens": (512,), "threshold": 0.7, "memory": "yes"},
            check=_check_step,
        ),
        Benchmark(
            "magnitude",
            "output magnitude of each row of a linear layer",
            "Times the row magnitudes of a linear layer's output (L1-normalised per token, summed over tokens).\n"
            "Compares the kernel, the reference, the shortest chain of torch operations, and the layer's own matrix\n"
            f"product. {_MODELS}",
            _LAYER_OPTIONS,
            {"hidden": (576, 1024, 4096), "tokens": (512,)},
        ),
        Benchmark(
            "topk",
            "row selection for all layers of a model",
            "Times the selection of the kept rows of all layers of a model by their magnitudes. Compares the batched\n"
            "kernel, the reference (torch.quantile, layer by layer) and torch's own selection (kthvalue).\n"
            f"--hidden is the number of rows per layer, --layers the number of layers. {_MODELS}",
            ("hidden", "shapes", "threshold", "layers"),
            {"hidden": (576, 1024, 4096), "threshold": 0.7, "layers": 28},
        ),
        Benchmark(
            "weight-grad",
            "weight gradient of a linear layer, kept rows only",
            "Times the weight gradient of a linear layer. Compares the masked kernel, the dense product, the\n"
            f"reference (dense product, then zeroed rows), and torch's own gather, product and scatter. {_MODELS}",
            (*_LAYER_OPTIONS, "threshold"),
            {"hidden": (576, 1024, 4096), "tokens": (512,), "threshold": 0.7},
        ),
        Benchmark(
            "importance",
            "one update of smoothed importance and uncertainty (KIF, TaSL)",
            "Times one update of both states of a parameter. Compares the fused pass, the reference's chain of\n"
            "out-of-place operations, and the best chain of torch's in-place operations with one temporary tensor.\n"
            "Memory is what each of them allocates. The size is --elements (default 16Mi), or N x N with --hidden N.",
            ("elements", "order"),
            {"order": "mixed"},
            check=_check_importance,
        ),
        Benchmark(
            "wire",
            "whole steps of two ranks over a link of known speed: kept rows versus all rows",
            "Trains on two CPU ranks in two network namespaces, joined by a link whose ends send at most --rate each\n"
            "(without it: as fast as the machine can). Compares three variants in whole steps, optimiser included:\n"
            "dense (plain fine-tuning), off (MIGU that sends whole gradients and weights) and compact (MIGU that\n"
            "sends kept rows). Bytes are what the kernel counts at a rank's interface in a step. Times are also given\n"
            "by phase: forward, backward with the reduction, optimizer, gather. Needs root, and the programs unshare,\n"
            "nsenter, ip and, with --rate, tc; without them nothing is measured, and the output says why.",
            ("hidden", "tokens", "threshold", "layers", "intermediate", "zero_stage", "mask", "rate"),
            {"hidden": (1024,), "tokens": (512,), "threshold": 0.7, "runs": 5, "zero_stage": 2, "mask": "update"},
            check=_check_wire,
        ),
        Benchmark(
            "optimizer",
            "AdamW on the kept rows alone, against all rows",
            "Times one step of AdamW on the kept rows of a weight, which are chosen at random. Compares the kernel,\n"
            "torch's fused AdamW on all rows, and the same with the dropped rows saved before and put back after it.\n"
            "--elements is the size of the weight, --hidden the length of its rows.",
            ("hidden", "elements", "keep"),
            {"hidden": (4096,), "elements": (45_000_000,), "keep": 0.3},
        ),
        Benchmark(
            "plan-accuracy",
            "what `cl-dist plan` predicts against what training does",
            "Trains a small Llama with random weights on CPU ranks in forty settings (every ZeRO stage, full and\n"
            "LoRA, sequential, MIGU and KIF), and compares the predicted bytes of every component, of the peak of a\n"
            "step, and of the collectives with what is counted. Without --processes, on one rank and on two.",
            ("hidden", "tokens", "processes", "zero_stage"),
            {"hidden": (256,), "tokens": (256,)},
            ("runs", "dtype", "threads", "device"),
            _check_plan_accuracy,
        ),
        Benchmark(
            "bfloat16",
            "bfloat16 matrix products of a linear layer on a CPU without instructions for them",
            "Times the three products of a linear layer in bfloat16: its output, the gradient of its input, and the\n"
            "gradient of its weight. Compares torch's own products with those that training uses on CPUs without\n"
            "bfloat16 instructions, which multiply in float32. On a CPU that has the instructions, the environment\n"
            "variables ONEDNN_MAX_CPU_ISA=AVX2 and MKL_ENABLE_INSTRUCTIONS=AVX2 switch them off. "
            f"{_MODELS}",
            _LAYER_OPTIONS,
            {"hidden": (1024, 2048), "tokens": (64,), "runs": 3, "dtype": "bfloat16"},
            check=_check_bfloat16,
        ),
    )
}  # fmt: skip


def main(name: str) -> None:
    """Run one benchmark as a script and exit."""
    parser = ArgumentParser()
    BENCHMARKS[name].add_to(parser)
    try:
        print(BENCHMARKS[name].run(parser.parse_args()))
    except ClDistError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

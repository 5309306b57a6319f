"""The benchmarks by name: what each measures, its options, and how it is run. Loads no framework by itself."""

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
"""Options that every benchmark takes, so that a script can give all of them the same."""
DEFAULTS: dict[str, Any] = {"runs": 9, "dtype": "float32"}
RANK_DTYPES = ("float32", "bfloat16")
"""Those of a recipe."""
JSON_NOTE = """\

JSON: "machine", "settings", and "sizes" with one entry for every size. The keys of the first entry stand at the top as
well. A ratio such as "a_over_b" is an object with the median, minimum and maximum of a's time over b's, of pairs that
ran in the same round. "of_limit" is the share of what the hardware does at best, measured in the same rounds.
"""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark."""

    name: str
    summary: str
    """Its line in the list of benchmarks."""
    description: str
    options: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Namespace], None] = lambda options: None
    """Raises BadInput for options that do not go together."""

    @property
    def module(self) -> str:
        """The module that measures."""
        return "cl_dist.benchmarks." + self.name.replace("-", "_")

    def add_to(self, parser: ArgumentParser) -> None:
        """Give a parser the benchmark's options and its text."""
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description, parser.epilog = self.description, JSON_NOTE
        without_effect = {"tokens", "threshold"}.difference(self.options)
        add_options(parser, self._names(), self._defaults(), without_effect)

    def run(self, arguments: Namespace) -> str:
        """Check the options, measure, and return what is to be printed. Raises BadInput."""
        options = read_options(arguments, self._names(), self._defaults())
        if getattr(options, "shapes", None) is not None:
            _refuse_both(options.shapes, arguments.hidden)
            options.hidden = None  # what stands there is the default
        self.check(options)
        from cl_dist.benchmarks.report import measured

        return measured(self, options)

    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.options, *COMMON)))

    def _defaults(self) -> dict[str, Any]:
        return {**DEFAULTS, **self.defaults}


def _refuse_both(shapes: str, hidden: object) -> None:
    if hidden is not None:
        raise BadInput(f"--shapes {shapes}: --hidden gives the size already; allowed is one of the two")


def _check_step(options: Namespace) -> None:
    """Widths that make a model, and options that only ranks or only a single process know."""
    _check_ranks(options)
    for hidden in () if options.shapes else options.hidden:
        model_of(hidden, options.intermediate)
    for tokens in options.tokens:
        if tokens < 2:
            raise BadInput(f"--tokens {tokens}: one token has no next one to predict; allowed is 2 or more")
    if options.shapes and options.intermediate:
        raise BadInput(f"--intermediate {options.intermediate}: --shapes gives it already; allowed is one of the two")


def _check_ranks(options: Namespace) -> None:
    if options.processes is None:
        if options.zero_stage is not None:
            raise BadInput(f"--zero-stage {options.zero_stage}: needs ranks; allowed is together with --processes")
        return
    if options.lora is not None:
        raise BadInput(f"--lora {options.lora}: measured in a single process; allowed is without --processes")
    if options.dtype not in RANK_DTYPES:
        raise BadInput(f"--dtype {options.dtype}: not with --processes; allowed is {', '.join(RANK_DTYPES)}")


def _check_importance(options: Namespace) -> None:
    if options.elements is not None and options.hidden is not None:
        raise BadInput("--elements: --hidden gives the size already; allowed is one of the two")


_LAYER_OPTIONS = ("hidden", "shapes", "tokens")
_MODELS = f"A model's shapes: {', '.join(MODELS)}."

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "step",
            "forward, backward and mask of a whole training step, masked against dense",
            "Times forward, backward and mask of a training step on a Llama with random weights, without the\n"
            "optimiser, in three ways: dense (plain fine-tuning), masked (MIGU, whose backward pass skips the masked\n"
            "rows), and reference (hooks keep magnitudes, torch.quantile, gradients multiplied by the mask).\n"
            "Also compares the gradients of the masked way with masking after backward, and measures peak memory.\n"
            "With --processes the ranks train under DeepSpeed, dense and masked, without a reference way: there\n"
            "masked_over_reference and reference_over_dense are null.",
            (*_LAYER_OPTIONS, "threshold", "layers", "intermediate", "lora", "processes", "zero_stage", "memory"),
            {"hidden": (1024,), "tokens": (512,), "threshold": 0.7, "memory": "yes"},
            _check_step,
        ),
        Benchmark(
            "magnitude",
            "output magnitude of every row of a linear layer",
            "Times the row magnitudes of one linear layer's output (per-token L1-normalised, summed over tokens): the\n"
            "kernel, the reference, the shortest chain of torch's own operations, and the layer's own forward product\n"
            f"beside which it runs. {_MODELS}",
            _LAYER_OPTIONS,
            {"hidden": (576, 1024, 4096), "tokens": (512,)},
        ),
        Benchmark(
            "topk",
            "choosing the rows of all layers of a model",
            "Times choosing the kept rows of every layer of a model from their magnitudes: the batched kernel, the\n"
            "reference (torch.quantile, one layer after the other) and torch's own selection (kthvalue).\n"
            f"--hidden takes layers of that many rows, --layers so many of them. {_MODELS}",
            ("hidden", "shapes", "threshold", "layers"),
            {"hidden": (576, 1024, 4096), "threshold": 0.7, "layers": 28},
        ),
        Benchmark(
            "weight-grad",
            "weight gradient of a linear layer, kept rows only",
            "Times the weight gradient of one linear layer: the masked kernel, the dense product, the reference\n"
            f"(dense, then zeroed rows) and torch's own gather, product and scatter. {_MODELS}",
            (*_LAYER_OPTIONS, "threshold"),
            {"hidden": (576, 1024, 4096), "tokens": (512,), "threshold": 0.7},
        ),
        Benchmark(
            "importance",
            "one update of smoothed importance and uncertainty (KIF, TaSL)",
            "Times one update of both states of every element of a parameter: the fused pass, the reference's chain\n"
            "of out-of-place operations, and the best chain of torch's in-place operations with one temporary.\n"
            "Memory is what each allocates besides. The size is --elements, 16Mi by default, or N x N with --hidden N.",
            ("elements", "order"),
            {"order": "mixed"},
            _check_importance,
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

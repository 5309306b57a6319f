"""Keep the libraries' chatter out of a run's output; their warnings about real problems stay."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries(rank: int) -> None:
    """Silence the libraries' progress bars, DeepSpeed's narration and one notice about torch's own API.

    The project's own notices are left to rank 0.
    """
    import datasets
    import transformers

    if rank != 0:
        logging.getLogger("cl_dist").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls a collective under a name that torch is about to retire.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated", category=FutureWarning)

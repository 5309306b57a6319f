"""Keep the libraries' chatter out of a run's output; their warnings about real problems stay."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Silence progress bars of transformers and datasets, DeepSpeed's narration and one notice about torch's own
    API.
    """
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls a collective under a name that torch is about to retire.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated", category=FutureWarning)

"""The run folder: how far the run has come, what an interrupted run resumes from, and who may write there.

| module | what it knows |
|---|---|
| `run_folder` | the path of every file |
| `preflight` | whether a recipe may run in a folder; decided before any model is built |
| `manifest` | which tasks of the stream are done |
| `lock` | one run at a time in a folder |
| `atomic` | writing so that a kill at any moment leaves the old version or the new one |
| `integrity` | checksums, and the errors for damaged and unreadable state |
| `scores` | the scores, in a file that only grows |
| `inputs` | digests and paths of data, base model and tokenizer: a run resumes with the inputs it was started with |
| `digests` | SHA-256 of files, cached between runs |
| `stored_files` | reading config.yaml, metrics.json and the program's other files, or reporting that they are damaged |
| `ledger` | the manifest, the log and the metrics during a run |
| `data_order` | which samples each optimiser step was trained on |
| `spans` | tensors, by parameter name and position, for any number of ranks and any ZeRO stage |
| `snapshot` | the training state of all ranks as spans |
| `collective_failure` | work that fails on all ranks if it fails on one |
| `checkpoints` | when a checkpoint is due, which ones are kept, and which of them a resume can use |
| `elastic` | the same global batch on a different number of ranks |

Only `spans`, `snapshot`, `collective_failure` and `ledger` import torch: the rest is also needed outside training, and
must load quickly.
"""

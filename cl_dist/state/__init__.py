"""The run folder: what is done, the state that an interrupted run goes on from, and who may write there.

| module | what it knows |
|---|---|
| `run_folder` | which file lies where |
| `preflight` | whether a recipe may run in a folder; told before any model is built |
| `manifest` | what of the stream is done |
| `lock` | one run at a time in a folder |
| `atomic` | writing so that a kill at any moment leaves the old or the new version, never half of one |
| `integrity` | checksums, and the error for what fails them |
| `scores` | the scores, in a file that only grows |
| `inputs` | digests of data, base model and tokenizer: a run goes on with what it was started with |
| `places` | where inputs lie as seen from the run folder |
| `digests` | SHA-256 of files, remembered between runs |
| `stored_json` | reading what the program has written, or saying that it is damaged |
| `ledger` | the manifest, the log and the metrics while a run is under way |
| `spans` | tensors, by parameter name and position, for any number of ranks and any ZeRO stage |
| `snapshot` | the training state of all ranks as spans |
| `together` | work that fails on all ranks where it fails on one |
| `schedule` | when a checkpoint inside a task is due |
| `checkpoints` | which saved states are kept, and which of them a resume can use |
| `stored_recipe` | the recipe that a run was started with |
| `elastic` | the same global batch on another number of ranks |

Only `spans`, `snapshot` and `together` import torch: the rest is needed before and beside training, and must load
quickly.
"""

"""The cost of the operations and of the training step: one module per benchmark, run by `cl-dist bench`.

Each module is also a script (`python benchmarks/step.py --hidden 1024`). `command.py` defines the benchmarks and their
options without importing a framework; `harness.py` measures; `report.py` writes tables, JSON and CSV. `gpu/` is
`cl-dist bench gpu`, a day with a GPU in one command; `growth/` is how cost grows with width and tasks. Some scripts are
not part of `cl-dist bench`; `kif_overhead.py`, for example, trains on ranks that torchrun starts.
"""

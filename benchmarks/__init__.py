"""What the operations and the training step cost: one module per benchmark, run by `cl-dist bench`.

Each module is a script too (`python benchmarks/step.py --hidden 1024`). `command.py` knows the options and loads no
framework; `harness.py` measures, `report.py` writes tables, JSON and CSV. `kif_overhead.py` is a script alone: it
trains on the ranks that torchrun starts.
"""

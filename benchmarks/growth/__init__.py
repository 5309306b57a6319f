"""How cost grows: with the model's width (`width.py`), with tasks (`tasks.py`) and with ranks (`ranks.py`).

`scores.py` goes further than real runs can: the pictures and files of hundreds of tasks with made-up scores.
`curves.py` has the CSV files in benchmarks/results and the pictures in docs/results.
"""

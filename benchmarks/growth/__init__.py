"""How the cost of training grows: with the width of the model (`width.py`) and with the number of tasks (`tasks.py`).

`scores.py` goes further than real runs can: the pictures and files of hundreds of tasks with made-up scores.
`curves.py` has the CSV files in benchmarks/results and the pictures in docs/results.
"""

"""One day with a GPU in one command: `cl-dist bench gpu --out DIR --minutes 9`.

`parts.py` lists what is measured, most valuable first. `day.py` runs each part in a process of its own and needs
nothing but Python; `measuring.py` is the part's side of it, where every measurement is written to the part's JSON at
once.
`ceilings.py`, `checks.py`, `operations.py`, `steps.py`, `engines.py` and `runs.py` measure. `findings.py` makes the
tables for the screen and for docs/performance.md, into which `page.py` writes them.
"""

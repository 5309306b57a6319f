"""Tables and pictures from a run folder: reads what a run has left there, trains and loads nothing."""

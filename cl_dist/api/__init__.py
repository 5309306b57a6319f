"""Runs from Python: started and read like values. `import cl_dist` has the names."""

"""Sends what a run reports to trackers of experiments: TensorBoard, Weights & Biases, MLflow. Imports none of them.

`reporter.py` turns reports into values, `feed.py` passes them to a tracker's library without waiting for it, and the
other modules know one library each.
"""

"""KIF and TaSL: skill units, their importance while training, and the fusion of old and new weights after a task."""

from cl_dist.methods.kif.method import Kif
from cl_dist.methods.kif.recurrent import RecurrentKif

__all__ = ["Kif", "RecurrentKif"]

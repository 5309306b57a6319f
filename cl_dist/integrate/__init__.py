"""Brings the methods into training scripts that exist already: plain PyTorch, DDP, DeepSpeed, accelerate, Trainer.

docs/integrate.md has the lines that a script needs, and which method can be used where.
"""

from cl_dist.integrate.session import Session as Session
from cl_dist.integrate.trainer import ContinualCallback as ContinualCallback
from cl_dist.integrate.trainer import continual as continual

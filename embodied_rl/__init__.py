"""One reinforcement-learning engine for robot policies, VLAs and text reasoning."""

__version__ = "0.1.0"

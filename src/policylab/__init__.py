"""PolicyLab: a Lightning + Hydra laboratory for reinforcement learning of language models."""

__version__ = "0.1.0"

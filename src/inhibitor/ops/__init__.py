"""Floor 1, the operator: the equations, the backends, the registration with PyTorch."""

from inhibitor.ops.attention import BackendChoice, inhibitor_attention, which_backend

__all__ = ["BackendChoice", "inhibitor_attention", "which_backend"]

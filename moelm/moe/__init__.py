"""The mixture of experts, in pure PyTorch: routing, dispatch, experts, balancing."""

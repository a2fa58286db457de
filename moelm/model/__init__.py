"""The decoder-only GPT, in pure PyTorch."""

"""Attention over a sequence whose tokens lie on several ranks (context parallelism)."""

"""Edited forward passes, exact and fast: replay, shared prefixes, decoding, activation patching."""

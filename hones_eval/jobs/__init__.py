"""Whole jobs as typed functions: rank, scale, verify, compare, study."""

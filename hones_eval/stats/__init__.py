"""Resampling, paired tests and confidence intervals."""

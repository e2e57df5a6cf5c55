"""Families of runs: what their losses say of the ones to train next."""

"""Shards of tokens to batches of rows. Knows tokens; knows no model."""


class DataError(ValueError):
    """Bad data: a damaged or missing file, shards that do not fit the run. The message names it and says what to do."""

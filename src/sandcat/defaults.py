"""Defaults that the command line shows and Python shares: here, so that --help loads neither torch nor a model."""

BUDGETS = ("bytes=0.9", "bytes=0.8", "bytes=0.7")
CALIBRATION_TOKENS = 32_768
EVALUATION_TEXT = "python-docs"
EVALUATION_TOKENS = 16_384
SWEPT = ("sandcat", "teal", "cats:score=output", "int8", "int8 teal")
"""Recipes of a sweep: the default one, its parts, and int8 without and with skipping."""

"""Defaults that the command line shows and Python shares: here, so that --help loads neither torch nor a model."""

CALIBRATION_TOKENS = 32_768
EVALUATION_TEXT = "python-docs"
EVALUATION_TOKENS = 16_384

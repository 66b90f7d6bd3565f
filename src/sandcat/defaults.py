"""Defaults that the command line shows and Python shares: here, so that --help loads neither torch nor a model."""

BUDGETS = ("sparsity=0.1", "sparsity=0.25", "sparsity=0.4")
"""Of a sweep: relative to what a recipe changes, so that recipes with weights as codes and without can meet them."""
CALIBRATION_TOKENS = 32_768
EVALUATION_TEXT = "python-docs"
EVALUATION_TOKENS = 16_384
SWEPT = ("sandcat", "teal", "cats:score=output", "int8", "int8 teal")
"""Recipes of a sweep: the default one, its parts, and weights as codes without and with skipping."""

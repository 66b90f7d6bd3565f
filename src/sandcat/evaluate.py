"""Quality beside the dense model: the public name of measuring/quality.py."""

from sandcat.measuring.quality import TextResult, evaluate_text

__all__ = ["TextResult", "evaluate_text"]

"""The version of sandcat, which needs nothing imported."""

__version__ = "0.1.0"

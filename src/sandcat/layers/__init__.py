"""Modules that end up inside a sparsified model."""

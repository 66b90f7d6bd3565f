"""A plan inside an engine that brings its own model code and fuses layers: vLLM."""

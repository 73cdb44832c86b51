"""Measuring models: metrics on data, the barrier between two models, and how two models differ."""

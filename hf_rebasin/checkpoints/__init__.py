"""Checkpoints: reading and writing the folders and Hub repositories that hold models."""

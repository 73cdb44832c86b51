"""Tokenizers: which row of a model each token has, read from the files that come with the weights."""

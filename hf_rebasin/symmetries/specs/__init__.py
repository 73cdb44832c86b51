"""Spec files, one per architecture family, as data.

A file defines `MODEL_TYPES` (the model types it describes), `PREFIX`, `sizes(config)`, `table(config)`,
`groups(config)`, `norms(config)` and `TINY`, configurations small enough for the laws in tests/, which pick up every
file here automatically. Rows are written in the language of `hf_rebasin.symmetries.patterns`; CONTRIBUTING.md walks
through an example.

Two held names stand for rows that are numbered outside the weights: `vocab` (by the tokenizer) and `label` (by the
configuration's labels). Alignments do not move them, but if two models order them differently, their rows are matched
by string.
"""

"""One file per architecture family; each is data.

A file says `MODEL_TYPES` (of the configurations it describes), `PREFIX`, `sizes(config)`, `table(config)`,
`groups(config)`, `norms(config)` and `TINY`: configurations small enough for the laws in tests/, which pick up every
file here by themselves. The language is that of `hf_rebasin.symmetries.patterns`; CONTRIBUTING.md walks through one.

Two held names mean rows that are counted by something outside the weights: `vocab` (the tokenizer) and `label`
(the configuration's labels). They never move by themselves, but two models that order them differently can be matched
by their strings.
"""

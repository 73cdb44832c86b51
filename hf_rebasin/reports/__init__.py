"""Reports: the measurements of a merge as tables, charts, a page and a verdict."""

"""`python -m hf_rebasin` is `hf-rebasin`."""

from .cli import main

main()

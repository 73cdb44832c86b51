"""`python -m hf_rebasin` is `hf-rebasin`."""

from .cli.main import main

main()

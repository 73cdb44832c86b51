"""The command line's `merge RECIPE` for `accelerate launch`: every process takes a share, the first one writes.

accelerate launch --multi_gpu --num_processes 2 scripts/merge.py --recipe recipe.yaml -o merged --push-to me/merged

All options are those of `hf-rebasin merge`.
"""

import sys

from hf_rebasin.cli.main import main


def arguments(given: list[str]) -> list[str]:
    """With the recipe where the command line has it."""
    words = [word for one in given for word in (one.split("=", 1) if one.startswith("--recipe=") else [one])]
    return ["merge", *(word for word in words if word != "--recipe")]


if __name__ == "__main__":
    sys.argv[1:] = arguments(sys.argv[1:])
    main()

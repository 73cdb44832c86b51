"""Run `hf-rebasin merge` under `accelerate launch`: each process takes a share, the first one writes.

accelerate launch --multi_gpu --num_processes 2 scripts/merge.py --recipe recipe.yaml -o merged --push-to me/merged

All options are those of `hf-rebasin merge`.
"""

import sys

from hf_rebasin.cli.main import main


def merge_arguments(given: list[str]) -> list[str]:
    """Return the arguments of `hf-rebasin`, with the recipe as a positional one."""
    words = [word for arg in given for word in (arg.split("=", 1) if arg.startswith("--recipe=") else [arg])]
    return ["merge", *(word for word in words if word != "--recipe")]


if __name__ == "__main__":
    sys.argv[1:] = merge_arguments(sys.argv[1:])
    main()

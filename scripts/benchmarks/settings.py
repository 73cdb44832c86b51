"""Which settings of a configuration change what the same weights compute, for many architectures of transformers.

    python scripts/benchmarks/settings.py [ARCHITECTURE ...]

For every setting of a tiny model of each architecture, several values are tried; see `hf_rebasin.alignment.evidence`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import transformers
from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))
from architectures import ARCHITECTURES

from hf_rebasin.alignment.evidence import Evidence, flatten


def main(names: list[str]) -> None:
    matters = free = 0
    with tempfile.TemporaryDirectory() as home:
        constants.HF_HOME = home  # everything is tried anew
        for name in names or ARCHITECTURES:
            kind, settings = ARCHITECTURES[name]
            owner = getattr(transformers, kind)
            content = owner.config_class(**settings).to_dict()
            evidence = Evidence(owner, [content, content], 1000)
            effects = {key: evidence.effect_of(key, value) for key, value in flatten(content).items()}
            counts = [key for key, effect in effects.items() if effect.matters]
            read = [key for key, effect in effects.items() if re.search(r"\bcode\b", effect.why)]
            matters, free = matters + len(counts), free + len(effects) - len(counts)
            print(f"{name} ({kind}): {len(counts)} of {len(effects)} settings must be equal, {len(read)} by its code")
            print("   must be equal:", " ".join(key + "*" * (key in read) for key in counts))
            print("   may differ:   ", " ".join(key for key in effects if key not in counts), flush=True)
    print(f"{len(names or ARCHITECTURES)} architectures: {matters} settings must be equal, {free} may differ")
    print("* no value could be tried; its code reads it")


if __name__ == "__main__":
    main(sys.argv[1:])

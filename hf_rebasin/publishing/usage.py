"""Usage of a model: its task, and a few lines of code to paste that use it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ..checkpoints.cache import cache_file, read_answer, store_answer
from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError

AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
    "image-segmentation": "AutoModelForImageSegmentation",
    "fill-mask": "AutoModelForMaskedLM",
    "object-detection": "AutoModelForObjectDetection",
    "question-answering": "AutoModelForQuestionAnswering",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
EXAMPLE_TEXT = "Two networks that were trained apart."
TOKENIZER_MARKERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
PROCESSOR_MARKERS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Usage:
    """Task of a model and code that uses it.

    Args:
        task: the Hub's name of the task, such as `fill-mask`; empty where it has none.
        code: code that loads the model and runs it.
    """

    task: str
    code: str


def describe_usage(checkpoint: Checkpoint, repository: str, revision: str | None = None) -> Usage:
    """Describe the task of a model and code that uses it from a repository; both empty for an unknown class."""
    facts = _find_facts(checkpoint)
    if facts is None:
        return Usage("", "")
    owner, task, image_lines = facts
    auto = AUTO_CLASSES.get(task, owner)
    at = _quote(repository) + (f", revision={_quote(revision)}" if revision else "")
    shared = [f"model = {auto}.from_pretrained({at})"]
    folder = checkpoint.folder
    has_tokenizer = folder is not None and any(any(folder.glob(name)) for name in TOKENIZER_MARKERS)
    has_processor = folder is not None and any((folder / name).is_file() for name in PROCESSOR_MARKERS)
    if has_tokenizer and "image" not in task:
        lines = [f"tokenizer = AutoTokenizer.from_pretrained({at})"]
        return Usage(task, _join_code(auto, "AutoTokenizer", shared, lines, _text_example(task)))
    if has_processor and task == "image-classification":
        lines = [f"processor = AutoImageProcessor.from_pretrained({at})", *image_lines]
        return Usage(task, _join_code(auto, "AutoImageProcessor", shared, lines, _classification_example()))
    return Usage(task, _join_code(auto, "", shared, [], ["print(model)"]))


def _find_facts(checkpoint: Checkpoint) -> tuple[str, str, list[str]] | None:
    """Return the name of a model's class, its task and code that makes an image for it; None for an unknown class.

    They are remembered by the configuration, as it takes seconds to import transformers.
    """
    file = cache_file("usage", [version("transformers"), dict(checkpoint.written)]) if checkpoint.written else None
    match None if file is None else read_answer(file):
        case [str(owner), str(task), [*lines]]:
            return owner, task, lines
    try:
        config, module_class = checkpoint.config, checkpoint.owner
    except CheckpointError:  # nothing that this transformers can build
        return None
    if config is None or module_class is None:
        return None
    facts = module_class.__name__, find_task(module_class.__name__), _blank_image(config)
    if file is not None:
        store_answer(file, facts)
    return facts


def _quote(text: str) -> str:
    """Write a text as it stands in Python code."""
    return json.dumps(text, ensure_ascii=False)


def find_task(owner: str) -> str:
    """Return the Hub's name of the task of a class; empty where it has none."""
    from transformers.modelcard import TASK_MAPPING

    for task, classes in TASK_MAPPING.items():
        names = [name for value in classes.values() for name in ([value] if isinstance(value, str) else value)]
        if owner in names:
            return str(task)
    return "feature-extraction" if owner.endswith("Model") else ""


def _join_code(auto: str, other: str, *blocks: list[str]) -> str:
    body = [line for block in blocks for line in block]
    imports = ["import torch"] if any("torch." in line for line in body) else []
    imports += ["from PIL import Image"] if any("Image.new" in line for line in body) else []
    names = ", ".join(sorted(filter(None, (auto, other)), key=str.lower))
    return "\n".join([*imports, f"from transformers import {names}", "", *body])


def _text_example(task: str) -> list[str]:
    inputs = f'inputs = tokenizer("{EXAMPLE_TEXT}", return_tensors="pt")'
    if task in ("text-generation", "text2text-generation"):
        return [
            inputs,
            "answer = model.generate(**inputs, max_new_tokens=20)",
            "print(tokenizer.decode(answer[0], skip_special_tokens=True))",
        ]
    statements = {
        "text-classification": "print(model.config.id2label[output.logits.argmax(-1).item()])",
        "fill-mask": "print(tokenizer.decode(output.logits[0].argmax(-1)))",
        "token-classification": "print([model.config.id2label[i] for i in output.logits[0].argmax(-1).tolist()])",
        "feature-extraction": "print(output.last_hidden_state.shape)",
    }
    default = "print({name: value.shape for name, value in output.items() if hasattr(value, 'shape')})"
    return [inputs, "with torch.no_grad():", "    output = model(**inputs)", statements.get(task, default)]


def _blank_image(config: Any) -> list[str]:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size if _is_pair(size) else (224, 224)
    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
    return [f'image = Image.new("{mode}", ({width}, {height}))  # rather one of yours']


def _is_pair(size: Any) -> bool:
    return isinstance(size, (list, tuple)) and len(size) == 2


def _classification_example() -> list[str]:
    return [
        'inputs = processor(image, return_tensors="pt")',
        "with torch.no_grad():",
        "    output = model(**inputs)",
        "print(model.config.id2label[output.logits.argmax(-1).item()])",
    ]

"""What a model is for, and a few lines that use it, to be pasted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checkpoints.checkpoint import Checkpoint

AUTO = {
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
TEXT = "Two networks that were trained apart."
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Usage:
    """What a model is for.

    Args:
        task: as the Hub calls it, such as `fill-mask`; empty where it has no word for it.
        code: that loads the model and asks it something.
    """

    task: str
    code: str


def usage(checkpoint: Checkpoint, repository: str, revision: str | None = None) -> Usage:
    """The task of a model, and code that uses it from a repository; nothing where its class is not known."""
    if checkpoint.config is None or checkpoint.owner is None:
        return Usage("", "")
    owner = checkpoint.owner.__name__
    task = task_of(owner)
    auto = AUTO.get(task, owner)
    at = f'"{repository}"' + (f', revision="{revision}"' if revision else "")
    shared = [f"model = {auto}.from_pretrained({at})"]
    files = checkpoint.folder
    if files is not None and any(any(files.glob(name)) for name in TOKENIZER) and "image" not in task:
        return Usage(
            task,
            _code(auto, "AutoTokenizer", shared, [f"tokenizer = AutoTokenizer.from_pretrained({at})"], _asked(task)),
        )
    if files is not None and any((files / name).is_file() for name in PROCESSOR) and task == "image-classification":
        lines = [f"processor = AutoImageProcessor.from_pretrained({at})", *_image(checkpoint.config)]
        return Usage(task, _code(auto, "AutoImageProcessor", shared, lines, _labelled()))
    return Usage(task, _code(auto, "", shared, [], ["print(model)"]))


def task_of(owner: str) -> str:
    """What the Hub calls that which a class does; empty where it has no word."""
    from transformers.modelcard import TASK_MAPPING

    for task, classes in TASK_MAPPING.items():
        names = [name for value in classes.values() for name in ([value] if isinstance(value, str) else value)]
        if owner in names:
            return str(task)
    return "feature-extraction" if owner.endswith("Model") else ""


def _code(auto: str, other: str, *parts: list[str]) -> str:
    body = [line for part in parts for line in part]
    imports = ["import torch"] if any("torch." in line for line in body) else []
    imports += ["from PIL import Image"] if any("Image.new" in line for line in body) else []
    names = ", ".join(sorted(filter(None, (auto, other)), key=str.lower))
    return "\n".join([*imports, f"from transformers import {names}", "", *body])


def _asked(task: str) -> list[str]:
    inputs = f'inputs = tokenizer("{TEXT}", return_tensors="pt")'
    if task in ("text-generation", "text2text-generation"):
        return [
            inputs,
            "answer = model.generate(**inputs, max_new_tokens=20)",
            "print(tokenizer.decode(answer[0], skip_special_tokens=True))",
        ]
    said = {
        "text-classification": "print(model.config.id2label[output.logits.argmax(-1).item()])",
        "fill-mask": "print(tokenizer.decode(output.logits[0].argmax(-1)))",
        "token-classification": "print([model.config.id2label[i] for i in output.logits[0].argmax(-1).tolist()])",
        "feature-extraction": "print(output.last_hidden_state.shape)",
    }
    shown = said.get(task, "print({name: value.shape for name, value in output.items() if hasattr(value, 'shape')})")
    return [inputs, "with torch.no_grad():", "    output = model(**inputs)", shown]


def _image(config: Any) -> list[str]:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
    return [f'image = Image.new("{mode}", ({width}, {height}))  # rather one of yours']


def _labelled() -> list[str]:
    return [
        'inputs = processor(image, return_tensors="pt")',
        "with torch.no_grad():",
        "    output = model(**inputs)",
        "print(model.config.id2label[output.logits.argmax(-1).item()])",
    ]

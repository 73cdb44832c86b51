"""Chat templates: each writes the format that its models document, and a folder ends with one."""

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from hf_rebasin import Checkpoint
from hf_rebasin.errors import OptionError
from hf_rebasin.tokenizers.chat_template import (
    TEMPLATES,
    read_chat_template,
    resolve_chat_template,
    write_chat_template,
)

SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)

FORMATS = {  # what the models' cards and papers show, without and with a system message, and what asks for an answer
    "alpaca": (
        f"{INTRODUCTION}\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n",
        "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n",
        "### Response:\n",
    ),
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n",
        (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        ),
        "<|im_start|>assistant\n",
    ),
    "exaone": (
        "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n",
        "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n",
        "[|assistant|]",
    ),
    "llama3": (
        (
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        ),
        (
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        ),
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (
        "<s> [INST] Hi [/INST] Hello</s> [INST] Bye [/INST]",
        "<s> [INST] Be kind.\n\nHi [/INST] Hello</s> [INST] Bye [/INST]",
        "",
    ),
}


def render(template, messages, prompt=False):
    (text,), _ = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    return text


def make_model(folder, template=None, **settings):
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Checkpoint({}, folder=folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_documented_formats(name):
    assert FORMATS.keys() == TEMPLATES.keys()
    template = resolve_chat_template(name, [])
    plain, with_system, prompt = FORMATS[name]
    assert render(template, TURNS) == plain
    assert render(template, [SYSTEM, *TURNS]) == with_system
    assert render(template, TURNS, prompt=True) == plain + prompt


@pytest.mark.parametrize(("name", "turns"), [("mistral", TURNS[1:]), ("alpaca", [SYSTEM, SYSTEM])])
def test_conversations_that_a_format_has_no_place_for(name, turns):
    with pytest.raises(Exception, match=r"user and assistant|roles alternate"):
        render(TEMPLATES[name], turns)


def test_own_text_stays_as_it_is():
    text = "{{ messages[0]['content'] }}\n"
    assert resolve_chat_template(text, []) == text


def test_text_with_the_extensions_of_transformers():
    text = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% break %}{% endfor %}"
    assert resolve_chat_template(text, []) == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("chatlm", "did you mean 'chatml'"),
        ("", "known: alpaca, auto, chatml, exaone, llama3, mistral"),
        ("{% for m in messages %}", "line 1 of the Jinja text"),
        ("a\n{{ b", "line 2 of the Jinja text"),
    ],
)
def test_values_that_are_not_templates(value, message):
    with pytest.raises(OptionError, match=message):
        resolve_chat_template(value, [])


def test_auto_takes_the_most_frequent_one(tmp_path):
    models = [
        make_model(tmp_path / "a", chat_template="{{ a }}"),
        make_model(tmp_path / "b", template="{{ b }}\n", chat_template="{{ a }}"),  # the file counts
        make_model(tmp_path / "c", chat_template=[{"name": "default", "template": "{{ b }}"}]),
        make_model(tmp_path / "d", chat_template=[{"name": "rag", "template": "{{ a }}"}]),
        make_model(tmp_path / "e"),
        Checkpoint({}),
    ]
    assert [read_chat_template(model) for model in models] == ["{{ a }}", "{{ b }}", "{{ b }}", None, None, None]
    assert resolve_chat_template("auto", models) == "{{ b }}"
    assert resolve_chat_template("auto", models[:2]) == "{{ a }}"  # of equally many the first
    assert resolve_chat_template("auto", models[3:]) is None


def test_a_folder_ends_with_one_template(tmp_path):
    model = make_model(tmp_path / "a", template="{{ old }}", chat_template="{{ older }}", model_max_length=5)
    (model.folder / "additional_chat_templates").mkdir()
    (model.folder / "additional_chat_templates" / "rag.jinja").write_text("{{ rag }}")
    (model.folder / "chat_template.json").write_text('{"chat_template": "{{ processor }}"}')
    write_chat_template(model.folder, TEMPLATES["chatml"])
    assert sorted(file.name for file in model.folder.iterdir()) == ["chat_template.jinja", "tokenizer_config.json"]
    assert json.loads((model.folder / "tokenizer_config.json").read_text()) == {"model_max_length": 5}
    assert read_chat_template(model) == TEMPLATES["chatml"].strip()


def test_transformers_reads_what_was_written(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = {"default": "{{ old }}", "rag": "{{ rag }}"}
    tokenizer.save_pretrained(tmp_path)
    write_chat_template(tmp_path, TEMPLATES["chatml"])
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.chat_template == TEMPLATES["chatml"]
    assert read.apply_chat_template(TURNS[:1], tokenize=False) == "<|im_start|>user\nHi<|im_end|>\n"

"""Chat templates: how the tokenizer of a merged model writes a conversation as one text.

A template is a Jinja text that transformers renders with the messages of a conversation, the names of the tokenizer's
special tokens, and `add_generation_prompt`, which asks for the beginning of the answer. Those below are written from
the formats as their models document them; they hold what the text needs and nothing else.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.json_files import read_json, update_json, write_utf8
from ..errors import OptionError, nearest, quoted

logger = logging.getLogger(__name__)

AUTO = "auto"  # the template that most of the models have
JINJA, INSIDE = "chat_template.jinja", "chat_template"  # the file of a folder, and the key of an older one's settings
TOKENIZER_CONFIG = "tokenizer_config.json"
# Where transformers has found templates, too: several by name, and those of processors.
OTHER_PLACES = ("additional_chat_templates", "chat_template.json")

# Instructions under a heading each, as in Stanford Alpaca; a system message takes the place of the introduction.
ALPACA = """\
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set introduction, turns = messages[0]['content'] | trim, messages[1:] -%}
{%- else -%}
    {%- set introduction = 'Below is an instruction that describes a task. '
        ~ 'Write a response that appropriately completes the request.' -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- introduction ~ '\\n\\n' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- '### Instruction:\\n' ~ message['content'] | trim ~ '\\n\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '### Response:\\n' ~ message['content'] | trim ~ eos_token ~ '\\n\\n' -}}
    {%- else -%}
        {{- raise_exception('after the first message, roles are user and assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### Response:\\n' -}}
{%- endif -%}
"""

# A line with the role, the text, and the token that ends a turn.
CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# EXAONE 3: a system turn is always there; a user's turn ends with its line, all others with a token of their own.
EXAONE = """\
{%- if not messages or messages[0]['role'] != 'system' -%}
    {{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '[|' ~ message['role'] ~ '|]' ~ message['content'] -}}
    {{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '[|assistant|]' -}}
{%- endif -%}
"""

# Llama 3: the role between two tokens, an empty line, the text, and the token that ends a turn.
LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' -}}
    {{- message['content'] | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# Mistral 7B Instruct 0.2: what the user says in brackets, answers bare; a system message opens the user's first turn.
MISTRAL = """\
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system, turns = messages[0]['content'] | trim ~ '\\n\\n', messages[1:] -%}
{%- else -%}
    {%- set system, turns = '', messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('after a system message, roles alternate: user, assistant, user') -}}
    {%- elif message['role'] == 'user' -%}
        {{- ' [INST] ' ~ (system if loop.first else '') ~ message['content'] | trim ~ ' [/INST]' -}}
    {%- else -%}
        {{- ' ' ~ message['content'] | trim ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML, "exaone": EXAONE, "llama3": LLAMA3, "mistral": MISTRAL}


def resolve_chat_template(value: str, models: Sequence[Checkpoint]) -> str | None:
    """Return the chat template that a recipe asks for, as Jinja text.

    Args:
        value: `alpaca`, `chatml`, `exaone`, `llama3` or `mistral`; a Jinja text, which has a brace in it; or `auto`,
            the one that most of the models have, and of several that equally many have the one named first.
        models: the models that are merged.

    Returns:
        The text; None for `auto` where no model has a template.

    Raises:
        OptionError: it is none of these, or not a Jinja text.
    """
    if value == AUTO:
        templates = [text for text in map(read_chat_template, models) if text is not None]
        return Counter(templates).most_common(1)[0][0] if templates else None
    if value in TEMPLATES:
        return TEMPLATES[value]
    if "{" not in value:
        raise OptionError(
            f"chat_template: {quoted(value)} is not the name of a template, and without a brace not a Jinja text"
            f"{nearest(value, (*TEMPLATES, AUTO))}"
        )
    _refuse_broken(value)
    return value


def _refuse_broken(text: str) -> None:
    """Raise OptionError for a text that Jinja cannot read."""
    try:
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:  # transformers needs neither until a conversation is rendered
        logger.info("the chat template was not checked, as jinja2 is not installed")
        return
    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise OptionError(f"chat_template: line {error.lineno} of the Jinja text: {error.message}") from error
    except ImportError as error:
        logger.info("the chat template was not checked: %s", error)


def read_chat_template(model: Checkpoint) -> str | None:
    """Return the chat template in a model's folder, the one named default of several; None if it has none."""
    if model.folder is None:
        return None
    file = model.folder / JINJA
    if file.is_file():
        template: object = file.read_text(encoding="utf-8")
    else:
        template = read_json(model.folder / TOKENIZER_CONFIG).get(INSIDE)
    if isinstance(template, list):  # as settings have several: {name, template} each
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template.strip() or None if isinstance(template, str) else None


def write_chat_template(folder: Path, template: str) -> None:
    """Write a chat template into a saved folder, as transformers 5 does, and remove every other one there."""
    write_utf8(folder / JINJA, template)
    settings = read_json(folder / TOKENIZER_CONFIG)
    if INSIDE in settings:
        update_json(folder / TOKENIZER_CONFIG, {key: value for key, value in settings.items() if key != INSIDE})
    named, processors = (folder / name for name in OTHER_PLACES)
    shutil.rmtree(named, ignore_errors=True)
    processors.unlink(missing_ok=True)

"""Advice: every recommendation in the output of a command, read without knowing the message, and followed.

A recommendation is an option (`--no-align`), a command (`hf-rebasin merge A B -o OUT`), another tool's command, a call
in Python, a name (`did you mean 'linear'`) or a key of a recipe (`(labels: false)`). Words in
capitals are placeholders.
"""

import ast
import builtins
import inspect
import re
import shlex
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import torch
import transformers
import typer
import yaml
from conftest import ROOT
from published import run_cli

import hf_rebasin
from hf_rebasin.cli.main import VERBS, app
from hf_rebasin.cli.options import recipe_field
from hf_rebasin.data.batches import DataSettings
from hf_rebasin.recipes.recipe import AlignSettings, Recipe

# The names that PEFT documents for merging an adapter into its base model; it is not installed.
PEFT = {"PeftModel", "get_peft_model", "LoraConfig"}
PLANNED = ("merge", "publish")  # verbs that have --dry-run
LONGEST = 5  # pieces of advice that may follow each other until a command is accepted
COMMAND = re.compile(
    rf"(?<![\w/-])(?:hf-rebasin (?:{'|'.join(VERBS)})|git -\w|hf [a-z]+|pip install|python -c|mkdir)(?= )"
)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
CALL = re.compile(r"(?<![\w.'\"/\\-])[A-Za-z_][\w.]*\(")
SETTING = re.compile(r"\(([a-z_]+)(?:: ([^()]+))?\)(?:(?:: | of )([\w-]+))?")
NAME = re.compile(r"did you mean '([^']+)'")
KEYWORD = re.compile(r"(?<![\w.-])([a-z_]+)=(?=[),;. ]|$)", re.MULTILINE)
WORD = re.compile(r"""\s+("[^"]*"|'[^']*'|[^\s"'`),;]+)""")


class BadAdvice(AssertionError):
    """A recommendation that cannot be followed, or that leads to another refusal without a way on."""


@dataclass(frozen=True)
class Attempt:
    """A command, its exit status and everything that it printed."""

    arguments: tuple[str, ...]
    status: int
    output: str

    @property
    def verb(self):
        return self.arguments[0]

    def __str__(self):
        return f"hf-rebasin {shlex.join(self.arguments)}\n{self.output}"


@dataclass(frozen=True)
class Advice:
    """One recommendation: its kind, its text, and the parts of it that are followed."""

    kind: str
    text: str
    parts: tuple = ()


def attempt(arguments, dry=True):
    """Run a command, merges and publications without writing anything unless told otherwise."""
    arguments = tuple(map(str, arguments))
    planning = dry and arguments[0] in PLANNED and "--dry-run" not in arguments
    status, out, err = run_cli(*arguments, *["--dry-run"] * planning)
    assert "Traceback" not in out + err, out + err
    return Attempt(arguments, status, out + err)


# --- reading ---------------------------------------------------------------------------------------------------------


def parameters_of(verb):
    """Return `{option: parameter}` of a verb of the command line, such as `--no-align` of merge."""
    command = typer.main.get_command(app).commands[verb]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    return {name: option for option in options for name in (*option.opts, *option.secondary_opts)}


def read_advice(tried):
    """Return all recommendations in the output of a command."""
    text, advice = tried.output, []
    for cut in (_commands, _calls, _names):
        text, more = cut(text)
        advice += more
    advice += _options(text, tried) + _settings(text) + _keywords(text)
    return list(dict.fromkeys(advice))


def _blanked(text, spans):
    for begin, end in spans:
        text = f"{text[:begin]}{' ' * (end - begin)}{text[end:]}"
    return text


def _end_of_command(text, begin):
    quote, depth = "", 0
    for i in range(begin, len(text)):
        character = text[i]
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif (character == ")" and not depth) or re.match(r"[\n`]| \(|[;,:.](\s|$)", text[i:]):
            return i
        else:
            depth += (character == "(") - (character == ")")
    return len(text)


def _commands(text):
    spans = [(match.start(), _end_of_command(text, match.start())) for match in COMMAND.finditer(text)]
    spans = [span for i, span in enumerate(spans) if i == 0 or span[0] >= spans[i - 1][1]]
    return _blanked(text, spans), [Advice("command", text[begin:end].strip()) for begin, end in spans]


def _calls(text):
    spans = []
    for match in CALL.finditer(text):
        if spans and match.start() < spans[-1][1]:
            continue
        for end in range(match.end(), len(text) + 1):  # the longest expression, with what is called on its value
            if text[end - 1] == ")" and not text.startswith(".", end) and _parses(text[match.start() : end]):
                name = match[0].partition(".")[0].rstrip("(")
                if not hasattr(builtins, name):  # such as ValueError(…) in what another library says
                    spans.append((match.start(), end))
                break
            if text[end - 1] == "\n":
                break
    whole = [Advice("call", text[begin:end], (text,)) for begin, end in spans]
    return _blanked(text, spans), whole


def _parses(expression):
    with suppress(SyntaxError):
        return bool(ast.parse(expression, mode="eval"))
    return False


def _names(text):
    return NAME.sub("", text), [Advice("name", match[0], (match[1],)) for match in NAME.finditer(text)]


def _options(text, tried):
    groups, last = [], -1
    for match in OPTION.finditer(text):
        line = text[text.rfind("\n", 0, match.start()) + 1 : (text + "\n").find("\n", match.end())]
        verb, known = tried.verb, parameters_of(tried.verb)
        if match[0] not in known and re.search(r"\bmerge\b", line):
            verb, known = "merge", parameters_of("merge")
        if match[0] not in known:
            raise BadAdvice(f"{match[0]} is not an option of {tried.verb}, and {line!r} does not speak of merge")
        end, value = match.end(), None
        if not known[match[0]].is_flag:
            word = WORD.match(text, match.end())
            if word is not None:
                end, value = word.end(), shlex.split(word[1])[0].rstrip(".:")
        removed = text[: match.start()].endswith("without ")
        if {*known[match[0]].opts, *known[match[0]].secondary_opts} & set(tried.arguments) and not removed:
            in_brackets = text.rfind("(", 0, match.start()) > text.rfind(")", 0, match.start())
            if value is None or value in tried.arguments or not in_brackets:
                continue  # the message speaks of what was given
        change = (verb, match[0], value, removed)
        if groups and text[last : match.start()] in (" ", " without "):
            groups[-1].append(change)
        else:
            groups.append([change])
        last = end
    return [
        Advice("options", " ".join(f"{name} {value or ''}".strip() for _, name, value, _ in group), tuple(group))
        for group in groups
    ]


def _settings(text):
    keys = Recipe.model_fields.keys() | DataSettings.model_fields.keys()
    return [
        Advice("setting", match[0], (match[1], match[2] or match[3]))
        for match in SETTING.finditer(text)
        if match[1] in keys and (match[2] or match[3] or match[1] == "data")
    ]


def _keywords(text):
    return [Advice("keyword", match[0], (match[1], text)) for match in KEYWORD.finditer(text)]


def _without_options(arguments, key):
    """Return the arguments of a merge without the options that set a key of a recipe, which has it now."""
    inside = {key, *(AlignSettings.model_fields if key == "align" else ())}
    known = {name: option for name, option in parameters_of("merge").items() if recipe_field(option.name) in inside}
    kept, words = [], iter(arguments)
    for word in words:
        if word not in known:
            kept.append(word)
        elif not known[word].is_flag:
            next(words)
    return kept


# --- following -------------------------------------------------------------------------------------------------------


class Follower:
    """Follows the advice of refused commands until one is accepted.

    Args:
        scratch: folder for what the recommended commands write.
        placeholders: `{word in capitals: what stands for it}`.
        dry: whether merges and publications are only planned.
    """

    def __init__(self, scratch: Path, placeholders: Mapping[str, str], dry=True):
        self.scratch, self.placeholders, self.dry, self.made = scratch, placeholders, dry, 0

    def follow(self, tried, earlier=()):
        """Follow every recommendation in the output of a command; return them. BadAdvice names one that fails."""
        advice = read_advice(tried)
        if tried.status and not advice and earlier:
            raise BadAdvice(f"nothing helps any more:\n{tried}")
        if len(earlier) > LONGEST or any(tried.output == other.output for other in earlier if tried.status):
            raise BadAdvice("advice in circles:\n" + "\n".join(map(str, (*earlier, tried))))
        for piece in sorted(advice, key=lambda piece: piece.text.startswith(("mkdir", "python"))):  # they change files
            try:
                again = self._try(piece, tried)
            except BadAdvice as error:
                raise BadAdvice(f"{piece.kind} {piece.text!r}: {error}\nof\n{tried}") from error
            if again is not None and again.status == 2:
                raise BadAdvice(f"{piece.kind} {piece.text!r} of\n{tried}\nis not a command:\n{again}")
            if again is not None and again.status:
                try:
                    self.follow(again, (*earlier, tried))
                except BadAdvice as error:
                    raise BadAdvice(f"{piece.kind} {piece.text!r} of\n{tried}\nfails:\n{error}") from error
        return advice

    def _try(self, piece, tried):
        """Try a recommendation; return the attempt, or None where only its form can be checked."""
        return getattr(self, f"_try_{piece.kind}")(piece, tried)

    def _run(self, arguments):
        return attempt(arguments, self.dry)

    def _new(self, name):
        self.made += 1
        return self.scratch / f"{self.made}-{name}"

    def _fill(self, word, tried):
        """Replace the words in capitals in a part of a command."""
        models = self._models(tried)

        def fill(match):
            word = match[0]
            if word in ("OUT", "ADAPTER"):
                return str(self._new(word.lower()))
            if word in ("A", "B", "OTHER"):
                return models[0 if word == "A" else -1]
            if word == "FOLDER":  # the one that the message names, beside those of the command
                return str(Path(models[-1]).parent / re.search(r"error: (\S+) ", tried.output)[1])
            if word == "MERGE":
                return str(self._merge(tried))
            if word not in self.placeholders:
                raise BadAdvice(f"nobody knows what {word} stands for")
            return self.placeholders[word]

        return re.sub(r"(?<![\w./-])[A-Z]{1,}(?:/[A-Z]+)?(?![\w.-])", fill, word)

    def _models(self, tried):
        """Return the models that a command names, those of its recipe if it has one."""
        known, words, positional = parameters_of(tried.verb), iter(tried.arguments[1:]), []
        for word in words:
            if word.startswith("-"):
                if word in known and not known[word].is_flag:
                    next(words, None)
            else:
                positional.append(word)
        if positional and positional[0].endswith(".yaml"):
            models = yaml.safe_load(Path(positional[0]).read_text())["models"]
            return [model["model"] if isinstance(model, dict) else model for model in models]
        return positional

    def _merge(self, tried):
        """Make the merge that was only planned; return its folder."""
        arguments, out = list(tried.arguments), self._new("merge")
        arguments[arguments.index("-o") + 1] = str(out)
        status, *output = run_cli(*(word for word in arguments if word != "--dry-run"))
        assert status == 0, output
        return out

    def _try_options(self, piece, tried):
        arguments = list(tried.arguments)
        if any(verb != tried.verb for verb, *_ in piece.parts):
            models = self._models(tried)
            arguments = ["merge", *(models * 2)[: max(len(models), 2)], "-o", str(self._new("out"))]
        for verb, name, value, removed in piece.parts:
            option = parameters_of(verb)[name]
            if not option.is_flag and value is None:
                value = name.removeprefix("--").upper()
            given = next((word for word in (*option.opts, *option.secondary_opts) if word in arguments), None)
            if given is not None and (removed or not option.multiple):
                at = arguments.index(given)
                del arguments[at : at + (1 if option.is_flag else 2)]
            if not removed:
                arguments += [name] if option.is_flag else [name, self._fill(value, tried)]
        return self._run(arguments)

    def _try_command(self, piece, tried):
        try:
            words = shlex.split(piece.text)
        except ValueError as error:
            raise BadAdvice(f"the shell cannot read it: {error}") from error
        if words[0] == "hf-rebasin":
            words = [self._fill(word, tried) for word in words[1:]]
            if "-o" in words and not Path(words[words.index("-o") + 1]).is_absolute():
                words[words.index("-o") + 1] = str(self._new("out"))
            return self._run(words)
        return getattr(self, f"_check_{words[0]}")(words, piece, tried)

    def _check_git(self, words, piece, tried):
        if words[:2] != ["git", "-C"] or not Path(words[2]).is_dir() or words[3:] != ["lfs", "pull"]:
            raise BadAdvice("it is not git -C FOLDER lfs pull with a folder that exists")

    def _check_hf(self, words, piece, tried):
        from huggingface_hub.cli.hf import app as hub

        command, words, context = hub, words[1:], None
        try:
            while hasattr(command, "commands"):
                context = command.make_context(command.name, list(words), parent=context)
                _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
            command.make_context(command.name, list(words), parent=context)
        except Exception as error:  # of click, which typer brings along
            raise BadAdvice(f"hf does not take it: {error!r}") from error

    def _check_pip(self, words, piece, tried):
        from packaging.requirements import InvalidRequirement, Requirement

        extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        for word in words[2:]:
            try:
                requirement = Requirement(word)
            except InvalidRequirement as error:
                raise BadAdvice(f"pip cannot read {word!r}: {error}") from error
            if requirement.name == "hf-rebasin" and not requirement.extras <= extras:
                raise BadAdvice(f"hf-rebasin has the extras {extras}")

    def _check_python(self, words, piece, tried):
        try:
            exec(words[2], {})
        except Exception as error:
            raise BadAdvice(f"it fails: {error!r}") from error
        return self._run(tried.arguments)

    def _check_mkdir(self, words, piece, tried):
        self.scratch.mkdir(exist_ok=True, parents=True)
        done = subprocess.run(piece.text, shell=True, capture_output=True, text=True, cwd=self.scratch, check=False)
        if done.returncode:
            raise BadAdvice(done.stderr)
        return self._run(tried.arguments)

    def _try_call(self, piece, tried):
        (message,) = piece.parts
        tree = ast.parse(piece.text, mode="eval").body
        assigned = set(re.findall(r"\b(\w+) = ", message))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        library = {name: getattr(transformers, name) for name in names if hasattr(transformers, name)}
        library |= {"torch": torch, "hf_rebasin": hf_rebasin}
        placeholders = {name for name in names if re.fullmatch("[A-Z]+", name)}
        if isinstance(tree.func, ast.Attribute) and ast.unparse(tree.func).startswith("hf_rebasin."):
            return self._check_own_call(tree)
        if unknown := names - library.keys() - placeholders - assigned - PEFT:
            raise BadAdvice(f"there is no {', '.join(sorted(unknown))}")
        if names & PEFT or placeholders or assigned & names or "pip install" in tried.output:
            return None  # of a library, a model or a version that is not here
        out = self._new("made")
        given = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        try:
            eval(piece.text.replace("'OUT'", repr(str(out))), library)
        except Exception as error:
            raise BadAdvice(f"it fails: {error!r}") from error
        return self._run([str(out) if word in given else word for word in tried.arguments])

    def _check_own_call(self, tree):
        owner = hf_rebasin
        for name in ast.unparse(tree.func).split(".")[1:]:
            if not hasattr(owner, name):
                raise BadAdvice(f"{owner.__name__} has no {name}")
            owner = getattr(owner, name)
        try:
            inspect.signature(owner).bind(*tree.args, **{keyword.arg: None for keyword in tree.keywords})
        except TypeError as error:
            raise BadAdvice(f"{error}") from error

    def _try_keyword(self, piece, tried):
        keyword, message = piece.parts
        public = [getattr(hf_rebasin, name) for name in hf_rebasin.__all__]
        functions = [function for function in public if inspect.isfunction(function)]
        if "in Python" not in message:
            raise BadAdvice("an argument in Python is of no use on the command line, unless the message says so")
        if not any(keyword in inspect.signature(function).parameters for function in functions):
            raise BadAdvice(f"no function takes {keyword}")

    def _try_name(self, piece, tried):
        """Put the name in place of the word that is most like it, in the arguments or in the recipe."""
        (name,) = piece.parts
        texts = list(tried.arguments)
        recipe = next((i for i, word in enumerate(texts) if word.endswith(".yaml")), None)
        if recipe is not None:
            texts.append(Path(texts[recipe]).read_text())
        likeness, place, old = max(
            (SequenceMatcher(None, name, word).ratio(), place, word)
            for place, text in enumerate(texts)
            for word in re.findall(r"[\w.*/-]+", text)
            if word != name
        )
        if likeness < 0.5:
            raise BadAdvice(f"nothing in the command is like {name!r}")
        texts[place] = re.sub(rf"(?<![\w.*/-]){re.escape(old)}(?![\w.*/-])", name, texts[place])
        if recipe is not None:
            texts[recipe] = self._write_recipe(texts.pop())
        return self._run(texts)

    def _write_recipe(self, text):
        self.scratch.mkdir(exist_ok=True, parents=True)
        file = self._new("recipe.yaml")
        file.write_text(text)
        return str(file)

    def _try_setting(self, piece, tried):
        key, value = piece.parts
        value = self.placeholders["DATASET"] if key == "data" and value is None else value
        arguments = list(tried.arguments)
        recipe = next((i for i, word in enumerate(arguments) if word.endswith(".yaml")), None)
        if recipe is not None:
            content = yaml.safe_load(Path(arguments[recipe]).read_text())
            content["data"] = (
                {"dataset": content["data"]} if isinstance(content.get("data"), str) else content.get("data")
            )
            inner = content if key in Recipe.model_fields else content["data"]
            inner[key] = yaml.safe_load(value)
            arguments[recipe] = self._write_recipe(yaml.safe_dump(content))
            return self._run(_without_options(arguments, key))
        if key not in Recipe.model_fields:
            return self._run([*arguments, "-d", f"{key}={value}"])
        known = parameters_of(tried.verb)
        option = next((name for name, option in known.items() if recipe_field(option.name) == key), None)
        if option is None:
            raise BadAdvice(f"{tried.verb} has no option for {key}")
        return self._run([*arguments, option, value])

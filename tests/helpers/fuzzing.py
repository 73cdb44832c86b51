"""Run the command line on broken and hostile inputs, drawn by seed, and check that no harm is done.

A case is a good recipe or folder with one to three named mutations (`mutating.py`), and a command as a user would type
it. In every case, the command has to end in time with status 0, 1 or 2 and a message; no code of the input may run,
and the only thing that may be written is a complete output folder.
"""

import hashlib
import io
import logging
import os
import random
import resource
import shutil
import signal
import stat
import sys
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import mutating_folders  # noqa: F401 (its mutations are in CHECKPOINTS)
import torch
import transformers
from mutating import ALIGNMENTS, CHECKPOINTS, RECIPES
from mutating_recipes import make_recipe_text

from hf_rebasin import Alignment, Checkpoint, spec_for
from hf_rebasin.checkpoints.tensor_files import read_file
from hf_rebasin.cli.main import main
from hf_rebasin.errors import RebasinError

SECONDS = 10
MEMORY = 1 << 30  # bytes that a case may take beyond what the process already has
CHARACTERS = 20_000  # that a case may print
CANARY = "HF_REBASIN_FUZZ_CANARY"
SECRET = "the secret of another program"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e", "f"]
FORMS = {"one": ("5GB", ""), "shards": ("1KB", ""), "pickle": ("5GB", "bin"), "pickles": ("1KB", "bin")}


class TooLong(BaseException):
    """Raised at a time limit; not an Exception, so that it is never handled as an error of the input."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a case; `violations` says what went wrong."""

    mutations: tuple[str, ...]
    command: tuple[str, ...]
    status: int | None
    printed: str
    violations: tuple[str, ...]
    reproduce: str = ""

    def __str__(self):
        lines = [*self.violations, f"mutations: {', '.join(self.mutations)}", f"command: {' '.join(self.command)}"]
        return "\n  ".join([*lines, f"again: {self.reproduce}", f"printed: {self.printed[-2000:]}"])


def build_inputs(folder):
    """Write the good inputs: an alignment, and three models in every form, the third of them for `World.outside`."""
    config = dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=len(WORDS)
    )
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    for seed, name in enumerate(("a", "b", "model")):
        torch.manual_seed(seed)
        model = transformers.BertForMaskedLM(transformers.BertConfig(**config, max_position_embeddings=8))
        for form, (size, suffix) in FORMS.items():
            place = Checkpoint.open(model).save(folder / form / name, max_shard_size=size)
            transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(place)
            (place / "SHA256SUMS").unlink()
            if suffix:
                _pickle(place)
    spec = spec_for(folder / "one" / "b")
    Alignment.random(spec, torch.Generator().manual_seed(0)).save(folder / "alignment.safetensors")
    return folder


def _pickle(folder):
    """Convert a folder's weights to pickles, as old versions stored them."""
    for file in folder.glob("*.safetensors"):
        name = file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save({key: part.read() for key, part in read_file(file).items()}, folder / name)
        file.unlink()
    for index in folder.glob("*.index.json"):
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


class World:
    """A scratch folder: commands run in `work`, `home` is the user's, and `outside` is not theirs to touch."""

    def __init__(self, root, good, form="one"):
        self.root = root.resolve()
        self.work, self.outside, self.home = (self.root / name for name in ("work", "outside", "home"))
        self.canary = self.root / "canary"
        self.home.mkdir(parents=True)
        for name in ("a", "b"):
            shutil.copytree(good / form / name, self.work / name)
        shutil.copytree(good / "one" / "model", self.outside / "model")
        shutil.copy(good / "alignment.safetensors", self.work)
        (self.outside / "secret.txt").write_text(SECRET)
        (self.outside / "config.json").write_text(f'{{"password": "{SECRET}"}}')
        (self.work / "corpus.txt").write_text("a b c d e f\n" * 8)

    def payload(self):
        """Return a shell command that leaves a trace if it is run."""
        return f"echo run >> {self.canary}"

    def snapshot(self):
        """Return `{path: description}` of everything in the folder."""
        return {path: _describe(path) for path in sorted(self.root.rglob("*"))}


def _describe(path):
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "link", os.readlink(path)
    if stat.S_ISREG(mode):
        return "file", stat.S_IMODE(mode), hashlib.sha256(path.read_bytes()).hexdigest()
    return (stat.S_IFMT(mode),)


# --- watching a process ----------------------------------------------------------------------------------------------

WATCHED = {"folder": None, "violations": []}  # audit hooks cannot be removed; this one acts only on a watched folder
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


def _audit(event, arguments):
    folder = WATCHED["folder"]
    if folder is None:
        return
    if event in RUNS:
        WATCHED["violations"].append(f"ran a program: {event} {arguments!r:.200}")
    elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(folder):
        WATCHED["violations"].append(f"ran code of the input: {arguments[0].co_filename}")
    elif event == "os.mkdir" and os.path.isdir(arguments[0]):
        pass  # it exists already
    elif (event == "open" and _writes(arguments)) or event in CHANGES:
        *_, fd = arguments
        at = os.readlink(f"/proc/self/fd/{fd}") if event != "open" and type(fd) is int and fd >= 0 else ""
        for path in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            if isinstance(path, str | bytes | os.PathLike):
                path = os.path.join(at, os.fsdecode(path))
                if not _may_be_written(path, folder):
                    WATCHED["violations"].append(f"{event} of {path}, outside the output folder")


def _writes(arguments):
    _, mode, flags = arguments
    return any(c in mode for c in "wax+") if isinstance(mode, str) else bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


def _may_be_written(path, folder):
    """Whether a path is in the output folder, its temporary siblings, a cache of Python or the Hub, or /dev/null."""
    path = os.path.realpath(path)
    out = os.path.join(folder, "work", "out")
    inside = any(path == own or path.startswith(f"{own}{os.sep}") for own in (out, *map(_sibling, ("partial", "old"))))
    caches = (os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"), "/dev/null")
    foreign = not path.startswith(folder)
    return inside or (foreign and ("__pycache__" in path or path.startswith(tuple(map(os.path.realpath, caches)))))


def _sibling(suffix):
    return os.path.join(WATCHED["folder"] or "", "work", f".out.{suffix}")


@contextmanager
def watch(folder):
    """Collect what this process does meanwhile that a command must not do."""
    if "hooked" not in WATCHED:
        sys.addaudithook(_audit)
        WATCHED["hooked"] = True
    WATCHED["violations"], WATCHED["folder"] = violations, _ = [], str(folder)
    try:
        yield violations
    finally:
        WATCHED["folder"] = None


@contextmanager
def limit(seconds, memory):
    """Limit the time, in seconds, and the additional memory, in bytes, of this process."""

    def stop(*_):
        raise TooLong(f"took more than {seconds} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    timers = {signal.ITIMER_PROF: (signal.SIGPROF, seconds), signal.ITIMER_REAL: (signal.SIGALRM, 6 * seconds)}
    before = {number: signal.signal(number, stop) for number, _ in timers.values()}
    for timer, (_, limit) in timers.items():  # CPU time, and wall time, which is longer on a busy machine
        signal.setitimer(timer, limit)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    try:
        yield
    finally:
        for timer, (number, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def record_tracebacks():
    """Collect log records that have a traceback, whatever their handlers do."""
    found, emit = [], logging.Logger.callHandlers

    def record_and_emit(self, record):
        if record.exc_info and any(record.exc_info):
            found.append(f"a traceback was logged by {record.name}: {record.getMessage()}")
        emit(self, record)

    logging.Logger.callHandlers = record_and_emit
    try:
        yield found
    finally:
        logging.Logger.callHandlers = emit


@contextmanager
def enter(world):
    """Work in a world's folder, with its home."""
    here, home = os.getcwd(), os.environ.get("HOME")
    os.chdir(world.work)
    os.environ["HOME"] = str(world.home)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.pop("HOME") if home is None else os.environ.update(HOME=home)
        os.environ.pop(CANARY, None)


def run(world, command, mutations=(), entry=main, seconds=SECONDS, memory=MEMORY):
    """Run a command in a world, and check everything it did."""
    before, status, violations, printed = world.snapshot(), None, [], io.StringIO()
    argv, sys.argv = sys.argv, ["hf-rebasin", *command]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with (
            enter(world),
            record_tracebacks() as log,
            watch(world.root) as actions,
            redirect_stdout(printed),
            redirect_stderr(printed),
        ):
            try:
                with limit(seconds, memory):
                    entry()
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except (Exception, TooLong) as error:
                violations.append(f"a traceback: {type(error).__name__}: {str(error)[:300]} ({_locate(error)})")
            if CANARY in os.environ:
                violations.append("code of the input ran and set a variable")
    finally:
        sys.argv = argv
    after, text = world.snapshot(), printed.getvalue()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) << 10
    violations += [*actions, *log]
    violations += [f"took {grown >> 20} MB"] * (grown > memory)
    violations += _check_output(status, text)
    violations += _check_files(world, before, after, status, command)
    return Outcome(
        mutations=tuple(mutations),
        command=tuple(command),
        status=status,
        printed=text,
        violations=tuple(violations),
    )


def _locate(error):
    """Return where an error was raised: the last line in the package, and the last line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "hf_rebasin" in frame.filename]
    return ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], frames[-1]))


def _check_output(status, text):
    if "Traceback" in text:
        yield "a traceback was printed"
    if status not in (None, 0, 1, 2):
        yield f"status {status}"
    if status == 1 and "error: " not in text:
        yield "failed without a message"
    if len(text) > CHARACTERS:
        yield f"printed {len(text)} characters"
    if SECRET in text:
        yield "printed the contents of another program's file"
    if odd := sorted({c for c in text if not c.isprintable() and c not in "\n\r\t"}):
        yield f"printed control characters: {odd!r}"


def _check_files(world, before, after, status, command):
    if world.canary in after:
        yield "code of the input ran"
    out = world.work / "out"
    written = {path for path in after if path == out or out in path.parents}
    for path in sorted((before.keys() | after.keys()) - written):
        if before.get(path) != after.get(path):
            yield f"{path.relative_to(world.root)} was {'changed' if path in before and path in after else 'made'}"
    if written and status != 0:
        yield "failed and left the output folder behind"
    leaked = [path for path in written if path.is_file() and SECRET.encode() in path.read_bytes()]
    if leaked:
        yield f"the contents of another program's file were copied to {leaked[0].name}"
    if any(after[path][0] == "link" for path in written):
        yield "a link was written"
    if status == 0 and command[0] in ("merge", "apply") and "--dry-run" not in command:
        yield from _check_tensors(world, out, command) if written else ["succeeded and wrote nothing"]


def _check_tensors(world, out, command):
    """Check that the output has the keys and shapes of the model it is made from."""
    first = world.work / ("b" if command[0] == "apply" else "a")
    try:
        shapes = {key: part.shape for key, part in Checkpoint.open(out).parts.items()}
    except Exception as error:
        yield f"the output cannot be opened: {error}"
        return
    # a recipe decides which model is its first
    possible = (first, world.work / "b", world.outside / "model") if command[1].endswith(".yaml") else (first,)
    expected = [{key: part.shape for key, part in _readable_parts(model)} for model in possible]
    if shapes not in expected:
        yield f"the output has other tensors than its model: {shapes.items() ^ expected[0].items()}"


def _readable_parts(model):
    """Return the tensors of a model; none if it cannot be opened."""
    try:
        return Checkpoint.open(model).parts.items()
    except RebasinError:
        return ()


# --- cases -----------------------------------------------------------------------------------------------------------


def run_case(kind, seed, good, root, entry=main):
    """Make and run the case of a kind (`recipe` or `checkpoint`) with a seed, which determines it."""
    r = random.Random(f"{kind} {seed}")
    make = {"recipe": _recipe_case, "checkpoint": _checkpoint_case}[kind]
    try:
        world, command, mutations = make(r, good, root)
        outcome = run(world, command, mutations, entry)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return Outcome(**{**vars(outcome), "reproduce": f"python scripts/fuzz.py {kind} --seed {seed} --cases 1"})


def _recipe_case(r, good, root):
    world = World(root, good)
    names = r.sample(sorted(RECIPES), r.choice((1, 1, 2, 3)))
    (world.work / "recipe.yaml").write_bytes(make_recipe_text(r, world, [RECIPES[name] for name in names]))
    more = ["--dry-run"] if r.random() < 0.3 else []
    return world, ["merge", "recipe.yaml", "-o", "out", *more], names


def _checkpoint_case(r, good, root):
    form = r.choice(("one", "one", "one", "shards", "shards", "pickle", "pickles"))
    world = World(root, good, form)
    command = list(r.choice(COMMANDS))
    pool = dict(CHECKPOINTS)
    model = world.work / r.choice([name for name in "ab" if name in command])
    if command[0] == "apply" and r.random() < 0.7:
        pool, model = ALIGNMENTS, world.work / "alignment.safetensors"
    names = []
    wanted = r.choice((1, 1, 2, 3))
    for name in r.sample(sorted(pool), len(pool)):
        if len(names) < wanted and _applies(pool[name], r, world, model):
            names.append(name)
    return world, command, names


def _applies(mutation, r, world, model):
    """Apply a mutation; return False if there is nothing (left) that it could change."""
    try:
        return mutation(r, world, model) is not False
    except Exception:  # whatever an earlier mutation has broken
        return False


COMMANDS = (
    *[("merge", "a", "b", "-o", "out", "--no-align")] * 4,
    *[("merge", "a", "b", "-o", "out")] * 2,
    ("merge", "a", "b", "-o", "out", "--groups", "permutation", "--assume", "vocabulary"),
    ("merge", "a", "b", "-o", "out", "--dry-run"),
    ("inspect", "a"),
    ("inspect", "b", "--infer"),
    ("compare", "a", "b"),
    ("check", "b"),
    *[("apply", "alignment.safetensors", "b", "-o", "out")] * 4,
)

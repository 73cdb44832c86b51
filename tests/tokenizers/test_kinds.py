"""Tokenizers of every kind, trained on a few sentences: a merge keeps their files, and matches the rows of others."""

import base64
import json
import random
from pathlib import Path

import pytest
import torch
from conftest import same_tensors
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from hf_rebasin import Checkpoint, merge
from hf_rebasin.alignment.token_axes import find_token_axes
from hf_rebasin.checkpoints.folder import list_tokenizer_files
from hf_rebasin.errors import CheckpointError, MismatchError
from hf_rebasin.symmetries.table import canonical_view
from hf_rebasin.tokenizers.vocabulary import open_tokenizer, same_vocabulary

SENTENCES = (
    "the tide was low this morning and the boats lay on the sand",
    "a lantern burned in the window of the harbour house until noon",
    "nobody had counted the boats, yet everyone knew which was missing",
    "in the evening the tide came back and lifted them one by one",
) * 3
TINY = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
PADDING = 3  # rows beyond the tokens


TRAINED = {}  # equally frequent pieces are chosen by chance, so each kind is trained once


def train(model, trainer, pre_tokenizer=None):
    kind = type(model).__name__, type(pre_tokenizer).__name__
    if kind not in TRAINED:
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()
        tokenizer.train_from_iterator(SENTENCES, trainer)
        TRAINED[kind] = json.loads(tokenizer.to_str())["model"]
    return TRAINED[kind]


def shuffle(tokens, seed):
    """Return tokens in another order unless the seed is 0."""
    tokens = list(tokens)
    if seed:
        random.Random(seed).shuffle(tokens)
    return tokens


def renumber(vocab, seed):
    return {token: number for number, token in enumerate(shuffle(sorted(vocab, key=vocab.__getitem__), seed))}


def save_word_piece(folder, seed):
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    content = train(
        models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=90, special_tokens=special)
    )
    BertTokenizer(vocab=renumber(content["vocab"], seed)).save_pretrained(folder)


def save_vocabulary_file(folder, seed):
    """WordPiece as older versions wrote it: vocab.txt alone."""
    save_word_piece(folder, seed)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in sorted(vocab, key=vocab.__getitem__)))


def save_bpe(folder, seed):
    from transformers import PreTrainedTokenizerFast

    content = train(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"]))
    vocab, merges = renumber(content["vocab"], seed), [tuple(pair) for pair in content["merges"]]
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    tokenizer.add_tokens(shuffle(["<|start|>", "<|end|>", "lighthouse"], seed))
    tokenizer.save_pretrained(folder)


def save_byte_level(folder, seed):
    from transformers import GPT2Tokenizer

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    content = train(models.BPE(), trainer, pre_tokenizers.ByteLevel())
    merges = [tuple(pair) for pair in content["merges"]]
    GPT2Tokenizer(vocab=renumber(content["vocab"], seed), merges=merges).save_pretrained(folder)


def save_unigram(folder, seed):
    from transformers import T5Tokenizer

    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    content = train(models.Unigram(), trainer, pre_tokenizers.Metaspace())
    pieces = [tuple(piece) for piece in content["vocab"]]
    T5Tokenizer(vocab=pieces[:3] + shuffle(pieces[3:], seed), extra_ids=5).save_pretrained(folder)


def save_sentence_piece(folder, seed):
    """A SentencePiece model alone, as the first Llamas had it."""
    import io

    sentencepiece = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=file, vocab_size=60, model_type="bpe", minloglevel=2
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(file.getvalue())
    pieces = [piece.SerializeToString() for piece in model.pieces]
    for piece, content in zip(model.pieces, pieces[:3] + shuffle(pieces[3:], seed), strict=True):
        piece.ParseFromString(content)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))


def save_tekken(folder, seed):
    """Mistral's own format, whose numbers are the ranks of the merges, so that only late ones can change places."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    content = train(models.BPE(), trainer, pre_tokenizers.ByteLevel())
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    merged = [bytes(byte_of[c] for c in left + right) for left, right in content["merges"]]
    tokens = [bytes([byte]) for byte in range(256)] + merged[:-6] + shuffle(merged[-6:], seed)
    special = [
        {"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(("<unk>", "<s>", "</s>", "<pad>"))
    ]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)]
    config = {
        "pattern": r"[^\s]+|\s+",
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) + len(special),
        "default_num_special_tokens": len(special),
        "version": "v3",
    }
    folder.mkdir(exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": special}))


KINDS = {
    "WordPiece": (save_word_piece, "BertForMaskedLM", TINY),
    "WordPiece in vocab.txt": (save_vocabulary_file, "BertForMaskedLM", TINY),
    "BPE with added tokens": (save_bpe, "LlamaForCausalLM", TINY),
    "byte-level BPE": (save_byte_level, "GPT2LMHeadModel", dict(n_embd=16, n_layer=1, n_head=2)),
    "Unigram": (
        save_unigram,
        "T5ForConditionalGeneration",
        dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2),
    ),
    "SentencePiece": (save_sentence_piece, "LlamaForCausalLM", TINY),
    "tekken": (save_tekken, "MistralForCausalLM", TINY | dict(num_key_value_heads=2)),
}


def load_tokens(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).get_vocab()


def make_model(folder, kind, seed=0):
    """Save a tiny model with a tokenizer of this kind next to it."""
    import transformers

    save_tokenizer, name, settings = KINDS[kind]
    save_tokenizer(folder, seed)
    owner = getattr(transformers, name)
    torch.manual_seed(0)
    numbers = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = owner.config_class(vocab_size=len(load_tokens(folder)) + PADDING, **settings, **numbers)
    owner(config).save_pretrained(folder)
    return folder


def reorder_rows(folder, before, after):
    """Return the tensors of a model with the row of every token where another tokenizer numbers it."""
    model = Checkpoint.open(folder)
    axes = find_token_axes(model, model)
    rows = list(range(max(before.values()) + 1 + PADDING))
    for token, row in after.items():
        rows[row] = before[token]
    disk = canonical_view(model).keys
    moved = {disk[name]: axis for name, axis in axes.items() if name in disk}
    assert moved
    return {
        key: tensor.index_select(moved[key], torch.tensor(rows)) if key in moved else tensor
        for key, tensor in model.tensors.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_files_stay_and_rows_are_matched(kind, tmp_path):
    a, b = make_model(tmp_path / "a", kind), make_model(tmp_path / "b", kind, seed=1)
    tokens, other = load_tokens(a), load_tokens(b)
    assert tokens.keys() == other.keys()
    assert sum(tokens[token] != other[token] for token in tokens) > 1
    from safetensors.torch import save_file

    save_file(reorder_rows(a, tokens, other), b / "model.safetensors", {"format": "pt"})
    assert not same_tensors(a, b)
    out = merge([a, b]).save(tmp_path / "out")
    assert same_tensors(out, a)
    assert list_tokenizer_files(out) == list_tokenizer_files(a) != set()
    for name in list_tokenizer_files(a):
        assert (out / name).read_bytes() == (a / name).read_bytes(), name
    assert load_tokens(out) == tokens
    for name in list_tokenizer_files(a) | list_tokenizer_files(b):  # the rows of b, and the tokenizer of a
        (b / name).write_bytes((a / name).read_bytes())
    assert not same_tensors(merge([a, b]), a)


@pytest.mark.parametrize("kind", KINDS)
def test_another_chat_template_is_the_same_vocabulary(kind, tmp_path, monkeypatch):
    """No tokenizer is loaded for that, so that it needs no package."""
    a, b = make_model(tmp_path / "a", kind), make_model(tmp_path / "b", kind)
    file = b / "tokenizer_config.json"
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(settings | {"chat_template": "{{ messages }}", "padding_side": "left"}, indent=7))
    if (b / "tokenizer.json").exists():
        (b / "tokenizer.json").write_text(json.dumps(json.loads((b / "tokenizer.json").read_text()), indent=3))
    monkeypatch.setattr("hf_rebasin.tokenizers.vocabulary.open_tokenizer", None)
    assert same_tensors(merge([a, b]), a)


def test_a_tokenizer_with_code_of_its_own_is_not_run(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit\n")
    with pytest.raises(CheckpointError, match=r"has code of its own, which is not run here$"):
        open_tokenizer(tmp_path)


def test_a_file_that_cannot_be_parsed_is_said(tmp_path):
    """JSON of strangers may be nested deeper than Python can read."""
    for name, content in (("a", "[" * 100_000), ("b", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.json").write_text(content)
    assert not same_vocabulary(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "vocab.json").write_text("{}")
    assert same_vocabulary(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("kind", KINDS)
def test_another_token_is_another_vocabulary(kind, tmp_path):
    from transformers import AutoTokenizer

    a, b = make_model(tmp_path / "a", kind), make_model(tmp_path / "b", kind)
    tokenizer = AutoTokenizer.from_pretrained(b)
    tokenizer.add_tokens(["<|tide|>"])
    tokenizer.save_pretrained(b)
    with pytest.raises(MismatchError, match=r"only .*/b has '<\|tide\|>'\. Say which rows .* --vocabulary first"):
        merge([a, b])
    merged = merge([a, b], vocabulary="first")
    assert same_tensors(merged, a)
    assert list_tokenizer_files(Path(merged.folder)) == list_tokenizer_files(a)

"""Models with other tokens, or other numbers of rows for them: what only one of them has is kept, cut or refused."""

import json
import logging
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from conftest import RandomSolver, same_tensors
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_rebasin import Alignment, Checkpoint, align, compare, merge, spec_for
from hf_rebasin.alignment.rows import find_token_order
from hf_rebasin.alignment.token_axes import find_token_axes
from hf_rebasin.cli.output import describe_comparison
from hf_rebasin.errors import CheckpointError, MismatchError, OptionError
from hf_rebasin.recipes.recipe import Recipe
from hf_rebasin.recipes.runner import run_merge

TOKENS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
ADDED = ("<|start|>", "<|end|>", "<pad>")
SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
LLAMA = dict(num_key_value_heads=2, tie_word_embeddings=False)
EMBEDDING = "model.embed_tokens.weight"


def save_tokens(folder, tokens=TOKENS, added=()):
    words = Tokenizer(models.WordLevel({token: row for row, token in enumerate(tokens)}, unk_token=tokens[0]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token=tokens[0])
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.save_pretrained(folder)


def build(name, rows, seed=0, **settings):
    owner = getattr(transformers, name)
    torch.manual_seed(seed)
    return owner(owner.config_class(vocab_size=rows, **settings))


def save(folder, rows, tokens=TOKENS, added=(), seed=0, name="LlamaForCausalLM", settings=SMALL | LLAMA):
    """Save a random model; with `tokens=None` without a tokenizer."""
    build(name, rows, seed, **settings).save_pretrained(folder)
    if tokens is not None:
        save_tokens(folder, tokens, added)
    return folder


@pytest.fixture
def plain(tmp_path):
    return save(tmp_path / "plain", 64)


@pytest.fixture
def extended(tmp_path):
    return save(tmp_path / "extended", 67, added=ADDED, seed=1)


def loads(checkpoint, folder):
    """Save a merge, and load it with its own class; return the module."""
    out = checkpoint.save(folder)
    config = json.loads((out / "config.json").read_text())
    owner = getattr(transformers, config["architectures"][0])
    module, info = owner.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return module


def mean_of(*tensors):
    return (sum(tensor.double() for tensor in tensors) / len(tensors)).to(tensors[0].dtype)


def follow(message):
    """Return the values of --vocabulary that a refusal recommends."""
    return re.findall(r"--vocabulary (\w+)", message)


def refused(*folders, **options):
    with pytest.raises(MismatchError) as caught:
        merge(list(folders), **options)
    return str(caught.value)


def test_first_keeps_the_rows_of_the_first_model(plain, extended, tmp_path, caplog):
    for first, other, own in ((plain, extended, 0), (extended, plain, 3)):
        message = refused(first, other)
        rows = [len(Checkpoint.open(folder).tensors[EMBEDDING]) for folder in (other, first)]
        assert f"has {rows[0]} rows of tokens" in message
        assert f"has {rows[1]} (lm_head.weight, {EMBEDDING})" in message
        assert f"only {extended} has '<|start|>', '<|end|>', '<pad>'" in message
        assert "config" not in message
        assert "--assume" not in message, "that would end in another refusal"
        assert follow(message) == ["first"]
        with caplog.at_level(logging.INFO, "hf_rebasin"):
            merged = merge([first, other], vocabulary="first")
        assert "64 of its" in caplog.text
        a, b = Checkpoint.open(first).tensors, Checkpoint.open(other).tensors
        for key, tensor in merged.tensors.items():
            assert torch.equal(tensor[:64], mean_of(a[key][:64], b[key][:64])), key
            assert torch.equal(tensor[64:], a[key][64:]), key
        assert len(merged.tensors[EMBEDDING]) == 64 + own
        assert loads(merged, tmp_path / f"out{own}").config.vocab_size == 64 + own


METHODS = {
    "a weight of its own": ("linear", {"weights": [1, 3]}),
    "weights that do not sum to 1": ("linear", {"weights": [0.5, 2.0], "normalize": False}),
    "slerp, whose shares do not sum to 1": ("slerp", {"t": 0.4}),
    "all of the second": ("lerp", {"t": 1.0}),
}


@pytest.mark.parametrize("name", METHODS)
def test_own_rows_are_the_same_with_every_method(name, plain, extended):
    method, parameters = METHODS[name]
    merged = merge([extended, plain], method, vocabulary="first", **parameters)
    own = Checkpoint.open(extended).tensors
    for key in (EMBEDDING, "lm_head.weight"):
        assert torch.equal(merged.tensors[key][64:], own[key][64:])
        assert not torch.equal(merged.tensors[key][:64], own[key][:64])


@pytest.mark.parametrize("groups", ["permutation", "full"])
def test_own_rows_do_not_move_with_the_other_model(groups, extended, tmp_path):
    """A planted alignment is found again without the rows that one model lacks, which must not be moved by it."""
    cut = merge([save(tmp_path / "like", 64), extended], "lerp", t=1.0, vocabulary="first").save(tmp_path / "cut")
    spec = spec_for(cut)
    g = Alignment.random(spec.restricted() if groups == "permutation" else spec, torch.Generator().manual_seed(0))
    moved = g.apply(cut).save(tmp_path / "moved")
    result = run_merge(Recipe.from_dict({"models": [str(extended), str(moved)], "vocabulary": "first"}))
    own = Checkpoint.open(extended).tensors
    for key, tensor in result.checkpoint.tensors.items():
        torch.testing.assert_close(tensor, own[key], atol=1e-6, rtol=0)
        assert key not in (EMBEDDING, "lm_head.weight") or torch.equal(tensor[64:], own[key][64:])
    solution = align(moved, extended, vocabulary="first")
    applied = solution.apply(Checkpoint.open(extended))
    assert applied.parts[EMBEDDING].shape == (67, 16), "the moved model keeps its own rows"


def test_own_rows_stay_however_the_other_model_moves(plain, extended):
    solution = align(extended, plain, solver=RandomSolver(), vocabulary="first")
    from hf_rebasin.alignment.compatibility import match_models
    from hf_rebasin.merging.merge import combine

    first, (other,) = match_models(Checkpoint.open(extended), [Checkpoint.open(plain)], vocabulary="first")
    merged = combine([first, solution.apply(other)], "linear")
    for key in (EMBEDDING, "lm_head.weight"):
        assert torch.equal(merged.tensors[key][64:], first.tensors[key][64:])
        assert not merged.tensors[key][:64].isnan().any()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"vocabulary": "union"}, "vocabulary is 'union'; it may be 'first' or 'common'"),
        ({"assume": ["vocab"]}, "nothing called 'vocab' can be assumed; there are 'config', 'labels', 'vocabulary'"),
    ],
)
def test_words_that_stand_for_nothing_are_refused(plain, extended, options, problem):
    for combine in (merge, lambda models, **options: align(*models, **options)):
        with pytest.raises(OptionError, match=problem):
            combine([plain, extended], **options)


def test_tokens_are_matched_by_string_before_rows_are_kept(plain, tmp_path):
    order = [2, 0, 1, *range(3, 64)]
    other = save(tmp_path / "other", 66, [TOKENS[i] for i in order], ("<x>", "<y>"), seed=1)
    merged = merge([plain, other], vocabulary="first").tensors[EMBEDDING]
    a, b = (Checkpoint.open(folder).tensors[EMBEDDING] for folder in (plain, other))
    assert torch.equal(merged[order], mean_of(a[order], b[:64]))
    assert not torch.equal(merged, mean_of(a, b[:64]))


def test_a_row_is_the_mean_of_the_models_that_have_it(plain, extended, tmp_path):
    third = save(tmp_path / "third", 66, added=("<|end|>", "<x>"), seed=2)
    merged = merge([extended, plain, third], vocabulary="first").tensors[EMBEDDING]
    a, c = (Checkpoint.open(folder).tensors[EMBEDDING] for folder in (extended, third))
    assert torch.equal(merged[64], a[64])
    assert torch.equal(merged[66], a[66]), "<pad>, which only the first has"
    torch.testing.assert_close(merged[65], (2 * a[65] + c[64]) / 3)


def test_padding_is_cut_to_what_all_have(tmp_path):
    a, b = save(tmp_path / "a", 96), save(tmp_path / "b", 80, seed=1)
    message = refused(a, b)
    assert "their tokens are the same" in message
    assert follow(message) == ["first", "common"]
    assert follow(refused(b, a)) == ["first"]
    merged = merge([a, b], vocabulary="common")
    x, y = Checkpoint.open(a).tensors, Checkpoint.open(b).tensors
    assert torch.equal(merged.tensors[EMBEDDING], mean_of(x[EMBEDDING][:80], y[EMBEDDING]))
    assert loads(merged, tmp_path / "common").config.vocab_size == 80
    assert same_tensors(merge([b, a], vocabulary="common"), merge([b, a], vocabulary="first"))
    kept = merge([a, b], vocabulary="first")
    assert torch.equal(kept.tensors[EMBEDDING][80:], x[EMBEDDING][80:])
    assert loads(kept, tmp_path / "first").config.vocab_size == 96
    recipe = Recipe.from_dict({"models": [str(a), str(b)], "vocabulary": "common", "align": False})
    assert same_tensors(run_merge(recipe).checkpoint, merged)


def test_tokens_are_never_cut(plain, extended, tmp_path):
    assert follow(refused(extended, plain, vocabulary="common")) == ["first"]
    assert "its tokenizer has tokens there: '<|start|>'" in refused(extended, plain, vocabulary="common")
    merge([plain, extended], vocabulary="common")
    other = save(tmp_path / "other", 80, [*TOKENS[:-1], "new"])
    message = refused(plain, other, vocabulary="common")
    assert "The result would lack tokens" in message
    assert follow(message) == ["first"]


def test_without_tokenizers_rows_are_matched_by_number_and_not_cut(tmp_path):
    a, b = save(tmp_path / "a", 96, None), save(tmp_path / "b", 80, None, seed=1)
    message = refused(a, b)
    assert "neither comes with a tokenizer" in message
    assert follow(message) == ["first"]
    assert "without a tokenizer that tells padding from tokens" in refused(a, b, vocabulary="common")
    merged = merge([a, b], vocabulary="first").tensors[EMBEDDING]
    x, y = (Checkpoint.open(folder).tensors[EMBEDDING] for folder in (a, b))
    assert torch.equal(merged, torch.cat([mean_of(x[:80], y), x[80:]]))


def test_other_tokenizers_are_called_so(plain, tmp_path):
    other = save(tmp_path / "other", 64, ["<unk>", *(f"q{i}" for i in range(40)), *TOKENS[3:26]])
    message = refused(plain, other)
    assert "two tokenizers, not one with tokens added at its end (24 tokens are in both)" in message
    assert follow(message) == ["first"]
    merged = merge([plain, other], vocabulary="first").tensors[EMBEDDING]
    a, b = (Checkpoint.open(folder).tensors[EMBEDDING] for folder in (plain, other))
    assert torch.equal(merged[26:], a[26:])
    assert torch.equal(merged[3:26], mean_of(a[3:26], b[41:64]))
    strange = save(tmp_path / "strange", 67, [f"q{i}" for i in range(67)])
    assert "no token in common, so they cannot be merged" in refused(plain, strange, vocabulary="first")
    assert not follow(refused(plain, strange))


def test_tokens_without_a_row_do_not_count(plain, tmp_path):
    """A tokenizer may have got a token that the model was never resized for."""
    other = save(tmp_path / "other", 64, added=("[PAD]",), seed=1)
    assert torch.equal(merge([plain, other]).tensors[EMBEDDING][0], merge([other, plain]).tensors[EMBEDDING][0])
    rows = save(tmp_path / "rows", 65, added=("[PAD]",), seed=1)  # the same tokenizer, with a row
    assert f"only {rows} has '[PAD]'" in refused(other, rows)


def test_assumed_vocabularies_are_matched_by_number(plain, tmp_path):
    strange = save(tmp_path / "strange", 70, [f"q{i}" for i in range(64)], seed=1)
    assert follow(refused(plain, strange, assume=["vocabulary"])) == ["first"]
    merged = merge([plain, strange], assume=["vocabulary"], vocabulary="first").tensors[EMBEDDING]
    a, b = (Checkpoint.open(folder).tensors[EMBEDDING] for folder in (plain, strange))
    assert torch.equal(merged, mean_of(a, b[:64]))


BART = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
BART |= dict(encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32)
VISION = dict(SMALL, image_size=8, patch_size=4)
CLASSES = {  # of the second line on without a table
    "BertForMaskedLM": SMALL,
    "BartForConditionalGeneration": BART,
    "GPTJForCausalLM": dict(n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32),
    "AlbertForMaskedLM": dict(SMALL, embedding_size=8),
    "Qwen3MoeForCausalLM": dict(SMALL, head_dim=8, num_experts=2, moe_intermediate_size=8, num_key_value_heads=2),
}


def build_llava(rows, seed):
    text = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=rows)
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)
    torch.manual_seed(seed)
    return transformers.LlavaForConditionalGeneration(config)


CLASS_BUILDERS = {
    name: partial(lambda rows, seed, name, settings: build(name, rows, seed, **settings), name=name, settings=settings)
    for name, settings in CLASSES.items()
}
CLASS_BUILDERS["LlavaForConditionalGeneration"] = build_llava


@pytest.mark.parametrize("name", CLASS_BUILDERS)
def test_all_tensors_with_a_row_for_every_token_change(name, tmp_path):
    """Embeddings, heads and biases, on whatever axis, tied or not; and the configuration that says how many."""
    folders = []
    for rows in (96, 80):
        CLASS_BUILDERS[name](rows, rows).save_pretrained(tmp_path / str(rows))
        save_tokens(tmp_path / str(rows))
        folders.append(tmp_path / str(rows))
    for vocabulary, like in (("first", folders[0]), ("common", folders[1])):
        merged = merge(folders, vocabulary=vocabulary)
        shapes = {key: part.shape for key, part in merged.parts.items()}
        assert shapes == {key: part.shape for key, part in Checkpoint.open(like).parts.items()}
        config = loads(merged, tmp_path / vocabulary).config
        assert config.get_text_config().vocab_size == int(like.name)


def test_no_tensor_of_another_kind_has_rows_of_tokens(tmp_path):
    """A hidden size that equals the number of tokens is not mistaken for it."""
    model = Checkpoint.open(build("GPTJForCausalLM", 16, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=16))
    assert find_token_axes(model, model) == {"wte.weight": 0, "lm_head.weight": 0, "lm_head.bias": 0}


def test_a_number_of_tokens_that_is_the_default_is_written(tmp_path):
    folders = [save(tmp_path / str(rows), rows, seed=rows) for rows in (96, 80)]
    file = folders[0] / "config.json"
    content = json.loads(file.read_text())
    del content["vocab_size"]
    shortened = replace(Checkpoint.open(folders[0]), written=content)
    assert shortened.config.vocab_size == 32000
    from hf_rebasin.alignment.token_axes import with_vocabulary_size

    assert with_vocabulary_size(shortened, 32000, 80).written == content | {"vocab_size": 80}


def test_unknown_classes_go_by_their_configurations(tmp_path):
    folders = []
    for rows in (10, 8):
        tensors = {"tokens.weight": torch.rand(rows, 4), "out.bias": torch.rand(rows), "mix.weight": torch.rand(4, 4)}
        folder = Checkpoint(tensors).save(tmp_path / str(rows))
        (folder / "config.json").write_text(json.dumps({"model_type": "my-own", "vocab_size": rows}))
        folders.append(folder)
    assert follow(refused(*folders)) == ["first"]
    merged, own = merge(folders, vocabulary="first").tensors, Checkpoint.open(folders[0]).tensors
    assert torch.equal(merged["tokens.weight"][8:], own["tokens.weight"][8:])
    assert torch.equal(merged["out.bias"][8:], own["out.bias"][8:])
    save_tokens(folders[0], ["a", "b", "c"])
    save_tokens(folders[1], ["b", "a", "c"])
    (folders[1] / "config.json").write_text((folders[0] / "config.json").read_text())
    Checkpoint({k: t.clone() for k, t in own.items()}).save(tmp_path / "same")
    (tmp_path / "same" / "config.json").write_text((folders[0] / "config.json").read_text())
    save_tokens(tmp_path / "same", ["b", "a", "c"])
    assert "neither a table nor a class says" in refused(folders[0], tmp_path / "same")


def test_modules_are_cut_too(tmp_path):
    a, b = save(tmp_path / "a", 96), save(tmp_path / "b", 80, seed=1)
    modules = [transformers.LlamaForCausalLM.from_pretrained(folder) for folder in (a, b)]
    merged = merge(modules, vocabulary="common")
    assert loads(merged, tmp_path / "out").config.vocab_size == 80
    module = merged.model()
    tokens = torch.arange(10)[None]
    assert module(tokens, labels=tokens).loss.isfinite()
    assert module.get_input_embeddings().num_embeddings == 80
    assert modules[0].config.vocab_size == 96, "the module itself is as it was"


def test_comparing_recommends_what_works(plain, extended, tmp_path):
    comparison = compare(plain, extended)
    assert comparison.vocabulary == "first"
    assert "only" in comparison.findings["tokenizer"]
    lines = "\n".join(describe_comparison(Checkpoint.open(plain), Checkpoint.open(extended), comparison))
    assert "--vocabulary first" in lines
    assert compare(plain, save(tmp_path / "other", 64, seed=1)).vocabulary is None


def test_the_order_of_tokens_tells_which_ids_are_the_same(plain, extended, tmp_path):
    other = save(tmp_path / "other", 64, TOKENS[::-1])
    assert find_token_order(Checkpoint.open(plain), Checkpoint.open(other)) == list(range(64))[::-1]
    assert find_token_order(Checkpoint.open(extended), Checkpoint.open(plain)) == [*range(64), -1, -1, -1]
    assert find_token_order(Checkpoint.open(plain), Checkpoint.open(save(tmp_path / "same", 64))) is None
    settings = dict(SMALL | LLAMA, pad_token_id=3, bos_token_id=1, eos_token_id=2)
    reversed_settings = settings | dict(pad_token_id=60, bos_token_id=62, eos_token_id=61)
    a, b = (
        save(tmp_path / "a", 64, settings=settings),
        save(tmp_path / "b", 64, TOKENS[::-1], settings=reversed_settings),
    )
    merge([a, b])


def test_a_missing_package_is_named_where_it_is_needed(plain, tmp_path, monkeypatch):
    folders = [save(tmp_path / name, 64, None) for name in "ab"]
    for folder, content in zip(folders, (b"one", b"two"), strict=True):
        (folder / "tokenizer.model").write_bytes(content)

    def fail(*_, **__):
        raise ImportError("LlamaTokenizer requires the SentencePiece library")

    monkeypatch.setattr("hf_rebasin.tokenizers.vocabulary.find_spec", lambda name: None if "piece" in name else True)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    message = refused(*folders)
    assert "tokenizer.model, which is read with sentencepiece" in message
    assert "pip install 'hf-rebasin[tokenizers]'" in message
    merge(folders, assume=["vocabulary"])
    (folders[1] / "tokenizer.model").write_bytes(b"one")
    (folders[1] / "chat_template.jinja").write_text("{{ messages }}")
    merge(folders)
    from hf_rebasin.tokenizers.vocabulary import open_tokenizer

    with pytest.raises(CheckpointError, match="cannot be loaded"):  # a tokenizer.json needs no package
        open_tokenizer(plain)

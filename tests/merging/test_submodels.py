"""Sub-folders with weights that modules.json names, such as the Dense of a sentence transformer, belong to a model."""

import json
import shutil

import pytest
import torch
from conftest import FIRST, TINY, other_seed, same_tensors
from published import expect_refusal, run_cli, run_ok, save_parts
from safetensors.torch import load_file, save_file

from hf_rebasin import Alignment, Checkpoint, align, merge, spec_for
from hf_rebasin.checkpoints.folder import read_checksums
from hf_rebasin.checkpoints.provenance import Provenance
from hf_rebasin.checkpoints.tensor_files import sha256_of
from hf_rebasin.errors import CheckpointError, MismatchError, OptionError
from hf_rebasin.merging.methods.distil import distil
from hf_rebasin.merging.methods.refit import refit

BARE = next(name for name in TINY if name.startswith("bert") and type(TINY[name]).__name__ == "BertModel")
DENSE = "2_Dense/model.safetensors"


def write_dense(folder, seed, width=24, name="model.safetensors", path="2_Dense", dtype=torch.float32):
    """Write what sentence-transformers stores of a Dense module, and a modules.json that names it and a pooling."""
    types = {"": "Transformer", "1_Pooling": "Pooling", path: "Dense", "3_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (place, kind) in enumerate(types.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for place, content in (("1_Pooling", {"word_embedding_dimension": width}), (path, {"in_features": width})):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "config.json").write_text(json.dumps(content))
    draw = torch.Generator().manual_seed(seed)
    tensors = {"linear.weight": torch.randn(8, width, generator=draw), "linear.bias": torch.randn(8, generator=draw)}
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    save = save_file if name.endswith(".safetensors") else torch.save
    save(tensors, folder / path / name)
    return folder


def pair_of(model, folder, **options):
    models = (model, other_seed(model))
    return [write_dense(save_parts(folder / f"{i}", each.float()), i, **options) for i, each in enumerate(models)]


@pytest.fixture
def pair(tmp_path):
    """Two models of sentence transformers, a BertModel each."""
    import copy

    return pair_of(copy.deepcopy(TINY[BARE]), tmp_path)


@pytest.fixture
def with_heads(tmp_path):
    """Two models of sentence transformers, with a head that they do not use."""
    import copy

    return pair_of(copy.deepcopy(TINY[FIRST["llama"]]), tmp_path, width=32)


def dense_of(folder):
    return load_file(folder / DENSE)


def mean_of(folders, dtype=torch.float32):
    a, b = (Checkpoint.open(folder).submodels["2_Dense"].tensors for folder in folders)
    return {key: ((a[key].double() + b[key].double()) / 2).to(dtype) for key in a}


def equal(a, b):
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_dense_is_merged_with_its_model(pair, tmp_path, name):
    for seed, folder in enumerate(pair):
        (folder / DENSE).unlink()
        write_dense(folder, seed, name=name)
    out = merge(pair).save(tmp_path / "out")
    assert equal(dense_of(out), mean_of(pair))
    assert not (out / "2_Dense" / "pytorch_model.bin").exists()
    for module in json.loads((out / "modules.json").read_text()):
        assert (out / module["path"]).is_dir()
    assert (out / "2_Dense/config.json").read_bytes() == (pair[0] / "2_Dense/config.json").read_bytes()
    assert dict(read_checksums(out))[DENSE] == sha256_of(out / DENSE)
    assert same_tensors(merge([out, out]).save(tmp_path / "again"), out)
    assert equal(dense_of(tmp_path / "again"), dense_of(out))


def test_a_method_and_its_numbers_are_those_of_the_model(pair, tmp_path):
    a, b = (dense_of(folder) for folder in pair)
    only_dense = merge(pair, "lerp", t=[{"filter": "2_Dense", "value": 1.0}, {"value": 0.0}]).save(tmp_path / "only")
    assert equal(dense_of(only_dense), b)
    assert same_tensors(only_dense, pair[0])
    last = merge(pair, "lerp", t=[0.0, 1.0]).save(tmp_path / "last")  # it comes after the last layer
    assert equal(dense_of(last), b)
    narrow = merge(pair, dtype=torch.bfloat16).save(tmp_path / "narrow")
    assert equal(dense_of(narrow), mean_of(pair, torch.bfloat16))
    kept = merge(pair, backbone_only=True).save(tmp_path / "kept")
    assert equal(dense_of(kept), a)
    assert not same_tensors(kept, pair[0])


def test_values_that_are_not_finite_are_named_by_their_sub_folder(pair, tmp_path):
    save_file(dense_of(pair[1]) | {"linear.bias": torch.full((8,), torch.nan)}, pair[1] / DENSE)
    with pytest.raises(CheckpointError, match=r"1/2_Dense: linear.bias \(8,\) has 8 values that are NaN"):
        merge(pair).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"2_Dense: linear.bias"):
        Checkpoint.open(pair[1]).refuse_broken()
    save_file({"linear.weight": torch.ones(8, 24, dtype=torch.int8)}, pair[1] / DENSE)
    with pytest.raises((CheckpointError, MismatchError), match="2_Dense"):
        merge(pair)


def test_what_cannot_be_merged_is_refused_by_its_name(pair, tmp_path):
    other = shutil.copytree(pair[1], tmp_path / "other")
    shutil.rmtree(other / "2_Dense")
    for models in ((pair[0], other), (other, pair[0])):
        with pytest.raises(MismatchError, match=r"0 has weights of its own in 2_Dense, and .*other has not"):
            merge(models)
        assert "2_Dense" in expect_refusal("merge", *models, "-o", tmp_path / "out", "--no-align", "--dry-run")
        run_ok("merge", *models, "-o", tmp_path / "advised", "--no-align", "--backbone-only", "--overwrite")
    write_dense(other, 1, width=25)
    with pytest.raises(MismatchError, match=r"other/2_Dense cannot be merged into .*0/2_Dense; .*\(8, 25\)"):
        merge([pair[0], other])
    (other / DENSE).rename(other / "2_Dense/weights.pt")
    with pytest.raises(CheckpointError, match=r"2_Dense of .*other, which modules.json names, .*weights.pt"):
        Checkpoint.open(other)
    assert not (tmp_path / "out").exists()


def test_fitting_whole_models_is_refused_and_the_advice_works(pair, tmp_path):
    checkpoints = [Checkpoint.open(folder) for folder in pair]
    data = [{"input_ids": torch.ones(2, 4, dtype=torch.int64)}]
    for fit in (refit, distil):
        with pytest.raises(OptionError, match=r"0 has weights of its own in 2_Dense.*without refit or repair"):
            fit(merge(pair), checkpoints, data)
    with pytest.raises(OptionError, match="2_Dense"):
        merge(pair, "refit", data=data)
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    lines = ("merge", *pair, "-o", tmp_path / "out", "--no-align", "--data", tmp_path / "data.jsonl")
    for more in (("--refit",), ("--recalibrate", "repair")):
        assert "2_Dense" in expect_refusal(*lines, *more, "--dry-run")
    run_ok("merge", *pair, "-o", tmp_path / "out", "--no-align", "--method", "slerp", "--dry-run")


def test_outputs_that_a_dense_reads_stay_where_they_are(pair, tmp_path):
    """An alignment of a bare model holds its outputs, so that a Dense that reads them stays right."""
    run_ok("merge", *pair, "-o", tmp_path / "out")
    assert (tmp_path / "out/rebasin/alignment.safetensors").is_file()
    assert equal(dense_of(tmp_path / "out"), mean_of(pair))
    solution = align(*pair)
    moved = solution.apply(pair[1]).save(tmp_path / "moved")
    assert solution.alignment.moved
    assert equal(dense_of(moved), dense_of(pair[1]))
    ids = torch.arange(8)[None]
    a, b = (Checkpoint.open(folder).model().eval()(ids).last_hidden_state for folder in (moved, pair[1]))
    assert torch.allclose(a, b, atol=1e-5)


def test_modules_that_are_set_otherwise_are_said(pair, tmp_path, caplog):
    """Their outputs are not those of the merge, though all weights match."""
    merge(pair)
    assert not [message for message in caplog.messages if "set otherwise" in message]
    file = pair[1] / "2_Dense" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"activation_function": "torch.nn.modules.linear.Identity"}))
    (pair[1] / "1_Pooling" / "config.json").unlink()  # nothing is known of it
    merge(pair)
    (note,) = [message for message in caplog.messages if "set otherwise" in message]
    assert note.endswith(": 2_Dense/activation_function")


def test_an_alignment_that_would_move_what_a_dense_reads_is_refused(with_heads, tmp_path):
    refused = r"2_Dense of .*1 reads the outputs of its base model, which the alignment would move \(residual\)"
    with pytest.raises(MismatchError, match=refused):
        align(*with_heads)
    alignment = Alignment.random(spec_for(with_heads[1]), torch.Generator().manual_seed(0))
    with pytest.raises(MismatchError, match=refused):
        alignment.apply(with_heads[1])
    merge_both = ("merge", *with_heads, "-o", tmp_path / "out")
    for more in ((), ("--dry-run",)):
        message = expect_refusal(*merge_both, *more)
        assert "(--hold residual), or merge without alignment (--no-align)" in message
    assert not (tmp_path / "out").exists()
    run_ok(*merge_both, "--no-align")
    run_ok(*merge_both, "--hold", "residual", "--overwrite")
    assert equal(dense_of(tmp_path / "out"), mean_of(with_heads))
    for folder in with_heads:
        (folder / "modules.json").unlink()  # without a Dense nothing is refused
    run_ok(*merge_both, "--overwrite")


def test_no_verb_and_no_way_through_python_loses_a_dense(pair, tmp_path):
    run_ok("align", *pair, "-o", tmp_path / "aligned", "--alignment", tmp_path / "g.safetensors")
    run_ok("apply", tmp_path / "g.safetensors", pair[1], "-o", tmp_path / "applied")
    for out in ("aligned", "applied"):
        assert equal(dense_of(tmp_path / out), dense_of(pair[1]))
    modules = [Checkpoint.open(folder).model() for folder in pair]
    classes = [type(module).from_pretrained(folder) for module, folder in zip(modules, pair, strict=True)]
    assert equal(dense_of(merge(classes).save(tmp_path / "modules")), mean_of(pair))
    opened = Checkpoint.open(pair[0])
    bare = Checkpoint(dict(opened.tensors), opened.config, folder=pair[0])
    with pytest.raises(CheckpointError, match=r"no weights for 2_Dense, which .*0 comes with"):
        bare.save(tmp_path / "bare")
    assert not (tmp_path / "bare").exists()


def test_the_record_has_its_hashes_and_rebuilds_it(pair, tmp_path):
    out = tmp_path / "out"
    assert "39 tensors" in (line := run_ok("merge", *pair, "-o", out)), line
    assert ", and 2 in 2_Dense" in line
    record = Provenance.load(out)
    assert record.outputs[DENSE] == sha256_of(out / DENSE)
    assert [entry.files[DENSE] for entry in record.inputs] == [sha256_of(folder / DENSE) for folder in pair]
    where = [f"--model={folder}" for folder in pair]
    assert DENSE in run_ok("verify", out, "--rebuild", *where)
    save_file({key: tensor + 1 for key, tensor in dense_of(out).items()}, out / DENSE)
    status, output, _ = run_cli("verify", out)
    assert status == 1
    assert f"{DENSE} was changed" in output


def test_modules_within_modules_are_merged(pair, tmp_path):
    """A router keeps its modules in folders of its own."""
    for seed, folder in enumerate(pair):
        write_dense(folder, seed, path="2_Router/query_0_Dense")
        modules = json.loads((folder / "modules.json").read_text())
        modules[2]["path"] = "2_Router"
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "2_Router/router_config.json").write_text("{}")
    out = merge(pair).save(tmp_path / "out")
    (path,) = Checkpoint.open(out).submodels
    assert path == "2_Router/query_0_Dense"
    assert (out / "2_Router/router_config.json").is_file()
    assert (out / path / "model.safetensors").is_file()

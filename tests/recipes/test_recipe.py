"""Recipes: all mistakes are reported at once, each with its path and the nearest known name."""

import pytest
import yaml
from conftest import ROOT, other_seed, same_tensors

from hf_rebasin import Checkpoint, RebasinError, Recipe, align, merge
from hf_rebasin.errors import RecipeError
from hf_rebasin.recipes.runner import run_merge


def constants(recipe):
    """Return the parameters of the merge method, in the order in which models are merged."""
    return recipe.resolved_method().constants(len(recipe.models))


GOOD = {"models": ["a", {"model": "b", "parameters": {"weight": 2}}], "merge_method": "linear", "align": {"starts": 1}}


def test_a_recipe_is_what_it_says():
    recipe = Recipe.from_dict(GOOD)
    assert [entry.model for entry in recipe.models] == ["a", "b"]
    assert constants(recipe) == {"weights": [None, 2.0]}, "and linear reads None as 1"
    assert recipe.align.options() == {"starts": 1}
    assert Recipe.from_dict({"models": ["a"], "align": False}).align is None
    assert Recipe.from_dict({"models": ["a"], "align": True}).align.solver == "weight_matching"
    pinned = Recipe.from_dict({"models": ["org/a@v1.0"]}).models[0]
    assert (pinned.model, pinned.revision) == ("org/a", "v1.0")


def test_the_base_comes_first_and_weights_go_along():
    recipe = Recipe.from_dict(GOOD | {"base_model": "b"})
    assert [entry.model for entry in recipe.in_order()] == ["b", "a"]
    assert constants(recipe) == {"weights": [2.0, None]}


def test_a_base_may_be_said_with_or_without_its_revision_and_listed_weights_go_along():
    for base in ("org/b", "org/b@v1"):
        recipe = Recipe.from_dict(
            {"models": ["org/a@v1", "org/b@v1"], "base_model": base, "parameters": {"weights": [3, 1]}}
        )
        assert [entry.model for entry in recipe.in_order()] == ["org/b", "org/a"]
        assert constants(recipe)["weights"] == [1, 3]


MISTAKES = {
    "type": ({"align": {"starts": "many"}}, "align.starts: 'many' does not fit: input should be a valid integer"),
    "seed": ({"align": {"seed": 10**20}}, "align.seed: input should be less than"),
    "merge_metod": ({"merge_metod": "lerp"}, "merge_metod: no such key; did you mean 'merge_method'?"),
    "method": ({"merge_method": "linaer"}, "merge_method: no merge method 'linaer'; did you mean 'linear'?"),
    "parameter": (
        {"parameters": {"normalise": True}},
        "parameters.normalise: no such parameter of linear; did you mean 'normalize'?",
    ),
    "solver": (
        {"align": {"solver": "weight_match"}},
        "align.solver: no solver 'weight_match'; did you mean 'weight_matching'?",
    ),
    "option": ({"align": {"start": 3}}, "align.start: no such parameter; did you mean 'starts'?"),
    "entry": ({"models": ["a", {"model": "b", "modell": "c"}]}, "models.1.modell: no such key; did you mean 'model'?"),
    "weight": (
        {"models": ["a", {"model": "b", "parameters": {"wieght": 1}}]},
        "models.1.parameters.wieght: no such parameter of linear; did you mean 'weight'?",
    ),
    "base": ({"base_model": "c/seed"}, "base_model: 'c/seed' is not one of the models"),
    "dtype": ({"dtype": "float8"}, "dtype: input should be 'float32', 'float16', 'bfloat16' or 'float64'"),
    "assume": (
        {"assume": ["label"]},
        "assume.0: input should be 'config', 'config:KEY' for one setting, 'labels' or 'vocabulary'",
    ),
    "no models": ({"models": []}, "models: name at least one model here, or under slices or modules"),
    "unweighted": (
        {"merge_method": "lerp"},
        "models.1.parameters.weight: lerp takes no weight per model; its parameters are t",
    ),
    "twice": ({"parameters": {"weights": [1, 2]}}, "parameters.weights: given twice, here and with the models"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_mistake_is_one_line(name):
    change, message = MISTAKES[name]
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(GOOD | change)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the recipe has 1 mistake:"
    assert lines[1].strip().startswith(message), lines


def test_all_mistakes_are_said_at_once(tmp_path):
    file = tmp_path / "recipe.yaml"
    names = ("merge_metod", "parameter", "option", "base", "dtype")
    raw = dict(GOOD)
    for name in names:
        raw |= MISTAKES[name][0]
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(RecipeError) as caught:
        Recipe.from_file(file)
    assert str(caught.value).startswith(f"{file} has 5 mistakes:")
    for name in names:
        assert MISTAKES[name][1] in str(caught.value)


def test_files_that_are_not_recipes(tmp_path):
    file = tmp_path / "recipe.yaml"
    for text, message in (("models: [", "cannot be read as YAML"), ("- a", "not a mapping"), ("", "not a mapping")):
        file.write_text(text)
        with pytest.raises(RecipeError, match=message):
            Recipe.from_file(file)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_file(tmp_path / "none.yaml")


def test_yaml_is_read_within_bounds(tmp_path):
    file = tmp_path / "recipe.yaml"
    good = "models: [a, &b {model: b, parameters: {weight: 0.5}}, *b]\nconvention: own\n"
    file.write_bytes(good.encode("utf-16"))
    assert [entry.model for entry in Recipe.from_file(file).models] == ["a", "b", "b"], "aliases are welcome"
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    for text, message in (
        (laughs, r"is larger than a recipe can be: \d+ values .* with all aliases written out"),
        ("a: &a [*a]", "nested deeper than 50 mappings and lists, or contains itself"),
        ("[" * 9000, "nested deeper than 50"),
        ("- " * 9000, "nested deeper than 50"),
        ("models: [a, b]\nmodels: [c, d]", r"the key 'models' occurs twice\s+in .*recipe.yaml\", line 2"),
        ("a: 2001-99-99", r"this is not a valid timestamp \(.*\)\s+in .*line 1, column 4"),
        ("a: " + "9" * 5000, r"this is not a valid int \(5000 digits\)"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("# " + "x" * 100_000, "too long to be a recipe"),
    ):
        file.write_text(text)
        with pytest.raises(RecipeError, match=message):
            Recipe.from_file(file)


def test_the_recipes_we_stand_behind_are_valid():
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    assert files
    for file in files:
        Recipe.from_file(file)
        assert "Expected" in file.read_text()


def test_running_a_recipe_is_aligning_and_merging(bert, tmp_path):
    folders = [Checkpoint.open(other_seed(bert, seed)).save(tmp_path / str(seed)) for seed in (5, 6, 7)]
    done = run_merge(Recipe.from_dict({"models": [str(f) for f in folders], "base_model": str(folders[1])}))
    first, *others = folders[1], folders[0], folders[2]
    by_hand = merge([first, *(align(first, other).apply(other) for other in others)])
    assert same_tensors(done.checkpoint, by_hand)
    assert len(done.solutions) == 2
    plain = run_merge(Recipe.from_dict({"models": [str(f) for f in folders], "align": False}))
    assert same_tensors(plain.checkpoint, merge(folders))
    assert not same_tensors(plain.checkpoint, done.checkpoint)


def test_errors_are_ours_and_builtin():
    from hf_rebasin import errors

    kinds = [
        e
        for e in vars(errors).values()
        if isinstance(e, type) and issubclass(e, RebasinError) and e is not RebasinError
    ]
    assert len(kinds) >= 7
    for kind in kinds:
        assert any(base.__module__ == "builtins" and base not in (Exception, object) for base in kind.__mro__)
        assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "weight_matchin"}, "align: no solver 'weight_matchin'; did you mean 'weight_matching'"),
        ({"steps": 0}, "align: steps = 0; give 1 or more"),
        ({"step": 3}, "align.step: no such parameter; did you mean 'steps'"),
    ],
)
def test_options_of_a_descent_are_checked_before_anything_is_opened(options, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({"models": ["a", "b"], "align": {"solver": "sinkhorn", **options}})


def test_a_base_is_one_of_two_revisions():
    entries = [{"model": "a", "revision": "r1"}, {"model": "a", "revision": "r2"}]
    recipe = Recipe.from_dict({"models": entries, "base_model": "a@r2"})
    assert [entry.revision for entry in recipe.in_order()] == ["r2", "r1"]

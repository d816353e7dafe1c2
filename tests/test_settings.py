"""Recipes, checks of values, and what a notebook's cells may set."""

import dataclasses
import math

import pytest

from sdgen_lib.settings import RECIPES, SOURCES, Settings, followed, from_notebook, protocol, resolve


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "dmeo"}, "Unknown recipe 'dmeo'.*Did you mean 'demo'.*paper"),
        ({"datset": "cifar10"}, "Unknown parameter 'datset'.*Did you mean 'dataset'"),
        ({"ntrials": 3}, "Unknown parameter 'ntrials'.*Did you mean 'n_trials'"),
        ({"given": ("seed",)}, "Unknown parameter 'given'"),
        ({"select_on": "tset"}, "Unknown value for select_on 'tset'.*Did you mean 'test'.*val"),
        ({"sampler": "ddpm"}, "Unknown value for sampler 'ddpm'.*Did you mean 'ddim'"),
        ({"unconditional": "empty"}, "Unknown value for unconditional 'empty'.*'empty_prompt'"),
        ({"precision": "float32"}, "Unknown value for precision"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest_right_one(given, message):
    with pytest.raises(ValueError, match=message):
        resolve(**given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", True), ("seed", -1), ("seed", 2**32), ("seed", 1.0), ("seed", "1"),
        ("n_trials", 0), ("n_trials", -4), ("n_trials", 2.5), ("n_trials", False), ("n_trials", "16"),
        ("image_size", 0), ("image_size", "16"), ("transfer_epochs", 10**10),
        ("guidance_max", -0.1), ("guidance_max", math.nan), ("guidance_max", math.inf), ("guidance_max", "7.5"),
        ("default_guidance", True), ("transfer_learning_rate", -1e-4), ("weight_decay", [0.1]),
        ("pruning", 1), ("pruning", "yes"), ("antialias", 0), ("class_encoder_rank", 0), ("lora_rank", 2.0),
        ("dataset", ""), ("dataset", "  "), ("dataset", 3), ("backbone", ""), ("runs_dir", ""), ("runs_dir", 5),
    ],
)  # fmt: skip
def test_a_wrong_type_or_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be"):
        resolve(**{"recipe": "demo", name: value})


def test_the_edges_of_the_ranges_are_allowed():
    settings = resolve(seed=2**32 - 1, guidance_max=0, weight_decay=0.0, n_trials=1, backbone="tiny")
    assert (settings.seed, settings.weight_decay, settings.n_trials) == (2**32 - 1, 0.0, 1)
    assert settings.guidance_max == 0.0 and isinstance(settings.guidance_max, float)


def test_steps_min_above_steps_max_is_refused():
    with pytest.raises(ValueError, match=r"steps_min \(30\) must not exceed steps_max \(20\)"):
        resolve(recipe="demo", steps_min=30, steps_max=20)
    assert resolve(recipe="demo", steps_min=20, steps_max=20).steps_min == 20


def test_the_paper_recipe_is_the_papers_protocol():
    """Numbers typed from sections 3 and 4 of the paper."""
    s = resolve(recipe="paper", backbone="tiny")
    assert (s.transfer_epochs, s.transfer_batch_size, s.transfer_learning_rate) == (50, 64, 1e-4)
    assert (s.finetune_epochs, s.finetune_batch_size, s.finetune_learning_rate) == (10, 16, 1e-5)
    assert (s.weight_decay, s.clip_norm) == (4e-3, 10.0)
    assert (s.steps_min, s.steps_max, s.guidance_max, s.n_trials, s.num_images) == (5, 50, 7.5, 50, 4000)
    assert (s.classifier_epochs, s.classifier_batch_size, s.classifier_learning_rate) == (100, 256, 1e-3)
    assert (s.label_smoothing, s.plateau_patience, s.stop_patience, s.max_multiple) == (0.1, 10, 25, 10)


def test_the_released_recipe_is_what_the_authors_code_does():
    """The released code's departures from the paper's text, each by name; everything else is the paper's."""
    s, paper = resolve(recipe="released", backbone="tiny"), resolve(recipe="paper", backbone="tiny")
    expected = dict(
        class_encoder_rank=500, class_encoder_tokens=100, unconditional="zero", classifier_width=64,
        classifier_shortcut="max_pool", image_size=None, antialias=False, search_plateau_patience=25,
        search_stop_patience=50, n_trials=50, n_trials_retune=40, pruning=False, class_mix="balanced",
        larger_sets="random", select_on="test",
    )  # fmt: skip
    assert {name: getattr(s, name) for name in expected} == expected
    same = {f.name for f in dataclasses.fields(Settings)} - set(expected) - {"recipe"}
    assert all(getattr(s, name) == getattr(paper, name) for name in same)
    assert (paper.classifier_width, paper.image_size, paper.select_on) == (16, 32, "val")


def test_every_fixed_setting_has_a_source():
    """What a recipe for the paper or its code must name: all but the project's own choices."""
    ours = {
        "dataset", "recipe", "seed", "runs_dir", "storage", "given", "precision", "class_encoder_start", "lora_rank",
        "optimizer", "compile_unet",
        "gradient_checkpointing", "keep_unets", "sample_batch_size", "default_steps", "default_guidance",
        "classifier_epoch_images", "classifier_epoch_limit", "classifier_seeds",
    }  # fmt: skip
    assert set(SOURCES) == {f.name for f in dataclasses.fields(Settings)} - ours
    assert set(RECIPES["released"]) <= set(SOURCES)


def test_a_run_says_what_it_follows_and_where_it_departs():
    whole = len(SOURCES)
    assert followed(resolve(recipe="paper", backbone="sd2")) == f"the paper in {whole} of {whole} settings"
    exact = followed(resolve(recipe="released", backbone="sd1.4"))
    assert exact == f"the released code in {whole} of {whole} settings"
    told = followed(resolve(recipe="paper", backbone="tiny", n_trials=7))
    assert told.startswith(f"the paper in {whole - 2} of {whole} settings; departs")
    assert "backbone tiny (sd2)" in told and "n_trials 7 (50)" in told
    rows = {row["setting"]: row for row in protocol(resolve(recipe="demo", backbone="tiny"))}
    assert rows["n_trials_retune"]["released code"] == 40 and rows["n_trials"]["this run"] == 18
    assert rows["classifier_width"]["source"].startswith("section 4")


@pytest.mark.parametrize(
    "given", [{"unconditional": "empty_prompt"}, {"class_encoder_start": "empty_prompt"},
              {"recipe": "demo", "class_encoder_tokens": 100}, {"recipe": "demo", "class_encoder_rank": 5}],
)  # fmt: skip
def test_the_empty_prompt_fits_one_class_encoder_only(given):
    with pytest.raises(ValueError, match="fits the paper's Class-Encoder alone"):
        resolve(**{"recipe": "released", "backbone": "tiny", **given})


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_recipes_change_the_defaults_and_what_is_given_changes_the_recipe(recipe):
    plain = resolve(recipe=recipe, backbone="tiny")
    for name, value in RECIPES[recipe].items():
        assert getattr(plain, name) == (value if name != "backbone" else "tiny")
    untouched = {f.name for f in dataclasses.fields(Settings)} - set(RECIPES[recipe]) - {"recipe", "given"}
    assert all(getattr(plain, name) == getattr(Settings(), name) for name in untouched)
    changed = resolve(recipe=recipe, backbone="tiny", n_trials=7, seed=3)
    assert dataclasses.replace(plain, n_trials=7, seed=3, given=("n_trials",)) == changed


def test_every_recipe_holds_values_that_could_be_given():
    for values in RECIPES.values():
        given = {name: value for name, value in values.items() if value is not None}
        assert set(resolve(**{"recipe": "paper", "backbone": "tiny", **given}).given) == set(given) - {"backbone"}


def test_none_means_the_recipes_value_and_is_not_given():
    s = resolve(recipe="demo", backbone=None, dataset=None, n_trials=None, num_images=12, seed=None, runs_dir=None)
    assert s.n_trials == RECIPES["demo"]["n_trials"]
    assert (s.num_images, s.dataset, s.seed, s.runs_dir) == (12, "digits", 0, None)
    assert s.given == ("num_images",)  # the shared five name the folder, so they cannot disagree with it


def test_auto_follows_the_machine(monkeypatch):
    import torch

    for gpu, expected in ((False, ("demo", "tiny")), (True, ("workshop", "sd2"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        found = resolve(recipe="auto", backbone="auto")
        assert (found.recipe, found.backbone) == expected
        assert resolve(recipe=None, backbone=None) == found
        assert resolve(recipe="paper", backbone="auto").backbone == expected[1]
        assert resolve(recipe="released", backbone="auto").backbone == ("sd1.4" if gpu else "tiny")


def test_settings_are_frozen_and_turn_into_plain_values():
    s = resolve(recipe="demo", backbone="tiny")
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.seed = 4
    assert Settings(**s.to_dict()) == s


# --- notebooks ---

CELL = 'dataset = "digits"\nbackbone = "tiny"\nrecipe = "demo"\nseed = 0\nruns_dir = None\nn_trials = None'


def notebook(*cells):
    """The namespace after these cells have run, with the ``In`` that IPython keeps."""
    namespace = {}
    for cell in cells:
        if not cell.startswith("%"):
            exec(cell, namespace)
    return {**namespace, "In": ["", *cells]}


def test_the_parameters_cell_alone():
    assert from_notebook(notebook("import os", CELL)) == resolve(recipe="demo", backbone="tiny")


def test_injected_parameters_override():
    found = from_notebook(notebook(CELL, '# Parameters\ndataset = "digits:50"\nn_trials = 4\nnum_images = 20\n'))
    assert found == resolve(recipe="demo", backbone="tiny", dataset="digits:50", n_trials=4, num_images=20)
    assert found.given == ("n_trials", "num_images")


def test_a_misspelt_injected_parameter_stops_with_the_nearest_name():
    with pytest.raises(ValueError, match="Unknown parameter 'datset'.*Did you mean 'dataset'"):
        from_notebook(notebook(CELL, '# Parameters\ndatset = "pathmnist"\n'))


def test_a_misspelt_name_in_the_parameters_cell_stops_too():
    with pytest.raises(ValueError, match="Unknown parameter 'n_trails'.*Did you mean 'n_trials'"):
        from_notebook(notebook(CELL.replace("n_trials", "n_trails")))


def test_a_magic_between_the_cells_is_skipped():
    found = from_notebook(notebook("%matplotlib inline", CELL, "%pip install x", "# Parameters\nseed = 7\n"))
    assert found.seed == 7
    with pytest.raises(ValueError, match="'datset'"):
        from_notebook(notebook(CELL, "%load_ext autoreload", '# Parameters\ndatset = "x"\n'))


def test_names_of_other_cells_are_no_parameters():
    later = "history = 3\nnum_images = 11\nimages, labels = 1, 2\nclassifier_width = 'not a width'"
    found = from_notebook(notebook("width = 3", CELL, later, "x = 1"))
    assert found == resolve(recipe="demo", backbone="tiny")  # a chapter's own num_images is not taken for the setting


def test_a_rerun_of_the_parameters_cell_counts_from_there():
    first = CELL + '\nnum_images = 9\n'
    found = from_notebook(notebook(first, "# Parameters\nnum_images = 5\n", "trials = 2", CELL, "y = 2"))
    assert found == resolve(recipe="demo", backbone="tiny")


def test_an_edited_parameters_cell_takes_its_new_values():
    found = from_notebook(notebook(CELL, "x = 1", CELL.replace("seed = 0", "seed = 5")))
    assert found.seed == 5


def test_a_wrong_value_of_the_parameters_cell_is_refused():
    with pytest.raises(ValueError, match="seed must be"):
        from_notebook(notebook(CELL.replace("seed = 0", "seed = -1")))


def test_a_plain_script_without_cells_gives_its_globals():
    given = {"dataset": "digits:20", "seed": 2, "backbone": "tiny", "recipe": "demo"}
    assert from_notebook({**given, "other": 1}) == resolve(**given)

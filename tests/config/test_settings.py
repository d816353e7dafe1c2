"""The settings' declaration, the recipes, checks of values, and what a step may read of them."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given as with_any
from hypothesis import settings as how_many
from hypothesis import strategies as st

from sdgen_lib.config import messages
from sdgen_lib.config.messages import shown, unknown_name
from sdgen_lib.config.recipes import RECIPES
from sdgen_lib.config.settings import FIELDS, SHARED, TOPICS, Settings, fields_read_by, followed, protocol, resolve

HUGE = 10**5000  # more digits than Python prints

# --- the declaration ---


def test_every_field_has_topics_and_a_doc():
    for name, field in FIELDS.items():
        assert field.metadata["read_by"] and set(field.metadata["read_by"]) <= set(TOPICS), name
        doc = field.metadata["doc"]
        assert doc and len(doc) <= 100 and doc == doc.strip() and not doc.endswith("."), name
    used = {topic for field in FIELDS.values() for topic in field.metadata["read_by"]}
    assert used == set(TOPICS)


@pytest.mark.parametrize("name", sorted(set(FIELDS) - {"given"}))
def test_every_field_says_what_it_may_be(name):
    """Numbers a range that holds the default, texts their choices or a word for them, switches nothing."""
    field = FIELDS[name]
    kind, known = field.type.removesuffix(" | None"), field.metadata
    has = {key for key in ("low", "high", "choices", "what") if known[key] is not None}
    if kind in ("int", "float"):
        assert has == {"low", "high"} and known["low"] < known["high"]
        assert {type(known["low"]), type(known["high"])} == {{"int": int, "float": float}[kind]}
        assert field.default is None or known["low"] <= field.default <= known["high"]
    elif kind == "str":
        assert has in ({"choices"}, {"what"})
        assert "choices" not in has or field.default in known["choices"]
    else:
        assert kind == "bool" and not has and isinstance(field.default, bool)
    assert field.default is not None or field.type.endswith(" | None")


def test_recipes_name_fields_alone():
    for values in RECIPES.values():
        assert set(values) <= set(FIELDS) - {"recipe", "given", "seed", "runs_dir", "storage"}
    assert set(SHARED) < set(FIELDS)


def test_every_recipe_holds_values_that_could_be_given():
    for values in RECIPES.values():
        given = {name: "none" if value is None else value for name, value in values.items()}
        found = resolve(**{"recipe": "paper", "backbone": "tiny", **given})
        assert {name: getattr(found, name) for name in values} == values
        assert set(found.given) == set(given) - {"backbone"}


def test_every_setting_but_the_projects_own_has_a_source():
    """What a recipe for the paper or its code must name: all but the project's own choices."""
    ours = {
        *("dataset", "recipe", "seed", "runs_dir", "storage", "given", "precision", "class_encoder_start", "lora_rank"),
        *("optimizer", "compile_unet", "gradient_checkpointing", "keep_unets", "sample_batch_size", "default_steps"),
        *("default_guidance", "classifier_epoch_images", "classifier_epoch_limit", "classifier_seeds"),
        "classifier_val_images",
        *("rescoring_classifiers", "rescoring_images", "inversion_study", "augmented_study", "augmented_others"),
        *("worth_generator", "worth_steps", "worth_guidance", "worth_images", "worth_multiple", "mixing_study"),
        "shifted_to",
    }
    assert {name for name, field in FIELDS.items() if field.metadata["source"]} == set(FIELDS) - ours
    assert not set(RECIPES["released"]) & ours


# --- topics and views ---

OF_TOPICS = {
    "data": {
        *("dataset", "image_size", "inversion_images"),
        *("augmented_images", "augmented_tail_factor", "augmented_tail_largest", "worth_images", "shifted_to"),
    },
    "model": {"backbone"},
    "precision": {"precision"},
    "seed": {"seed"},
    "class_encoder": {"class_encoder_rank", "class_encoder_tokens", "class_encoder_start"},
    "transfer": {"transfer_epochs", "transfer_epoch_images", "transfer_batch_size", "transfer_learning_rate"},
    "finetune": {
        *("finetune_epochs", "finetune_batch_size", "finetune_learning_rate"),
        *("finetune_epoch_images", "finetune_encoder_learning_rate", "finetune_method", "lora_rank"),
    },
    "training": {"weight_decay", "clip_norm", "optimizer", "label_dropout"},
    "sampling": {"unconditional", "sampler", "antialias"},
    "inversion": {
        *("inversion_tokens", "inversion_start", "inversion_groups", "inversion_group_images", "inversion_visits"),
        *("inversion_checkpoints", "inversion_batch_size", "inversion_optimizer", "inversion_learning_rate"),
        *("inversion_schedule", "inversion_weight_decay"),
    },
    "variants": {
        *("inversion_steps", "inversion_guidance", "inversion_unconditional", "inversion_noise"),
        *("inversion_noise_unit", "inversion_interpolation", "inversion_partners"),
    },
    "augmented": {
        *("augmented_conditioning", "augmented_protocol", "augmented_dropout", "augmented_noise_level"),
        *("augmented_strength", "augmented_text", "augmented_prompt", "augmented_steps", "augmented_guidance"),
    },
    "default_point": {"default_steps", "default_guidance"},
    "search_space": {"steps_min", "steps_max", "guidance_min", "guidance_max"},
    "search": {
        *("n_trials", "pruning", "select_on", "num_images", "rescored", "rescoring_classifiers"),
        *("search_plateau_patience", "search_stop_patience", "rescoring_images"),
    },
    "retune": {
        *("n_trials", "n_trials_retune", "pruning", "select_on", "num_images"),
        *("incumbent_first", "rescored", "rescoring_classifiers", "rescoring_images"),
        *("search_plateau_patience", "search_stop_patience"),
    },
    "cas": {"num_images"},
    "classifier": {
        *("classifier_width", "classifier_shortcut", "classifier_epochs", "classifier_batch_size"),
        *("classifier_learning_rate", "label_smoothing", "plateau_patience", "stop_patience"),
        *("classifier_epoch_images", "classifier_epoch_limit", "classifier_val_images"),
    },
    "table": {"classifier_seeds"},
    "set": {"class_mix"},
    "larger_sets": {"larger_sets", "max_multiple"},
    "how": {
        *("runs_dir", "storage", "recipe", "sample_batch_size", "compile_unet", "gradient_checkpointing"),
        *("keep_unets", "given", "inversion_study", "augmented_study", "augmented_others", "augmented_backbone"),
        *("worth_generator", "worth_steps", "worth_guidance", "worth_multiple", "mixing_study"),
    },
}


def test_a_topics_fields():
    assert {topic: set(fields_read_by(topic)) for topic in TOPICS} == OF_TOPICS
    assert fields_read_by("seed", "cas", "search") == tuple(sorted(OF_TOPICS["search"] | {"seed"}))
    assert fields_read_by() == ()
    with pytest.raises(ValueError, match="Unknown topic 'serach'. Did you mean 'search'"):
        fields_read_by("seed", "serach")


def test_a_view_shows_what_was_declared_and_nothing_else():
    settings = resolve(recipe="demo", backbone="tiny", seed=3)
    view = settings.view("seed", "search_space")
    expected = {"guidance_max": 3.0, "guidance_min": 1.0, "seed": 3, "steps_max": 12, "steps_min": 8}
    assert view.to_dict() == expected and list(view.to_dict()) == sorted(expected)
    assert (view.seed, view.steps_max) == (3, 12)
    with pytest.raises(AttributeError, match=r"reads num_images must .* its topics \(search, retune, cas\)"):
        view.num_images  # noqa: B018
    with pytest.raises(AttributeError, match="no setting 'sede'"):
        view.sede  # noqa: B018
    with pytest.raises(AttributeError, match="read-only"):
        view.seed = 4
    assert view.seed == 3 and not hasattr(view, "storage")
    with pytest.raises(ValueError, match="Unknown topic 'sede'"):
        settings.view("sede")


def test_all_topics_together_show_every_field():
    settings = resolve(recipe="workshop", backbone="tiny", storage="sqlite:///s.db")
    view = settings.view(*TOPICS)
    assert all(getattr(view, name) == getattr(settings, name) for name in FIELDS)
    assert view.to_dict() == settings.to_dict()


def test_a_password_is_in_no_record():
    settings = resolve(recipe="demo", backbone="tiny", storage="postgresql://me:secret@host/db")
    view = settings.view("how")
    assert "secret" in settings.storage == view.storage
    assert "secret" not in f"{settings.to_dict()} {view.to_dict()} {view!r}"


# --- checks of values ---


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


# A row: a parameter, and values that it may not have.
WRONG = [
    ("seed", [True, -1, 2**32, 1.0, 1e3, "1", HUGE, -HUGE, [0], [HUGE], np.array([1, 2])]),
    ("n_trials", [0, -4, 2.5, False, "16", HUGE, math.inf, {}, "none"]),
    ("num_images", [10**9, -5]),
    ("image_size", [0, 4, "16", 10**6, 32.0, "nothing", ""]),
    ("transfer_epochs", [2.0, 10**10]),
    ("transfer_batch_size", [0]),
    ("steps_max", [1001]),
    ("steps_min", [0]),
    ("default_steps", [10**6]),
    ("guidance_max", [-0.1, 1e9, math.nan, math.inf, -math.inf, "7.5", "7,5", HUGE]),
    ("default_guidance", [True]),
    ("transfer_learning_rate", [-1e-4, 0.0, 1e6]),
    ("finetune_learning_rate", [math.nan]),
    ("weight_decay", [[0.1], -1.0]),
    ("clip_norm", [0.0]),
    ("label_smoothing", [1.5, "none"]),
    ("pruning", [1, "yes", "none"]),
    ("antialias", [0]),
    ("class_encoder_rank", [0]),
    ("lora_rank", [2.0]),
    ("classifier_width", [10**5]),
    ("classifier_seeds", [10**6]),
    ("max_multiple", [0, 1e1]),
    ("dataset", ["", "  ", 3, "a\0b", "\x1b[31mred", ["digits"], "x" * 10**6]),
    ("backbone", ["", ["tiny"], "\ud800"]),
    ("runs_dir", ["", 5, "a\0b", "a\nb", b"runs", "x" * 5000]),
    ("storage", ["", 5]),
    ("recipe", [["demo"], {"demo": 1}, 3, "x" * 10**6, np.array(["demo", "demo"])]),
    ("sampler", [["ddim"], np.array(["ddim", "ddim"]), "none"]),
    ("select_on", [None.__class__]),
    ("precision", [16]),
    ("unconditional", ["zero\n"]),
]
WRONG = [(name, value) for name, values in WRONG for value in values]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=shown)
def test_a_wrong_type_or_range_is_refused_in_one_line(name, value):
    expected = rf"^({name} must be .*, not .*|Unknown (value for )?{name} .*Allowed: )."
    with pytest.raises(ValueError, match=expected) as error:
        resolve(**{"recipe": "demo", "backbone": "tiny", name: value})
    assert "\n" not in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["sede", "SEED", "__class__", "given", "x" * 10**5, "n_trials "])
def test_a_parameter_that_is_none(name):
    with pytest.raises(ValueError, match="^Unknown parameter .*Allowed: .*seed") as error:
        resolve(**{name: 1})
    every_name = sum(len(field) + 2 for field in FIELDS)
    assert "\n" not in str(error.value) and len(str(error.value)) < every_name + 300


anything = st.one_of(
    *(st.integers(), st.floats(), st.booleans(), st.text(max_size=20), st.binary(max_size=4)),
    *(st.lists(st.integers(), max_size=2), st.just(HUGE), st.sampled_from(["none", "None", "auto", "val", "ddim"])),
)


@how_many(max_examples=300, deadline=None, database=None, derandomize=True)
@with_any(name=st.sampled_from(sorted(set(FIELDS) - {"given", "recipe", "backbone"})), value=anything)
def test_any_value_is_taken_as_its_type_or_refused_in_one_line(name, value):
    try:
        found = getattr(resolve(recipe="paper", backbone="tiny", **{name: value}), name)
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error) and len(str(error)) < 400
        return
    kinds = {"int": int, "float": float, "bool": bool, "str": str}
    field = FIELDS[name]
    if found is None:
        assert field.type.endswith("None") and str(value).strip().lower() == "none"
    else:
        assert type(found) is kinds[field.type.removesuffix(" | None")] and found == value
        assert field.metadata["low"] is None or field.metadata["low"] <= found <= field.metadata["high"]


def test_the_edges_of_the_ranges_are_allowed():
    settings = resolve(seed=2**32 - 1, guidance_min=0, guidance_max=0, weight_decay=0.0, n_trials=1, backbone="tiny")
    assert (settings.seed, settings.weight_decay, settings.n_trials) == (2**32 - 1, 0.0, 1)
    assert settings.guidance_max == 0.0 and isinstance(settings.guidance_max, float)


def test_guidance_min_above_guidance_max_is_refused():
    with pytest.raises(ValueError, match=r"guidance_min \(2\) must not exceed guidance_max \(1\.5\)"):
        resolve(recipe="paper", guidance_min=2, guidance_max=1.5)


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({"steps_max": 5}, {"steps_min": 5, "steps_max": 5}),
        ({"steps_min": 40}, {"steps_min": 40, "steps_max": 40}),
        ({"guidance_max": 0.5}, {"guidance_min": 0.5, "guidance_max": 0.5}),
        ({"guidance_min": 6}, {"guidance_min": 6.0, "guidance_max": 6.0}),
        ({"n_trials": 4}, {"n_trials_retune": 4}),
        ({"n_trials": 90}, {"n_trials_retune": RECIPES["demo"]["n_trials_retune"]}),
        ({"n_trials": 4, "n_trials_retune": 9}, {"n_trials_retune": 9}),
        ({"num_images": 40}, {"rescoring_images": 80}),
        ({"num_images": 4000}, {"rescoring_images": RECIPES["demo"]["rescoring_images"]}),
        ({"num_images": 40, "rescoring_images": 90}, {"rescoring_images": 90}),
        ({"steps_max": 11}, {"steps_min": RECIPES["demo"]["steps_min"], "steps_max": 11}),
    ],
)
def test_a_recipes_own_value_follows_one_that_is_given(given, then):
    settings = resolve(recipe="demo", backbone="tiny", **given)
    assert {name: getattr(settings, name) for name in then} == then
    assert set(settings.given) == set(given)


def test_steps_min_above_steps_max_is_refused():
    with pytest.raises(ValueError, match=r"steps_min \(30\) must not exceed steps_max \(20\)"):
        resolve(recipe="demo", steps_min=30, steps_max=20)
    assert resolve(recipe="demo", steps_min=20, steps_max=20).steps_min == 20


# --- None, and the text "none" ---

OPTIONAL = sorted(name for name, field in FIELDS.items() if field.type.endswith(" | None"))


def test_none_means_the_recipes_value_and_is_not_given():
    s = resolve(recipe="demo", backbone=None, dataset=None, n_trials=None, num_images=12, seed=None, runs_dir=None)
    assert s.n_trials == RECIPES["demo"]["n_trials"]
    assert (s.num_images, s.dataset, s.seed, s.runs_dir) == (12, "digits", 0, None)
    assert s.given == ("num_images",)  # what all runs have, as the data set, is not said again


def test_what_a_recipe_sets_can_be_set_back_to_none():
    assert resolve(recipe="paper", backbone="tiny").image_size == 32
    own = resolve(recipe="paper", backbone="tiny", image_size="none")
    assert own.image_size is None and own.given == ("image_size",)
    released = resolve(recipe="released", backbone="tiny", class_encoder_rank="None", class_encoder_tokens=" NONE ")
    assert (released.class_encoder_rank, released.class_encoder_tokens) == (None, None)
    assert released.given == ("class_encoder_rank", "class_encoder_tokens")


@pytest.mark.parametrize("name", OPTIONAL)
def test_every_setting_that_may_be_none_can_be_given_so_and_says_so(name):
    assert getattr(resolve(recipe="released", backbone="tiny", **{name: "none"}), name) is None
    with pytest.raises(ValueError, match=f'^{name} must be .* or "none"'):
        resolve(**{name: b"?"})


@pytest.mark.parametrize("name", ["n_trials", "pruning", "sampler", "weight_decay"])
def test_no_other_setting_can(name):
    with pytest.raises(ValueError, match=name) as error:
        resolve(**{name: "none"})
    assert 'or "none"' not in str(error.value)


# --- recipes ---


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
        class_encoder_rank=500,
        class_encoder_tokens=100,
        unconditional="zero",
        classifier_width=64,
        classifier_shortcut="max_pool",
        image_size=None,
        antialias=False,
        search_plateau_patience=25,
        search_stop_patience=50,
        n_trials=50,
        n_trials_retune=40,
        pruning=False,
        class_mix="balanced",
        larger_sets="random",
        select_on="test",
        inversion_tokens=5,
        inversion_group_images=100,
        inversion_guidance=2.0,
        inversion_unconditional="group_mean",
        inversion_partners="released",
        augmented_protocol="released",
        augmented_prompt="{}",
        augmented_guidance=10.0,
    )
    assert {name: getattr(s, name) for name in expected} == expected
    same = set(FIELDS) - set(expected) - {"recipe"}
    assert all(getattr(s, name) == getattr(paper, name) for name in same)
    assert (paper.classifier_width, paper.image_size, paper.select_on) == (16, 32, "val")


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_recipes_change_the_defaults_and_what_is_given_changes_the_recipe(recipe):
    plain = resolve(recipe=recipe, backbone="tiny")
    for name, value in RECIPES[recipe].items():
        assert getattr(plain, name) == (value if name != "backbone" else "tiny")
    untouched = set(FIELDS) - set(RECIPES[recipe]) - {"recipe", "given"}
    assert all(getattr(plain, name) == getattr(Settings(), name) for name in untouched)
    changed = resolve(recipe=recipe, backbone="tiny", max_multiple=7, seed=3)
    assert dataclasses.replace(plain, max_multiple=7, seed=3, given=("max_multiple",)) == changed


EMPTY_PROMPT = [
    {"unconditional": "empty_prompt"},
    {"class_encoder_start": "empty_prompt"},
    {"recipe": "demo", "class_encoder_tokens": 100},
    {"recipe": "demo", "class_encoder_rank": 5},
]


@pytest.mark.parametrize("given", EMPTY_PROMPT)
def test_the_empty_prompt_fits_one_class_encoder_only(given):
    with pytest.raises(ValueError, match="fits the paper's Class-Encoder alone"):
        resolve(**{"recipe": "released", "backbone": "tiny", **given})


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
    s = resolve(recipe="demo", backbone="tiny", storage="sqlite:///search.db", n_trials=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.seed = 4
    assert s.to_dict() == {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.name != "storage"}
    assert Settings(**s.to_dict()) == dataclasses.replace(s, storage=None)


# --- what a run follows ---


def test_a_run_says_what_it_follows_and_where_that_is_listed():
    whole = len(protocol(Settings()))
    assert followed(resolve(recipe="paper", backbone="sd2")) == f"the paper in {whole} of {whole} settings"
    exact = followed(resolve(recipe="released", backbone="sd1.4"))
    assert exact == f"the released code in {whole} of {whole} settings"
    told = followed(resolve(recipe="paper", backbone="tiny", n_trials=7))
    assert told == f"the paper in {whole - 2} of {whole} settings (chapter 00 lists where it departs)"


def test_the_protocol_compares_a_run_with_the_paper_and_its_code():
    rows = {row["setting"]: row for row in protocol(resolve(recipe="demo", backbone="tiny"))}
    assert rows["n_trials_retune"]["released code"] == 40 and rows["n_trials"]["this run"] == 14
    assert rows["classifier_width"]["source"].startswith("section 4")
    assert (rows["backbone"]["paper"], rows["backbone"]["released code"]) == ("sd2", "sd1.4")
    assert list(rows) == [name for name in FIELDS if name in rows]
    assert not {"dataset", "seed", "storage"} & set(rows)


# --- messages, and what importing costs ---


def test_a_value_is_shown_on_one_line_and_cut():
    assert shown("a\nb") == "'a\\nb'" and shown(np.eye(2)) == "array([[1., 0.], [0., 1.]])"
    assert shown("x" * 200) == "'" + "x" * 119 + "..." and shown([1, 2, 3], length=4) == "[1, ..."
    assert shown(HUGE) == "a very large int" and shown([HUGE]) == "a very large list"


def test_an_unknown_name_without_a_near_one_gets_no_hint():
    assert str(unknown_name("set", "zzz", ["b", "a"])) == "Unknown set 'zzz'. Allowed: a, b."
    assert str(unknown_name("set", 3, iter(["a"]))) == "Unknown set 3. Allowed: a."


def test_the_package_that_shows_its_errors_is_the_whole_one():
    assert messages.PACKAGE.name == "sdgen_lib" and (messages.PACKAGE / "machine" / "seeds.py").exists()


def test_settings_need_nothing_large():
    modules = ("settings", "notebook", "messages", "recipes")
    rooms = [f"sdgen_lib.config.{name}" for name in modules]
    code = f"import sys, {', '.join(rooms)}; print(sorted({{'torch', 'pandas', 'optuna'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "storage", ["search.log", "://", "://me:secret@host/x", "sqlite://", "sqlite:///", "sqlite:///:memory:"]
)
def test_a_storage_that_cannot_be_shared_is_refused_and_no_password_is_shown(storage):
    with pytest.raises(ValueError, match="is no Optuna URL of a database that can be shared") as error:
        resolve("demo", "tiny", storage=storage)
    assert "secret" not in str(error.value)
    assert resolve("demo", "tiny", storage="sqlite:///search.db").storage == "sqlite:///search.db"


@pytest.mark.parametrize("name", ["/data/犬\u3000柴", "می\u200cخواهم", "a\u00a0b"])
def test_a_path_in_every_script(name):
    settings = resolve("demo", "tiny", dataset=name, runs_dir=name)
    assert (settings.dataset, settings.runs_dir) == (name, name)

"""No result is returned for another one: cases that once were, each with the right answer."""

import json

import pytest
import torch

from sdgen_lib.diffusion import generate
from sdgen_lib.evaluate import cas
from sdgen_lib.store.run import settings_used

OTHER_ROWS = [
    {"unconditional": "class_mean"},
    {"sampler": "dpm-solver++"},
    {"classifier_epochs": 5},
    {"classifier_width": 8},
    {"antialias": False},
    {"num_images": 10},
    {"classifier_seeds": 3},
    {"default_steps": 1},
]


@pytest.mark.parametrize("changes", OTHER_ROWS, ids=lambda c: next(iter(c)))
def test_a_row_of_other_settings_is_another_row_of_the_same_weights(small, tmp_path, changes):
    first, other = small(tmp_path), small(tmp_path, **changes)
    row = first.cas("after 1")
    assert other.rows_made(1) == {}
    found = other.cas("after 1")
    assert other.rows_made(1) == {"after 1": found} and first.rows_made(1) == {"after 1": row}
    assert len(list((first.run.path / "table_1" / "after_1").glob("*/record.json"))) == 2
    assert len(list((first.run.path / "1_transfer").glob("*/record.json"))) == 1  # what is upstream is reused
    assert found["num_images"] == changes.get("num_images", 6)
    assert len(found["test"]) == changes.get("classifier_seeds", 2)


def test_other_weights_have_rows_of_their_own(small, tmp_path):
    first, spoilt = small(tmp_path), small(tmp_path, transfer_learning_rate=1e-9)
    first.cas("after 1")
    assert spoilt.rows_made(1) == {}
    spoilt.cas("after 1")
    fingerprints = {course.run.fingerprint(course.method.transfer_step) for course in (first, spoilt)}
    steps = [cas.cas_step(course.workspace, course.source("after 1")) for course in (first, spoilt)]
    records = [course.run.peek(step).record for course, step in zip((first, spoilt), steps)]
    assert {record["needs"]["1_transfer"] for record in records} == fingerprints and len(fingerprints) == 2


def test_what_a_row_was_drawn_with_is_what_its_search_used(small, tmp_path, monkeypatch):
    """A second look without the first one's settings does not draw at the point that was found with them."""
    special = {"sampler": "dpm-solver++", "unconditional": "class_mean"}
    seen = []
    real = generate.generate_latents

    def noted(backbone, condition, unconditional, noise, **options):
        seen.append(options["sampler"])
        return real(backbone, condition, unconditional, noise, **options)

    monkeypatch.setattr(generate, "generate_latents", noted)
    searched = small(tmp_path, **special)
    searched.tune()
    assert set(seen) == {"dpm-solver++"}
    seen.clear()
    plain = small(tmp_path)
    row = plain.cas("after 2")  # searches anew, with its own
    assert set(seen) == {"ddim"}
    seen.clear()
    again = small(tmp_path, **special)
    found = again.cas("after 2")
    assert set(seen) == {"dpm-solver++"} and set(found) == set(row)
    result = again.run.peek(cas.cas_step(again.workspace, again.source("after 2")))
    used = settings_used(again.run.path, result)
    assert (used["sampler"], used["unconditional"]) == ("dpm-solver++", "class_mean")


def test_what_is_said_of_a_result_is_what_made_it(small, tmp_path):
    one, recipes_own = small(tmp_path, transfer_epochs=1), small(tmp_path, transfer_epochs=None)
    assert len(one.transfer()) == 1
    record = one.run.peek(one.method.transfer_step).record
    assert record["settings"]["transfer_epochs"] == 1
    assert recipes_own.run.peek(recipes_own.method.transfer_step) is None  # 12 epochs are not there
    assert "transfer_epochs=1" in str(one) and "transfer_epochs" not in str(recipes_own)
    assert json.loads(next(one.run.path.glob("1_transfer/*/record.json")).read_text()) == record


def test_a_finished_second_search_of_other_trials_is_another_search(small, tmp_path):
    three, five = small(tmp_path, n_trials_retune=3), small(tmp_path, n_trials_retune=5)
    assert len(three.retune().trials) == 3
    assert len(five.retune().trials) == 5
    assert len(three.retune().trials) == 3
    for step in ("1_transfer", "2_tune", "3_finetune"):
        assert len(list(three.run.path.glob(f"{step}/*/record.json"))) == 1


def test_another_first_search_has_steps_3_and_4_of_its_own(small, tmp_path):
    """Its best point bounds step 4, and its best epoch is what step 3 fine-tunes with."""
    first, longer = small(tmp_path), small(tmp_path, n_trials=5, n_trials_retune=4)
    first.retune()
    assert longer.run.peek(longer.method.finetune_step) is None
    assert longer.run.peek(longer.method.retune_step()) is None


def test_two_runs_share_a_study_only_if_they_would_do_the_same_work(small, tmp_path):
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    a = small(tmp_path / "a", storage=storage).tune()
    other = small(tmp_path / "b", storage=storage, transfer_learning_rate=1e-9)
    b = other.tune()
    assert a.study_name != b.study_name
    same = small(tmp_path / "c", storage=storage)
    c = same.tune()
    assert a.study_name == c.study_name and [t.params for t in a.trials] == [t.params for t in c.trials]
    assert [t.datetime_start for t in a.trials] == [t.datetime_start for t in c.trials]  # a's own, not made again
    alone = small(tmp_path / "a").tune()  # the same result, asked for without the storage
    assert [t.params for t in alone.trials] == [t.params for t in a.trials]


def test_larger_random_sets_are_refused_beyond_what_the_run_makes(small, tmp_path):
    course = small(tmp_path, larger_sets="random", max_multiple=2)
    assert len(course.synthetic(2)) == 2 * len(course.data.train)
    with pytest.raises(ValueError, match="x3 needs max_multiple=3; it is 2"):
        course.synthetic(3)


def test_images_far_apart_in_a_set_have_their_own_noise(small, tmp_path):
    """Their seeds once agreed in the 32 bits that torch's generator uses."""
    generator = small(tmp_path).generator("after 1")
    pair = [generator([0], seed=0, set_name="synthetic", first_index=index) for index in (74650, 84988)]
    assert not torch.equal(*pair)

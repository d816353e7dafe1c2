"""The explorers, moved by their widgets as a front end would; that a front end does is test_browser's part."""

import base64
import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import strange_names
import torch
from PIL import Image

from sdgen_lib.course import Course, Point
from sdgen_lib.data import Split
from sdgen_lib.diffusion.conditions import Condition, ContextTable
from sdgen_lib.diffusion.generate import balanced_labels, generate_latents
from sdgen_lib.machine.seeds import image_noise
from sdgen_lib.search.search import chosen, trials_frame
from sdgen_lib.show import explore, explore_classes, figures, widgets
from sdgen_lib.show.names import printable
from sdgen_lib.show.widgets import picker

ROOT = Path(__file__).parents[2]


def drawn(figure) -> bytes:
    """What an image widget holds that shows ``figure``."""
    return widgets.png(figure, scale=2)


def is_png(content: bytes) -> bool:
    return Image.open(io.BytesIO(content)).format == "PNG"


# --- both in one output ---


def test_an_output_holds_the_widget_and_a_picture(finished):
    explorer = explore.GuidanceExplorer(finished.course, finished.course.tune())
    bundle = explorer._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.widget.model_id
    assert is_png(base64.b64decode(bundle["image/png"]))
    assert "sliders" in bundle["text/plain"]


def test_nbconvert_shows_the_picture_where_there_is_no_kernel(finished):
    """As on GitHub: the notebook is stored without the widgets' state."""
    from nbconvert import HTMLExporter
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    explorer = explore.SearchExplorer(finished.course)
    cell = new_code_cell("x", outputs=[new_output("display_data", data=explorer._repr_mimebundle_())])
    page, _ = HTMLExporter().from_notebook_node(new_notebook(cells=[cell]))
    assert "data:image/png;base64" in page and explorer.widget.model_id not in page


# --- guidance ---


def test_sliders_redraw_the_same_seeds(finished):
    course = finished.course
    explorer = explore.GuidanceExplorer(course, study := course.tune())
    epoch = chosen(study).params["epoch"]
    first = explorer.image.value
    explorer.steps.value, explorer.scale.value, explorer.who.value = 5, 2.5, 7
    images = course.draw(Point(5, 2.5, epoch), torch.full((10,), 7), "explorer")
    near = explore.nearest_trial(trials_frame(study).query("not pruned"), {"IS": 5, "UGS": 2.5})
    title = f"IS 5, UGS 2.5; accuracy of the nearest trial {near.value:.1%}"
    assert explorer.image.value == drawn(figures.image_grid([images], [""], ["7"] * 10, scale=0.95, title=title))
    assert f"number {near.name}:" in explorer.words.value and f"{near.value:.1%}" in explorer.words.value
    best = chosen(study).params
    explorer.steps.value, explorer.scale.value, explorer.who.value = best["IS"], round(best["UGS"], 1), None
    assert explorer.image.value == first


def test_the_sliders_cover_the_search(finished):
    explorer, s = explore.GuidanceExplorer(finished.course, finished.course.tune()), finished.course.settings
    assert (explorer.steps.max, explorer.scale.min, explorer.scale.max) == (s.steps_max, 0, s.guidance_max)
    assert [value for _, value in explorer.who.options] == [None, *range(10)]


def test_nearest_trial_measures_by_the_ranges(study_of):
    frame = trials_frame(study_of([(1, 0.0, 1, 0.1, False), (101, 1.0, 1, 0.2, False), (60, 0.0, 1, 0.3, True)]))
    assert explore.nearest_trial(frame, {"IS": 52, "UGS": 0.1}).name == 2  # 60 is near 52 on a range of 100
    assert explore.nearest_trial(frame, {"IS": 52, "UGS": 0.95}).name == 1
    assert explore.nearest_trial(frame, {"IS": 2, "UGS": 0.2}).name == 0


def test_only_complete_trials_say_a_cas_beside_the_sliders(finished, study_of):
    study = study_of([(5, 0.5, 1, 0.4, False), (9, 0.8, 2, 0.9, True), (3, 0.9, 2, 0.6, False)])
    explorer = explore.GuidanceExplorer(finished.course, study)
    explorer.steps.value, explorer.scale.value = 9, 0.8
    assert "number 0: IS 5, UGS 0.50, accuracy 40.0%" in explorer.words.value and "pruned" not in explorer.words.value


def test_the_sliders_begin_at_what_rescoring_chose(finished, study_of):
    study = study_of([(5, 0.5, 1, 0.6, False), (3, 0.8, 2, 0.4, False)])
    assert explore.GuidanceExplorer(finished.course, study).epoch == 1
    study.set_user_attr(
        "rescored", [{"point": t.params, "seeds": [1], "values": [v]} for t, v in zip(study.trials, (0.3, 0.5))]
    )
    explorer = explore.GuidanceExplorer(finished.course, study)
    assert (explorer.steps.value, explorer.scale.value, explorer.epoch) == (3, 0.8, 2)


# --- denoising ---


def trained(finished):
    """What step 1's second epoch makes of labels."""
    return finished.course.method.class_encoder(2).conditioner()


def test_walk_is_the_samplers(finished):
    """Its last prediction is what `generate_latents` draws; the push is the difference of the two answers."""
    model, conditioner = finished.course.backbone, trained(finished)
    told, untold = conditioner(torch.tensor([4])), conditioner.unconditional()
    noise = image_noise(0, "x", [0], model.latent_shape)
    way = explore.walk(model, told, untold, noise, 4, 2.5)
    final = generate_latents(model, told, untold, noise, num_inference_steps=4, guidance_scale=2.5)
    assert len(way) == 4
    torch.testing.assert_close(way[-1][1], final, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(way[0][0], noise)
    t = torch.tensor([999])
    with torch.no_grad():
        push = model.predict_noise(noise, t, told) - model.predict_noise(noise, t, untold)
    torch.testing.assert_close(way[0][2], push)


def test_scrubber(finished):
    course = finished.course
    names = course.data.class_names
    explorer = explore.DenoisingExplorer(course.backbone, trained(finished), names, num_inference_steps=4)
    shown = []
    for step in (1, 2, 4, 1):
        explorer.step.value = step
        shown.append(explorer.image.value)
    assert len(set(shown)) == 3 and shown[0] == shown[-1]
    explorer.who.value = 5
    assert explorer.image.value != shown[-1] and is_png(explorer.image.value)
    assert len(explorer.still().axes) == 3 * 4


def test_where_the_class_changes_nothing_the_push_is_white(tiny):
    """An untrained Class-Encoder tells the same of every class, and the same as of none."""
    context = tiny.text_context([""])
    same = ContextTable(context.expand(2, -1, -1), context[0])
    explorer = explore.DenoisingExplorer(tiny, same, ("cat", "dog"), num_inference_steps=3)
    assert explorer.seen["push"].shape == (3, 3, 32, 32) and (explorer.seen["push"] == 255).all()


def test_the_push_is_darkest_where_it_is_hardest(tiny):
    contexts = tiny.text_context(["white digit 3 on black", ""])
    explorer = explore.DenoisingExplorer(tiny, ContextTable(contexts[:1], contexts[1]), ("3",), num_inference_steps=3)
    noise = image_noise(0, "denoising", [0], tiny.latent_shape)
    way = explore.walk(tiny, Condition(contexts[:1]), Condition(contexts[1:]), noise, 3, 3.0)
    size = torch.cat([push for _, _, push in way]).square().mean(1).sqrt()
    step, row, column = (int(i) for i in torch.unravel_index(size.argmax(), size.shape))
    push = explorer.seen["push"]
    assert push.min() == push[step, 0, 4 * row, 4 * column] == 0  # 8 latents across 32 pixels
    expected = 255 * (1 - size[1, 5, 2] / size.max())
    assert math.isclose(push[1, 0, 4 * 5, 4 * 2], expected, abs_tol=0.51)


def test_a_walk_of_one_step(tiny):
    contexts = tiny.text_context(["white digit 3 on black", ""])
    explorer = explore.DenoisingExplorer(tiny, ContextTable(contexts[:1], contexts[1]), ("3",), num_inference_steps=1)
    assert explorer.step.value == explorer.step.max == 1 and len(explorer.still().axes) == 3


# --- the search ---


@pytest.mark.parametrize("step", [2, 4])
def test_a_click_shows_what_the_trial_was_scored_on(finished, step):
    course = finished.course
    explorer = explore.SearchExplorer(course, step)
    buttons = explorer.points.children[1:]
    frame = trials_frame(course.tune() if step == 2 else course.retune())
    assert len(buttons) == 2 * len(frame)
    for button, trial in ((buttons[1], frame.index[1]), (buttons[-1], frame.index[-1])):
        button.click()
        row = frame.loc[trial]
        first = chosen(course.tune()).params["epoch"]
        epochs = (int(row.epoch), None) if step == 2 else (first, int(row.epoch))
        images = course.draw(
            Point(int(row.IS), row.UGS, *epochs), balanced_labels(40, 10), "trial"
        )  # all that the trial drew
        grid = figures.image_grid([images[:10], images[10:20]], ["", ""], list("0123456789"))
        assert explorer.image.value == drawn(grid)
        assert f"trial {trial}: IS {row.IS:.0f}, UGS {row.UGS:.2f}" in explorer.words.value


def under_the_buttons(points):
    """What of the picture lies under each button: integer arrays (h, w, 3)."""
    picture = Image.open(io.BytesIO(points.children[0].value)).convert("RGB")
    columns = int(points.layout.grid_template_columns.split("(")[1].split(",")[0])
    cell = widgets.CELL * picture.width / (columns * widgets.CELL)
    for button in points.children[1:]:
        row, column, height, width = (int(part.split()[-1]) for part in button.layout.grid_area.split(" / "))
        box = (column - 1, row - 1, column - 1 + width, row - 1 + height)
        yield np.asarray(picture.crop([round(side * cell) for side in box])).astype(int)


def test_buttons_lie_over_their_points(finished):
    """The middle of each shows its point's colour or a pruned one's grey, not the paper's white."""
    for part in under_the_buttons(explore.SearchExplorer(finished.course).points):
        middle = part[len(part) // 3 : -len(part) // 3, part.shape[1] // 3 : -part.shape[1] // 3]
        assert middle.min() < 180


def test_a_pruned_trials_accuracy_is_never_said_without_its_epochs(micro, tmp_path, study_of):
    explorer = explore.SearchExplorer(Course(micro(tmp_path / "runs")))
    study = study_of([(5, 0.5, 1, 0.3, False), (9, 0.7, 2, 0.4, True), (9, 0.7, 2, 0.5, False)])
    study.set_user_attr("rescored", [{"point": study.trials[2].params, "seeds": [1], "values": [0.45]}])
    explorer.update(study)
    tooltips = [button.tooltip for button in explorer.points.children[1:]]
    assert tooltips == 2 * [
        "trial 0: accuracy 30.0%",
        "trial 1: pruned after 3 epochs, at 40.0%",
        "trial 2: accuracy 50.0%, drawn anew 45.0%",
    ]


def test_buttons_lie_within_their_cells():
    """All four corners of each are of its cell's dark blue: on the diagonal every image is right."""
    labels = torch.arange(10)
    split = Split(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), labels)
    explorer = explore_classes.Confusion({"one": labels, "two": labels}, split, list("0123456789"))
    found = list(under_the_buttons(explorer.points))
    assert len(found) == 20
    for part in found:
        corners = part[[1, 1, -2, -2], [1, -2, 1, -2]]
        assert (corners[:, 2] - corners[:, 0]).min() > 60


def test_updates_while_the_search_runs(micro, tmp_path, study_of):
    course = Course(micro(tmp_path / "runs"))
    explorer = explore.SearchExplorer(course)  # before the first trial
    assert "waiting" in explorer.words.value and is_png(base64.b64decode(explorer._repr_mimebundle_()["image/png"]))
    buttons = ()
    for count in (1, 2):
        explorer.update(study_of([(5, 0.5, 1, 0.3, False), (9, 0.7, 2, 0.4, True)][:count]))
        assert len(explorer.points.children) == 1 + 2 * count and f"{count} trials" in explorer.words.value
        assert explorer.points.children[1 : 1 + len(buttons)] == buttons  # moved, not made anew
        buttons = explorer.points.children[1:]


OTHER_PROCESS = """
import sys
from sdgen_lib.search.study import open_study
from pathlib import Path
study = open_study(Path(sys.argv[1]), "step 2")
study.enqueue_trial({"IS": 5, "UGS": 0.5, "epoch": 1})
trial = study.ask()
values = trial.suggest_int("IS", 5, 6), trial.suggest_float("UGS", 0, 7.5), trial.suggest_int("epoch", 1, 2)
for name, value in {"val_accuracy": 0.4, "test_accuracy": 0.3, "classifier_epochs": 3, "seconds": 1.0}.items():
    trial.set_user_attr(name, value)
study.tell(trial, 0.4)
"""


def test_a_search_of_another_process_is_seen_when_it_is_refreshed(micro, tmp_path):
    course = Course(micro(tmp_path / "runs"))
    explorer = explore.SearchExplorer(course)
    folder = course.run.folder(course.method.tune_step())
    assert not folder.exists()  # looking makes nothing
    folder.mkdir(parents=True)
    (refresh,) = (w for w in explorer.widget.children[1].children if getattr(w, "description", "") == "refresh")
    for count in (1, 2):
        subprocess.run([sys.executable, "-c", OTHER_PROCESS, folder / "journal.log"], check=True, cwd=ROOT)
        refresh.click()
        assert f"{count} trials" in explorer.words.value and len(explorer.points.children) == 1 + 2 * count
    other = explore.SearchExplorer(Course(micro(tmp_path / "runs", n_trials=5)))  # of other settings: another search
    assert "waiting" in other.words.value


def test_a_finished_search_is_read_by_the_name_that_it_has(finished, monkeypatch):
    """A search that several processes shared is kept under its name in their storage."""
    opened, read = [], explore.open_study
    monkeypatch.setattr(explore, "open_study", lambda *where: opened.append(where) or read(*where))
    explorer = explore.SearchExplorer(finished.course)
    result = finished.course.run.peek(finished.course.method.tune_step())
    assert opened == [(result.folder / "journal.log", result.facts["study"])]
    assert explorer.frame.equals(trials_frame(finished.course.tune()))


def test_a_step_without_a_search(finished):
    with pytest.raises(ValueError, match="2, 4 .*not 3"):
        explore.SearchExplorer(finished.course, 3)


# --- real or generated ---


def questions():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8) * 60
    is_real, guessed_real = torch.tensor([True, False, True, False]), torch.tensor([True, True, True, False])
    return explore_classes.Questions(images, is_real, guessed_real, classes=torch.tensor([0, 1, 1, 0]))


def test_the_quiz_is_scored():
    quiz = explore_classes.Quiz(questions(), 0.75, ["cat", "dog"])
    quiz.buttons["real"].click()
    assert "Right: number 1 is real, class cat. The classifier said real." in quiz.words.value
    quiz.buttons["real"].click()
    assert "Wrong: number 2 is generated, class dog. The classifier said real." in quiz.words.value
    assert "You: 1 of 2. The classifier: 1 of 2." in quiz.words.value
    quiz.buttons["generated"].click()
    quiz.buttons["generated"].click()
    assert "You: 2 of 4. The classifier: 3 of 4." in quiz.words.value and "75.0%" in quiz.words.value
    assert all(button.disabled for button in quiz.buttons.values())
    quiz.answer(True)  # after the end
    assert quiz.answers == [True, True, False, False]


def test_questions_are_of_images_that_the_classifier_did_not_learn_from(finished):
    course = finished.course
    found, accuracy = explore_classes.real_or_generated(course, 8, epochs=2)
    assert found.is_real.sum() == 4 and 0 <= accuracy <= 1
    block_2 = course.synthetic(2).images[100:]
    for image, is_real, label in zip(found.images, found.is_real, found.classes):
        home = course.data.test if is_real else Split(block_2, course.synthetic(2).labels[100:])
        at = (home.images == image).flatten(1).all(1).nonzero().flatten()
        assert len(at) and label in home.labels[at]
    for number in (0, 7, 1000, 2.0):
        with pytest.raises(ValueError, match=f"not {number}"):
            explore_classes.real_or_generated(course, number, epochs=1)


@pytest.mark.parametrize("larger_sets", ["nested", "random"])
def test_a_run_of_one_block_has_a_quiz_of_its_halves(small, tmp_path, larger_sets):
    course = small(tmp_path, max_multiple=1, larger_sets=larger_sets)
    found, _ = explore_classes.real_or_generated(course, epochs=1)
    made = course.synthetic(1)
    assert 0 < found.is_real.sum() == len(found.images) / 2
    for image in found.images[~found.is_real]:
        assert (made.images == image).flatten(1).all(1).any()
    assert len(list(course.run.path.glob("5_datasets/block_*"))) == 1


def test_few_images_make_a_short_quiz(small, tmp_path):
    course = small(tmp_path)
    found, _ = explore_classes.real_or_generated(course, epochs=1)
    assert len(found.images) == 8 and found.is_real.sum() == 4  # four test images, six training images
    with pytest.raises(ValueError, match="at most 8 with these few images, not 12"):
        explore_classes.real_or_generated(course, 12, epochs=1)


def test_a_search_whose_trials_were_all_pruned_can_be_explored(finished, study_of):
    study = study_of([(3, 0.5, 1, 0.4, True), (5, 0.8, 2, 0.6, True)])
    explorer = explore.GuidanceExplorer(finished.course, study)
    assert (explorer.steps.value, explorer.scale.value, explorer.epoch) == (5, 0.8, 2)
    assert "when it was pruned" in explorer.words.value


# --- confusion ---


def test_a_matrix_counts_true_classes_in_rows():
    labels, predicted = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 2, 2, 2, 0])
    split = Split(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), labels)
    explorer = explore_classes.Confusion({"one": predicted}, split, ["cat", "dog", "owl"])
    assert explorer.matrices["one"].tolist() == [[1, 0, 2], [0, 0, 0], [1, 0, 1]]  # no image is or seems a dog


def test_a_click_shows_the_confused_images():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 8, 8) * 40
    split = Split(images, torch.tensor([0, 0, 0, 1, 1, 2]))
    predictions = {"one": torch.tensor([0, 1, 1, 1, 1, 2]), "two": split.labels}
    explorer = explore_classes.Confusion(predictions, split, ["cat", "dog", "owl"])
    tooltips = {button.tooltip: button for button in explorer.points.children[1:]}
    assert len(explorer.points.children[1:]) == 4 + 3  # the cells that are not empty
    tooltips["cat taken for dog: 2"].click()
    assert "one: 2 images of class cat taken for dog" in explorer.words.value
    assert explorer.image.value == drawn(figures.image_grid([images[1:3]], [""], scale=0.9))
    one, two = (ax.get_title() for ax in explorer.still().axes)
    assert one == "one\n66.7% right, balanced 77.8%"  # (1/3 + 2/2 + 1/1) / 3, and no class left out
    assert two == "two\n100.0% right, balanced 100.0%"


def test_many_classes_show_the_most_confused():
    labels = torch.arange(40)
    predicted = labels.clone()
    predicted[30:36] = labels[24:30]  # twelve classes in confusion
    split = Split(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), labels)
    explorer = explore_classes.Confusion({"one": predicted}, split, [str(i) for i in range(40)])
    assert explorer.classes == list(range(24, 36))


def test_both_classifiers_are_asked_about_real_test_images(finished):
    explorer = explore_classes.confusion(finished.course)
    assert explorer.split is finished.course.data.test
    assert [m.sum().item() for m in explorer.matrices.values()] == [449, 449]
    for matrix, row in zip(explorer.matrices.values(), ("real", "x1")):  # they are those of table 2
        assert float(matrix.diag().sum() / 449) == pytest.approx(finished.scaling[row]["test"][0])
    with pytest.raises(ValueError, match="no row 'x3'. It has: real, x1, x2"):
        explore_classes.confusion(finished.course, 3)


# --- names from a stranger's data ---


@pytest.mark.parametrize("name", strange_names.ALL)
def test_a_class_name_is_shown_and_never_run(name):
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    names = [name, "b"]
    quiz = explore_classes.Quiz(questions(), 0.75, names)
    quiz.buttons["real"].click()
    confusion = explore_classes.Confusion({name: torch.tensor([0, 1, 1, 0])}, Split(images, torch.arange(4) % 2), names)
    confusion.choose(name, 0, 1)
    for words, count in ((quiz.words, 1), (confusion.words, 2)):
        page = strange_names.Page(f"<td>{words.value}")
        assert set(page.tags) <= {"td", "br"} and page.cells[0].count(printable(name)) >= count
    tooltips = [button.tooltip for button in confusion.points.children[1:]]
    assert f"{printable(name)} taken for b: 1" in tooltips
    assert not any(c in words.value for words in (quiz.words, confusion.words) for c in "\n\u202e\x1b\a")


def test_classes_to_pick_from():
    who = picker(strange_names.ALL, ("one of each", None))
    texts, values = zip(*who.options)
    assert values == (None, *range(len(strange_names.ALL))) and len(set(texts)) == len(texts)
    assert all(text.isprintable() for text in texts) and strange_names.SEEN[0] in texts
    who.value = 1  # by its number, whatever it is called
    assert picker(["a\n", "a\t"]).options == (
        ("a\N{REPLACEMENT CHARACTER} (0)", 0),
        ("a\N{REPLACEMENT CHARACTER} (1)", 1),
    )


def test_what_cannot_be_seen_is_shown_and_what_joins_letters_is_kept():
    assert printable("a\nb\u202ec\x1b") == "a\ufffdb\ufffdc\ufffd"
    for name in ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\U0001f469\u200d\U0001f467", "猫 $x^$ <b>"):
        assert printable(name) == name


def test_no_explorer_writes_html_of_its_own():
    """`widgets.Words` escapes; a plain HTML widget would not."""
    for path in (ROOT / "sdgen_lib/show").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("ipywidgets.HTML") == (path.name == "widgets.py"), path
        assert "words.value" not in text


def test_two_training_images_are_enough_for_a_quiz(small, tmp_path):
    """One of each class, as three pictures of each make them."""
    dataset = small(tmp_path).settings.dataset
    course = small(tmp_path, dataset=f"{dataset}:2", n_trials=1, rescored=0, num_images=2)
    found, accuracy = explore_classes.real_or_generated(course, epochs=1)
    assert len(found.images) == 2 and sorted(found.is_real.tolist()) == [False, True] and 0 <= accuracy <= 1

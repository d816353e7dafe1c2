"""What generated images are worth: rows that differ by what is trained on, and by nothing else."""

import numpy as np
import pytest
import torch

from sdgen_lib.classify import Mixture
from sdgen_lib.config.settings import FIELDS
from sdgen_lib.data import resize
from sdgen_lib.evaluate import inversion_studies, rows, sets, worth
from sdgen_lib.methods.inversion import InversionMethod
from sdgen_lib.show import inversion_figures, tables


@pytest.fixture(scope="module")
def method(small, tmp_path_factory):
    return InversionMethod(small(tmp_path_factory.mktemp("worth"), classifier_seeds=2).workspace)


@pytest.fixture
def trained(monkeypatch):
    """What the classifiers of each row were trained on, and with which options; they are trained in truth, too."""
    found, true = [], rows.scores

    def spied(ws, s, training, tests, options, name):
        found.append((training, options))
        return true(ws, s, training, tests, options, name)

    monkeypatch.setattr(rows, "scores", spied)
    return found


def test_rows_have_equal_steps_whatever_they_are_trained_on(method, trained):
    ws, source = method.ws, method.source()
    found = {kind: worth.worth(ws, source, kind, multiple=2) for kind in worth.KINDS}
    assert [row["num_images"] for row in found.values()] == [6, 12, 18]
    # 12 images of x2, in batches of 4, twice: as the settings train the largest set
    assert {step for row in found.values() for step in row["steps"]} == {6}
    real, generated, both = (training for training, _ in trained)
    assert torch.equal(real.images, ws.data.train.images)
    assert torch.equal(generated.images, sets.synthetic(ws, source, 2).images)
    assert isinstance(both, Mixture) and len(both) == 18 and both.ratio is None
    assert torch.equal(both.parts[0].images, real.images) and torch.equal(both.parts[1].images, generated.images)
    assert len({str(options) for _, options in trained}) == 1
    assert found["both"]["inverted_images"] == 6 and "point" not in found["real"]


def test_a_row_is_made_once_and_another_choice_is_another_row(method):
    ws, source = method.ws, method.source()

    def fingerprint(kind="both", **how):
        return ws.run.fingerprint(worth.worth_step(ws, source, kind, **how))

    found = [fingerprint(), fingerprint(ratio=(1, 1)), fingerprint(multiple=2), fingerprint(augmentation="cutmix")]
    found += [fingerprint(network="resnet18"), fingerprint("generated"), fingerprint(steps_of=2)]
    assert len(set(found)) == len(found)
    first = worth.worth_step(ws, None, "real")
    assert ws.run.fingerprint(first) == fingerprint("real")  # real images do not depend on a generator
    with pytest.raises(ValueError, match="Unknown kind 'bth'. Did you mean 'both'"):
        worth.worth_step(ws, source, "bth")


def test_a_ratio_is_kept_in_every_batch(method, trained):
    worth.worth(method.ws, method.source(), "both", ratio=(1, 3))
    ((training, _),) = trained
    assert training.ratio == (1, 3) and training.shares(4) == [1, 3]


def test_through_the_vae_and_back(method, trained):
    ws = method.ws
    row = dict(ws.run.result(worth.through_vae_step(ws)).facts)
    ((training, _),) = trained
    once = resize(ws.backbone.decode(ws.backbone.encode(ws.data.train.images)), 8).cpu()
    assert (training.images.int() - once.int()).abs().max() <= 1
    assert torch.equal(training.labels, ws.data.train.labels) and row["num_images"] == 6


def test_a_table_of_rows_says_what_each_differs_by(method):
    ws, source = method.ws, method.source()
    found = {"real": worth.worth(ws, None, "real"), "made": worth.worth(ws, source, "generated")}
    table = tables.worth_table(found)
    assert list(table.index) == ["real", "made"] and table.loc["real", "minus real"] == ""
    mean = 100 * (np.mean(found["made"]["test"]) - np.mean(found["real"]["test"]))
    assert table.loc["made", "minus real"].startswith(f"{mean:+.1f} [")
    assert "minus real" not in tables.worth_table({"made": found["made"]})
    assert list(table["steps"]) == [found["real"]["steps"][0]] * 2


# --- studies ---


def test_every_study_can_be_asked_for(method):
    assert tuple(inversion_studies.studies(method)) == FIELDS["inversion_study"].metadata["choices"]
    with pytest.raises(ValueError, match="Unknown study 'visit'. Did you mean 'visits'"):
        inversion_studies.study(method, "visit", 1)


def test_a_study_changes_one_thing(method):
    """The checkpoints' rows hold other images, of the same labels, from the same noise."""
    found = inversion_studies.study(method, "visits", multiple=1)
    assert list(found) == [("1", "generated"), ("2", "generated")]
    assert [row["point"]["visits"] for row in found.values()] == [1, 2]
    scales = inversion_studies.study(method, "guidance", multiple=1)
    assert [row["point"]["guidance_scale"] for row in scales.values()] == [1.0, 1.5, 2.0, 3.0, 4.0]
    assert {row["point"]["visits"] for row in scales.values()} == {2}
    assert {step for row in [*found.values(), *scales.values()] for step in row["steps"]} == {4}


def test_fewer_real_images_are_a_run_of_their_own(method, monkeypatch):
    few = inversion_studies.Study("real images", ("real", "both"), {"4": {"inversion_images": 4}})
    monkeypatch.setattr(inversion_studies, "studies", lambda method: {"real": few})
    found = inversion_studies.study(method, "real", multiple=2)
    assert found["4", "real"]["num_images"] == 4 and found["4", "both"]["num_images"] == 12
    figure = inversion_figures.study_figure(found, "real images")
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["real", "real + generated"]

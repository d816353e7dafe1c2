"""The tables reproduce what the paper says about them in words."""

import re

import medmnist
import pytest

from sdgen_lib.classify.training import LOWEST_RATE
from sdgen_lib.config import paper
from sdgen_lib.config.settings import resolve


def test_gains_after_each_search_are_those_of_the_text():
    cas = paper.TABLE_1
    first, second = cas["after 2"] - cas["after 1"], cas["after 4"] - cas["after 1"]
    assert (first.min(), first.max()) == pytest.approx((1.08, 43.54))
    assert (second.min(), second.max()) == pytest.approx((10.45, 46.33))
    assert first.idxmin() == "BloodMNIST"


def test_the_first_search_saves_up_to_38_percent_of_the_time():
    saved = 1 - paper.TABLE_1["s after 2"] / paper.TABLE_1["s after 1"]
    assert saved.max() == pytest.approx(0.38)
    assert (paper.TABLE_1["s after 3"] == paper.TABLE_1["s after 2"]).all()


def test_generated_images_beat_real_ones_for_two_datasets():
    best = paper.TABLE_2.drop(columns="real").max(axis=1)
    assert set(best.index[best > paper.TABLE_2["real"]]) == {"CIFAR10", "RetinaMNIST"}
    assert list(paper.TABLE_2.columns) == ["real"] + [f"x{i}" for i in range(1, 11)]


def test_importances_of_every_study_add_up():
    assert paper.IMPORTANCES.sum(axis=1).sub(1).abs().max() < 0.015
    assert set(paper.IMPORTANCES.index) == {(d, step) for d in paper.DATASETS for step in (2, 4)}
    assert paper.IMPORTANCES.loc[("DermaMNIST", 4)].idxmax() == "IS"


def test_every_table_has_the_six_datasets():
    assert list(paper.TABLE_1.index) == list(paper.TABLE_2.index) == paper.DATASETS
    assert not paper.TABLE_1.isna().any(axis=None) and not paper.TABLE_2.isna().any(axis=None)


def test_protocol_and_departures_are_filled_in():
    assert len(paper.PROTOCOL) == 5
    assert list(paper.DEPARTURES.columns) == ["paper", "released code"]
    assert paper.DEPARTURES.index.is_unique and (paper.DEPARTURES != "").all(axis=None)


def test_table_1s_seconds_are_those_of_a_whole_x1_set():
    """Three quarters of a second an image, whatever the dataset; with 4000 images each it would be 0.2 to 17."""
    sizes = {"CIFAR10": 40_000, "CIFAR100": 40_000}
    sizes |= {name: medmnist.INFO[name.lower()]["n_samples"]["train"] for name in paper.DATASETS if name not in sizes}
    for name, size in sizes.items():
        assert paper.TABLE_1["s after 1"][name] / size == pytest.approx(0.75, rel=0.005)


def test_departures_are_those_of_the_recipe_released():
    released, code = resolve("released"), paper.DEPARTURES["released code"]

    def numbers(topic):
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", code[topic])]

    assert numbers("Class-Encoder") == [released.class_encoder_rank, released.class_encoder_tokens]
    assert released.class_encoder_rank > 100  # the classes of CIFAR100: of a one-hot vector's maps it leaves out none
    assert numbers("trials") == [released.n_trials, released.n_trials_retune]
    assert numbers("classifier in the search") == [released.search_plateau_patience, released.search_stop_patience]
    assert numbers("classifier's lowest rate") == [LOWEST_RATE]
    assert numbers("classifier")[0] == released.classifier_width
    assert released.label_dropout == 0 and "no label is dropped" in code["unconditional context"]


@pytest.mark.parametrize(
    ("dataset", "row"),
    [
        ("cifar10", "CIFAR10"),
        ("cifar10:2000", "CIFAR10"),
        ("cifar100", "CIFAR100"),
        ("pathmnist_64", "PathMNIST"),
        ("retinamnist_224:100", "RetinaMNIST"),
        ("DermaMNIST", "DermaMNIST"),
        ("digits", None),
        ("cifar10_64", None),
        ("octmnist", None),
        ("data/cifar10.npz", None),
    ],
)
def test_name_of(dataset, row):
    assert paper.name_of(dataset) == row

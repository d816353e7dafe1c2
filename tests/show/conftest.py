"""Every figure of these tests is closed again, as the notebooks need it."""

import matplotlib.pyplot as plt
import pytest


@pytest.fixture(autouse=True)
def no_window():
    plt.switch_backend("agg")
    yield
    assert plt.get_fignums() == []  # a figure left open would be shown twice in a notebook

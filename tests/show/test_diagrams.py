import pytest

from sdgen_lib.show import diagrams

from .made import drawn


def words(figure) -> list[str]:
    return [text.get_text() for text in drawn(figure).axes[0].texts if text.get_text()]


def test_each_part_says_its_state():
    shown = words(diagrams.method(trained=["UNet"], searched={"UNet": "IS, UGS"}, to_come=["ResNet20"]))
    states = {name: shown[shown.index(name) + 1] for name in ("Class-Encoder", "UNet", "VAE", "ResNet20")}
    assert states == {"Class-Encoder": "frozen", "UNet": "trained", "VAE": "frozen", "ResNet20": "to come"}
    assert "searched: IS, UGS" in shown and "text encoder" not in shown
    assert "caption" in words(diagrams.method(encoder="text encoder"))


def test_a_part_that_there_is_not():
    with pytest.raises(ValueError, match="Unknown part 'Unet'. Did you mean 'UNet'"):
        diagrams.method(trained=["Unet"])

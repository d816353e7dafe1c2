"""Names that come with the data, from anyone: shown as they are, and never read as a formula or as markup."""

from __future__ import annotations

import matplotlib
import pandas as pd
from matplotlib import font_manager

from ..config.messages import printable

__all__ = ["as_text", "printable"]

# Asked in this order for what matplotlib's own font has not; those of emoji in colours it cannot draw.
FONTS = (
    *(f"Noto Sans CJK {part}" for part in ("JP", "SC", "TC", "HK", "KR")),
    *("Source Han Sans", "Noto Sans JP", "Noto Sans SC", "Noto Sans TC", "Noto Sans KR"),
    *("Hiragino Sans", "PingFang SC", "PingFang HK", "Apple SD Gothic Neo", "Arial Unicode MS"),  # macOS
    *("Yu Gothic", "MS Gothic", "Microsoft YaHei", "Microsoft JhengHei", "Malgun Gothic"),  # Windows
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "IPAexGothic", "IPAGothic", "TakaoGothic", "NanumGothic", "UnBatang"),
    *("Noto Emoji", "Symbola", "Segoe UI Symbol"),
)


def as_text() -> None:
    """From now on matplotlib draws, and pandas tables in a notebook show, every text as it is.

    A class may be called "$5" or "$x^$": matplotlib and MathJax would read mathematics. It may be called "猫": the
    installed `FONTS` stand in for letters that the usual font has not. (For a formula: ``parse_math=True`` where
    matplotlib is given the text. `Styler` leaves index and columns as they are: ``format_index(escape="html")``.)
    """
    installed = {font.name for font in font_manager.fontManager.ttflist}
    family = matplotlib.rcParams["font.family"]
    more = [name for name in FONTS if name in installed and name not in family]
    matplotlib.rcParams.update({"text.parse_math": False, "font.family": [*family, *more]})
    pd.set_option("display.html.use_mathjax", False)
    pd.set_option("styler.html.mathjax", False)
    pd.set_option("styler.format.escape", "html")

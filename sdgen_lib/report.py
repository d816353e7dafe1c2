"""``python -m sdgen_lib.report`` is ``python -m sdgen_lib report``."""

from .show.report import main

if __name__ == "__main__":
    raise SystemExit(main())

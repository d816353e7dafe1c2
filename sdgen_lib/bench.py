"""``python -m sdgen_lib.bench`` is ``python -m sdgen_lib bench``."""

from .tools.bench import main

if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m sdgen_lib.export`` is ``python -m sdgen_lib export``."""

from .share.export import main

if __name__ == "__main__":
    raise SystemExit(main())

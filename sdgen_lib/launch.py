"""``python -m sdgen_lib.launch`` is ``python -m sdgen_lib launch``."""

from .tools.launch import main

if __name__ == "__main__":
    raise SystemExit(main())

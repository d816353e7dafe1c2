"""``python -m sdgen_lib.pretrain_tiny`` is ``python -m sdgen_lib pretrain``."""

from .tools.pretrain import main

if __name__ == "__main__":
    raise SystemExit(main())

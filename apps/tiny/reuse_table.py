"""`python -m fastdit.apps.bench.quality.reuse_table` under its former name."""

from fastdit.apps.bench.quality.reuse_table import main

if __name__ == "__main__":
    main()

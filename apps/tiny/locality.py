"""`python -m fastdit.apps.bench.quality.locality` under its former name."""

from fastdit.apps.bench.quality.locality import main

if __name__ == "__main__":
    main()

"""`python -m fastdit.apps.bench.batch` under its former name."""

from fastdit.apps.bench.batch import main

if __name__ == "__main__":
    main()

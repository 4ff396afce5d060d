"""`python -m fastdit.apps.bench.trim` under its former name."""

from fastdit.apps.bench.trim import main

if __name__ == "__main__":
    main()

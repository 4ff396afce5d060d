"""`python -m fastdit.apps.bench.quality.selection_cost` under its former name."""

from fastdit.apps.bench.quality.selection_cost import main

if __name__ == "__main__":
    main()

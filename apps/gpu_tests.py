"""`python -m fastdit.apps.bench.gpu_tests` under its former name."""

from fastdit.apps.bench.gpu_tests import main

if __name__ == "__main__":
    main()

"""`python -m fastdit …`: the same as the `fastdit` command."""

from fastdit.apps.cli.main import main

if __name__ == "__main__":
    main()

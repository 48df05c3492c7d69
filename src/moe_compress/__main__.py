"""`python -m moe_compress`."""

from moe_compress.cli.commands import main

if __name__ == "__main__":
    main()

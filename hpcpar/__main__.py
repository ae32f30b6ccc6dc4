"""``python -m hpcpar``: the command ``hpcpar``, for where scripts of packages are not on the path."""

from hpcpar.cli.main import main

if __name__ == "__main__":
    main(prog_name="hpcpar")

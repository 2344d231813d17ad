"""`python -m meshserve` is the same as `meshserve`."""

from meshserve.cli.main import main

if __name__ == "__main__":
    main()

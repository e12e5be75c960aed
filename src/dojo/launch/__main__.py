"""`python -m dojo.launch`."""

from dojo.launch import main

if __name__ == "__main__":
    main()

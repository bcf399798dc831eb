"""``python -m custom_components.export``: see :mod:`custom_components.run.export`."""

from custom_components.run.export import main

if __name__ == "__main__":
    main()

"""``python -m trainer config.yaml [key=value …]``."""

from trainer.cli import main

if __name__ == "__main__":
    main()

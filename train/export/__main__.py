"""Command: a model becomes one folder."""

from data_prep.errors import exit_on_user_error
from train.export.folder import main

if __name__ == "__main__":
    exit_on_user_error(main)

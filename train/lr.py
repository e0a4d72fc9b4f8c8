"""Command: a few short runs that differ in their learning rate."""

from data_prep.errors import exit_on_user_error
from train.tune.lr import main

if __name__ == "__main__":
    exit_on_user_error(main)

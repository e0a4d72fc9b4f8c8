"""Command: runs over values of a recipe's keys."""

from data_prep.errors import exit_on_user_error
from train.tune.sweep import main

if __name__ == "__main__":
    exit_on_user_error(main)

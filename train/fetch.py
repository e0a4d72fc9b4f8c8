"""Command: base weights for machines without a network."""

from data_prep.errors import exit_on_user_error
from train.model.fetch import main

if __name__ == "__main__":
    exit_on_user_error(main)

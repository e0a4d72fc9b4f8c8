"""Command: a run becomes a repository."""

from data_prep.errors import exit_on_user_error
from train.publish.hub import main

if __name__ == "__main__":
    exit_on_user_error(main)

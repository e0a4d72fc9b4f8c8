"""Data sets on the Hugging Face hub, hf://datasets/USER/NAME: their Parquet files, pinned to a commit."""

from data_prep.errors import UserError

PREFIX = "hf://datasets/"


def is_data_set(source: str) -> bool:
    """Whether a URL is of a data set on the hub, and not of one file in it."""
    return source.startswith(PREFIX) and not source.endswith(".parquet")


def parquet_files(source: str) -> list[str]:
    """URLs of the Parquet files of a data set, with `@COMMIT`, so that a later build reads the same files.

    Args:
        source: the data set, a file in it (of Parquet, or a tar), or a pattern.

    Raises:
        UserError: no such data set, or it has no Parquet files.
    """
    from huggingface_hub import HfApi, HfFileSystem  # slow to import (0.5 s)
    from huggingface_hub.errors import HfHubHTTPError

    files = HfFileSystem()
    try:
        path = files.resolve_path(source)
        commit = HfApi().repo_info(path.repo_id, repo_type="dataset", revision=path.revision).sha
        root = f"datasets/{path.repo_id}@{commit}/{path.path_in_repo}".rstrip("/")
        paths = (
            [root]
            if root.endswith((".parquet", ".tar")) and "*" not in root
            else sorted(files.glob(root if "*" in root else f"{root}/**/*.parquet"))
        )
    except (FileNotFoundError, HfHubHTTPError) as error:
        raise UserError(
            f"{source}: {str(error).strip()}; check the name, and log in for a private data set: hf auth"
            " login"
        ) from None
    if not paths:
        raise UserError(
            f"{source}: has no Parquet file; the hub converts most data sets: pass {PREFIX}{path.repo_id}"
            "@refs/convert/parquet, or download it (hf download --repo-type dataset) and pass the folder"
        )
    return [f"hf://{path}" for path in paths]

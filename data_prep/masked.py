"""Secrets are masked in what is printed and recorded, and before a text is cut: half a token is one too."""

import os
import re

MASK = "***"
NAMES = re.compile("(TOKEN|API_KEY|SECRET|SECRET_ACCESS_KEY|PASSWORD)$")  # of environment variables
MIN_CHARACTERS = 8  # of a secret: a shorter value may be a word of any text
PATTERNS = (
    (re.compile(r"(?<=://)[^/\s@]+@"), f"{MASK}@"),  # user and password in a URL
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), MASK),
    (re.compile(r"(?i)\b(bearer) [\w.+/=~-]{20,}"), rf"\1 {MASK}"),
    # signed URLs of S3, Google and Azure
    (
        re.compile(
            r"(?i)([?&](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|sig|access_token)=)[^&\s]+"
        ),
        rf"\1{MASK}",
    ),
)


def masked(text: str, *secrets: str | None) -> str:
    """The text without passwords in URLs, tokens, and values of variables such as HF_TOKEN and WANDB_API_KEY.

    Args:
        secrets: more texts to mask.
    """
    known = (value for name, value in os.environ.items() if NAMES.search(name))
    # The longest first: one may be a part of another.
    for secret in sorted({*known, *filter(None, secrets)}, key=len, reverse=True):
        if len(secret) >= MIN_CHARACTERS:
            text = text.replace(secret, MASK)
    for pattern, mask in PATTERNS:
        text = pattern.sub(mask, text)
    return text


def masked_url(source: str) -> str:
    """A file as it is; a URL without what opens it, whatever this machine's variables are."""
    for pattern, mask in PATTERNS if "://" in source else ():
        source = pattern.sub(mask, source)
    return source


def one_line(error: object, characters: int, *secrets: str | None) -> str:
    """The text of an error on one line, masked and then cut."""
    return " ".join(masked(str(error), *secrets).split())[:characters]

"""Drawn scenes that ask about counting, binding and relations."""

"""Keeps transformers off the screen."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers():
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()

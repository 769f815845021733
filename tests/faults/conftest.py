"""The recipe that is killed, and its undisturbed result."""

from tests.distill.conftest import teacher, text  # noqa: F401

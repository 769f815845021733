"""Floor 2, Hugging Face models: families, conversion, save and load."""

from inhibitor.models import classes as classes
from inhibitor.models.config import InhibitorConfig as InhibitorConfig

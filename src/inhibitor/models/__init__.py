"""Floor 2, Hugging Face models: families, conversion, save and load."""

from inhibitor.models import classes as classes
from inhibitor.models.config import InhibitorConfig as InhibitorConfig
from inhibitor.models.config import Int8Config as Int8Config

"""`inhibitor distill` where transformers is older than the package asks for: 5.17 lacks two names that 5.23 has."""

import sys

from transformers import PreTrainedModel

from inhibitor.cli import main

if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):
    for name in ("enable", "disable"):
        older = getattr(PreTrainedModel, f"gradient_checkpointing_{name}")
        setattr(PreTrainedModel, f"activation_checkpointing_{name}", older)

if __name__ == "__main__":
    sys.argv[1:1] = ["distill"]
    main()

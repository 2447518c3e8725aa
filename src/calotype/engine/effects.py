"""The one table: what each kind of step does, and what undoes it."""

from calotype.engine.delete_effects import DELETE_EFFECTS
from calotype.engine.disk_effects import DISK_EFFECTS
from calotype.engine.handover_effects import HANDOVER_EFFECTS
from calotype.engine.restore_effects import RESTORE_EFFECTS
from calotype.engine.take_effects import TAKE_EFFECTS
from calotype.engine.world import Effects

EFFECTS: Effects = {
    **DISK_EFFECTS,
    **TAKE_EFFECTS,
    **RESTORE_EFFECTS,
    **HANDOVER_EFFECTS,
    **DELETE_EFFECTS,
}

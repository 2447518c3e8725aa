"""The agent in the guest, as the plans need to know of it: where it is, and whether it answers.

That it cannot be reached is found, and told, like everything else that a plan is made from: what
that is in the way of is for the plan to say.
"""

from pathlib import Path

from calotype.errors import CalotypeError, CommandLineError
from calotype.formats import argv as command_line
from calotype.formats.argv import CommandLine
from calotype.model.vm import AgentFacts, VmRecord
from calotype.qemu import agent as guest_agent


def where(record: VmRecord) -> AgentFacts:
    """Where the command line of a VM says that the agent is; it is not asked."""
    try:
        socket = command_line.agent_socket(CommandLine.parse(record.argv), record.cwd)
    except CommandLineError as error:
        return AgentFacts("", error.problem, error.remedy)
    return AgentFacts(socket)


async def look(record: VmRecord) -> AgentFacts:
    """Ask the agent of a guest that runs what it is, and what it can do."""
    found = where(record)
    if found.problem:
        return found
    try:
        async with guest_agent.connect(Path(found.socket)) as agent:
            info = await agent.info()
    except CalotypeError as error:
        return AgentFacts(found.socket, error.problem, error.remedy)
    return AgentFacts(
        found.socket, version=info.version, commands=info.commands, is_frozen=info.is_frozen
    )

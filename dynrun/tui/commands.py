"""The command palette's commands: the app's list (`get_system_commands`), in its order instead of the alphabet's."""

from __future__ import annotations

from textual.command import DiscoveryHit, Hits
from textual.system_commands import SystemCommandsProvider


class Commands(SystemCommandsProvider):
    """Searching is Textual's."""

    async def discover(self) -> Hits:
        for name, help_text, callback, shown in self.app.get_system_commands(self.screen):
            if shown:
                yield DiscoveryHit(name, callback, help=help_text)

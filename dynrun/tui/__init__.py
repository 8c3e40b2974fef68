"""The Textual app: screens over the same objects as the commands. Nothing outside imports Textual."""

"""Give made files away: to a repository of the Hub, to other programs on this machine."""

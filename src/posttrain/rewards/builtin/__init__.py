"""Rewards that are built in. Each module of this folder is one, and its file's name is what `reward.function` calls it; a
package that is installed adds others by entry points of the group `posttrain.rewards`."""
